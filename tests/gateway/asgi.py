"""The gateway's application without HTTP and without a server: what a test sends, and what the application says."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from graphgen.calls.outputs import PromptTokens, Sink, StreamPiece
from graphgen.calls.prompts import Chat, OnePrompt
from graphgen.gateway.admission import Admission
from graphgen.gateway.app import make_app
from graphgen.gateway.output_parsers.formats import PLAIN, OutputFormat
from graphgen.gateway.service import Service
from graphgen.gateway.settings import ModelFacts
from graphgen.gateway.tracing import Tracing
from graphgen.ipc.ggp.messages import Health, Stats, StatsRequest
from graphgen.ipc.ggp.statistics import BucketCount, Histogram, Live, Metrics, Steps
from tests.fakes import WELCOME, FakeCore

Answer = Callable[[Sequence[Sink], int], None]
"""What the sinks of a request get, given the number of its samples."""


def piece(text: str, finish: Any = None, sample: int = 0, token_ids: tuple[int, ...] = (1,)) -> StreamPiece:
    return StreamPiece(text, token_ids, finish, cached_tokens=2, sample_index=sample, prompt_tokens=5)


def says(*texts: str, finish: str = "length") -> Answer:
    """Each sample of each prompt says these, the last one at its end."""

    def answer(sinks: Sequence[Sink], num_samples: int) -> None:
        for text in texts[:-1]:
            for sink in sinks:
                for sample in range(num_samples):
                    sink(piece(text, None, sample))
        for sink in sinks:
            for sample in range(num_samples):
                sink(piece(texts[-1], finish, sample))

    return answer


def fails(error: Exception, after: Sequence[str] = ()) -> Answer:
    """The first prompt says the texts, and is lost."""

    def answer(sinks: Sequence[Sink], num_samples: int) -> None:
        for text in after:
            sinks[0](piece(text))
        sinks[0](error)

    return answer


HISTOGRAM = Histogram(bounds=[0.001, 0.5], counts=[2, 3, 1], sum=4.5)
METRICS = Metrics(
    engine_serves=True,
    prompt_tokens=500,
    cached_tokens=100,
    output_tokens=70,
    requests={"stop": 3, "aborted": 1, "overloaded": 2},
    with_target={"ttft": 4, "itl": 60, "tpot": 3},
    target_misses={"ttft": 1, "itl": 2, "tpot": 0},
    histograms=dict.fromkeys(
        (
            *("ttft_s", "itl_s", "tpot_s", "queue_s", "prefill_s", "decode_s", "inference_s", "e2e_s", "step_s"),
            *("prompt_tokens", "output_tokens"),
        ),
        HISTOGRAM,
    ),
    http_answers={"/v1/models 200": 3},
    held_by_class=[1, 0, 2],
    waiting_by_class=[4, 0, 0, 5],
    pages_cached=20,
    chunk_rows=400,
    decode_rows=70,
    padding_rows=42,
    buckets=[BucketCount(prefill_rows=112, decode_rows=16, steps=6, ms=30.0)],
    prefix_queries=500,
    prefix_hits=100,
    refused=2,
    deadline_misses=1,
    graph_replays=40,
    eager_steps=0,
    recompilations=0,
)
LIVE = Live(
    steps=Steps(ids=[6, 7], chunk_rows=[9, 0], decode_rows=[2, 2], padding_rows=[5, 0], ms=[4.5, 2.5], ended_ms=[1, 5]),
    requests=[],
)
STATS = Stats(
    sessions=3,
    open_requests=14,
    held_requests=3,
    running=2,
    waiting=9,
    pages_free=75,
    pages_total=100,
    steps=40,
    finished=4,
    preemptions=6,
    step_ms_p50=4.0,
    step_ms_p95=5.0,
    step_ms_p99=6.0,
    step_ms_max=7.0,
    deltas_sent=70,
    deltas_merged=0,
    messages_refused=2,
    frontend_cpu_s=1.5,
    frontend_rss_bytes=1 << 20,
    worker_restarts=1,
)


class GatewayCore(FakeCore):
    """The connection to a frontend, of which a test says what it answers."""

    welcome = replace(WELCOME, limits=replace(WELCOME.limits, text_bytes=100))

    def __init__(self, answers: Answer) -> None:
        super().__init__()
        self._answers = answers
        self.status = Health(status="ok", ready=True, worker_ms=1.0)
        self.asked: list[StatsRequest] = []
        self.http_answers: Counter[str] = Counter()

    def answer(self, sinks: Sequence[Sink], num_samples: int, streams: bool) -> None:
        self._answers(sinks, num_samples)

    def read_prompt(
        self, prompt: OnePrompt, sink: Sink, *, special_tokens: bool = True, with_text: bool = False, tenant: str = ""
    ) -> None:
        """A text has a token for each character, after one of its own where special tokens are wanted."""
        if isinstance(prompt, Chat):
            prompt = "".join(message["content"] for message in prompt.messages)
        ids = tuple(map(ord, prompt)) if isinstance(prompt, str) else tuple(prompt)
        ids = (1, *ids) if isinstance(prompt, str) and special_tokens else ids
        self.tenants.append(tenant)
        sink(PromptTokens(ids, "".join(map(chr, ids)) if with_text else None))

    def health(self) -> Health:
        return self.status

    def stats(self, question: StatsRequest) -> Stats:
        """What was reported comes back as the frontend adds it up."""
        self.asked.append(question)
        metrics = replace(METRICS, http_answers={**METRICS.http_answers, **self.http_answers})
        return replace(
            STATS,
            metrics=metrics if question.metrics else None,
            live=None if question.live_after is None else LIVE,
        )

    def report(self, http_answers: dict[str, int]) -> None:
        self.http_answers.update(http_answers)


class Reply(NamedTuple):
    """What the application said."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        return error

    @property
    def events(self) -> list[Any]:
        """The data of each event, as OpenAI's clients read them: comments are left out."""
        lines = [line for line in self.body.decode().splitlines() if not line.startswith("event: ")]
        data = [line.removeprefix("data: ") for line in lines if line and not line.startswith(":")]
        return [one if one == "[DONE]" else json.loads(one) for one in data]


