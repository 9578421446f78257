"""Stand-ins for parts of an engine: processes that are none, and a scheduler that says what a test tells it to."""

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import zmq

from graphgen.calls.outputs import Delivery, Sink
from graphgen.calls.prompts import OnePrompt
from graphgen.calls.sampling_params import SamplingParams
from graphgen.ipc.channel import Channel
from graphgen.ipc.codec import pack_int32
from graphgen.ipc.engine_messages import (
    EngineStats,
    EngineToScheduler,
    FinishReason,
    Outputs,
    Ready,
    SchedulerToEngine,
    Submit,
    TokenOutput,
)
from graphgen.ipc.ggp.messages import ServerLimits, Welcome
from graphgen.ipc.senders import engine_channel
from graphgen.ipc.worker_messages import Bucket, DrawnRows, SamplerParams, StepResult, WorkerCounters, WorkerReady
from graphgen.launch.processes import EngineProcesses, Exit
from graphgen.remote.requests import NO_PARSING, Parsing
from graphgen.requests.open_request import OpenRequest
from graphgen.requests.tokenizer import Tokenizer

Message = TypeVar("Message")

READY = Ready(
    worker=WorkerReady(
        device="fake",
        attention="none",
        graphs=False,
        compiled=False,
        buckets=(Bucket(0, 4), Bucket(12, 4)),
        max_chunks=4,
        num_pages=8,
        page_size=16,
        phases=(),
    ),
    num_slots=4,
    token_budget=16,
)

STATS = EngineStats(1, 2, 3, 4, 5, 6, 0, 0, 0.5, 0, 0, 1.0, 2.0, 3.0, 4.0)

WELCOME = Welcome(
    version=1,
    session="s",
    instance="i",
    server="fake",
    model="fake",
    vocab_size=10,
    eos_token_ids=[],
    features=[],
    limits=ServerLimits(
        frame_bytes=1 << 20, prompt_tokens=100, text_bytes=1000, open_requests=2, open_prompt_tokens=1000
    ),
    heartbeat_ms=100,
    slow_consumer_ms=1000,
    control="tcp://127.0.0.1:1",
)


def make_result(
    step_id: int,
    token_ids: Sequence[int],
    *,
    finished_s: float = 0.0,
    counters: WorkerCounters | None = None,
    failed_draws: tuple[int, ...] = (),
) -> StepResult:
    """Of a step that began at 0."""
    return StepResult(
        step_id=step_id,
        drawn=DrawnRows(token_ids=pack_int32(token_ids)),
        received_s=0.0,
        launched_s=0.0,
        started_s=0.0,
        finished_s=finished_s,
        counters=counters or WorkerCounters(),
        failed_draws=failed_draws,
    )


class FakeCore:
    """What Calls and AsyncCalls ask of an engine or a client. A test's own says in `answer` what its sinks get."""

    def __init__(self) -> None:
        self.prompts: list[OnePrompt] = []
        self.cancelled: list[int] = []
        self.sampling: SamplingParams | Sequence[SamplingParams] | None = None
        self.tenants: list[str] = []
        self.parsing = NO_PARSING
        self.log_ids: list[str] = []

    def open(
        self,
        prompts: Sequence[OnePrompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        streams: bool,
        sinks: Sequence[Sink],
        tenant: str = "",
        parsing: Parsing = NO_PARSING,
        log_id: str = "",
    ) -> list[int]:
        self.prompts += prompts
        self.parsing = parsing
        self.sampling = sampling
        self.tenants.append(tenant)
        self.log_ids.append(log_id)
        num_samples = sampling.n if isinstance(sampling, SamplingParams) else 1
        self.answer(sinks, num_samples, streams)
        return list(range(len(prompts) * num_samples))

    def answer(self, sinks: Sequence[Sink], num_samples: int, streams: bool) -> None:
        """Nothing comes."""

    def cancel(self, request_ids: Sequence[int]) -> None:
        self.cancelled += request_ids

    def check_process(self) -> None:
        pass

    def close(self) -> None:
        pass


class FakeProcesses(EngineProcesses):
    """An engine's folder without children; `exit` is what the next look finds."""

    def __init__(self) -> None:
        super().__init__(modules=())
        self.exit: Exit | None = None
        self.stopped = 0

    def find_exit(self, names: Collection[str] | None = None) -> Exit | None:
        return self.exit

    def stop(self, grace_s: float) -> None:
        self.stopped += 1
        super().stop(grace_s)


class FakeScheduler:
    """The scheduler's end of the channel, driven by the test."""

    def __init__(self, processes: EngineProcesses) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._channel: Channel[SchedulerToEngine, EngineToScheduler] = Channel(
            self._context, processes.folder, engine_channel(), "lower", EngineToScheduler
        )

    def send(self, message: SchedulerToEngine) -> None:
        self._channel.send(message)

    def send_raw(self, frame: bytes) -> None:
        """Bytes that are no message."""
        self._channel._sender.send(frame)

    def send_tokens(
        self, request_id: int, token_ids: list[int], finish_reason: FinishReason | None = None, started_s: float = 0.0
    ) -> None:
        self.send(Outputs((TokenOutput(request_id, tuple(token_ids), finish_reason, started_s),)))

    def receive(self, timeout_s: float) -> EngineToScheduler | None:
        """The next message, if one comes in time."""
        return self._channel.receive(timeout_s)

    def expect(self, kind: type[Message], timeout_s: float = 5.0) -> Message:
        """The next message, which must be of this kind."""
        message = self.receive(timeout_s)
        assert isinstance(message, kind), f"expected {kind.__name__}, got {message}"
        return message

    def close(self) -> None:
        self._channel.close()
        self._context.term()


def open_request(
    request_id: int,
    sink: Callable[[Delivery], None],
    tokenizer: Tokenizer | None = None,
    sampling: SamplingParams | None = None,
    streams: bool = True,
    arrived_s: float = 0.0,
    marked_ids: frozenset[int] = frozenset(),
) -> OpenRequest:
    """A request of the prompt (1, 2, 3)."""
    sampling = sampling or SamplingParams()
    submit = Submit(
        request_id=request_id,
        prompt_token_ids=pack_int32((1, 2, 3)),
        max_tokens=sampling.max_tokens or 1,
        min_tokens=sampling.min_tokens,
        stop_token_ids=(),
        sampler=SamplerParams(),
        arrived_s=arrived_s,
    )
    return OpenRequest(submit, (1, 2, 3), sampling, tokenizer, streams, sink, 0, marked_ids)
