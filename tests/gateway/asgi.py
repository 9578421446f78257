"""The gateway's application without HTTP and without a server: what a test sends, and what the application says."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from graphgen.calls.outputs import PromptTokens, Sink, StreamPiece
from graphgen.calls.prompts import Chat, OnePrompt
from graphgen.gateway.app import make_app
from graphgen.gateway.keys import ApiKeys
from graphgen.gateway.service import Service
from graphgen.ipc.ggp.messages import Health
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


class GatewayCore(FakeCore):
    """The connection to a frontend, of which a test says what it answers."""

    welcome = replace(WELCOME, limits=replace(WELCOME.limits, text_bytes=100))

    def __init__(self, answers: Answer) -> None:
        super().__init__()
        self._answers = answers
        self.status = Health(status="ok", ready=True, worker_ms=1.0)

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
    keys: ApiKeys | None = None,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """leaves: when it is set the client disconnects. names: of the model. keys: which are asked for."""
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
    await make_app(Service(core, names), keys)(scope, receive, send)  # type: ignore[arg-type]  # a stand-in for RemoteCore
    if not said:
        return Reply(0, {}, b"")
    answered = {name.decode(): value.decode() for name, value in said[0]["headers"]}
    return Reply(said[0]["status"], answered, b"".join(one.get("body", b"") for one in said[1:]))