def call(core: GatewayCore, path: str, body: object = None, method: str = "POST", **further: Any) -> Reply:
    """further: as of `acall`."""
    return asyncio.run(acall(core, path, body, method, **further))


async def acall(
    core: GatewayCore,
    path: str,
    body: object = None,
    method: str = "POST",
    *,
    leaves: asyncio.Event | None = None,
    names: Sequence[str] = ("fake",),
    output_format: OutputFormat = PLAIN,
    tokenizer_info: dict[str, str] | None = None,
    admission: Admission | None = None,
    origins: Sequence[str] = (),
    headers: Mapping[str, str] | None = None,
    reports: bool = False,
    tracing: Tracing | None = None,
    open_requests: int | None = None,
) -> Reply:
    """leaves: when it is set the client disconnects. names: of the model. output_format: what it writes.
    tokenizer_info: of it. admission: who is let in. origins: whose pages are. reports: what was answered is reported to
    the core at once. tracing: of its requests. open_requests: that a client may have."""
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    incoming = [{"type": "http.request", "body": data, "more_body": False}]
    said: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        await (leaves or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        said.append(dict(message))

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
        "client": ("192.0.2.7", 1234),
    }
    facts = ModelFacts(output_format, tokenizer_info or {})
    service = Service(core, names, facts, open_requests=open_requests)  # type: ignore[arg-type]  # a stand-in for RemoteCore
    await make_app(service, admission, origins=origins, tracing=tracing)(scope, receive, send)
    if reports:
        service.answers.report()
    if not said:
        return Reply(0, {}, b"")
    answered = {name.decode(): value.decode() for name, value in said[0]["headers"]}
    return Reply(said[0]["status"], answered, b"".join(one.get("body", b"") for one in said[1:]))
