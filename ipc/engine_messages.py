"""The messages between an Engine and its scheduler. When a server runs, its frontends stand in the Engine's place.

Owns the Structs and nothing else, as `graphgen.ipc.worker_messages` does, and by the same rules.

    Engine  -> scheduler     Submit | Cancel | StatsRequest | ReportRequest | Probe | Attach | SenderEnded | Shutdown
    scheduler -> Engine      Ready | Progress | Notice | Outputs | Rejected | Blamed | EngineStats | EngineReport
                             | Probe | Failed
"""

from typing import Literal

from msgspec import Struct

from graphgen.ipc.reports import EngineReport
from graphgen.ipc.short import short_repr
from graphgen.ipc.worker_messages import (
    Bucket,
    Failed,
    Probe,
    Progress,
    SamplerParams,
    Shutdown,
    WorkerReady,
)

FinishReason = Literal["stop", "length", "aborted", "error"]

ObjectiveName = Literal["latency", "balanced", "throughput"]
"""What an engine is to be good at where requests state no target."""

MAX_PRIORITY = 9
"""The highest service class of a request; 0 is the lowest and the default."""

MAX_TARGET_MS = 1e9
"""The largest deadline or latency target of a request: eleven days."""

STEP_BOUNDS_MS = (0.5, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000, 2000, 5000)
"""Upper ends of the ranges in which steps are counted by their time."""


# --- Engine -> scheduler ----------------------------------------------------------------------------------------------


class Submit(Struct, frozen=True, array_like=True, tag="submit", gc=False):
    """One request, validated by the sender."""

    request_id: int
    prompt_token_ids: bytes  # packed int32
    max_tokens: int  # >= 1; prompt and output together fit the model's context
    min_tokens: int
    stop_token_ids: tuple[int, ...]  # at most MAX_STOP_TOKEN_IDS; end of sequence included unless ignored
    sampler: SamplerParams
    arrived_s: float
    priority: int = 0  # its service class, 0 to MAX_PRIORITY; higher classes are served first
    deadline_ms: float | None = None  # from arrived_s to the last token; None: whenever it ends
    itl_target_ms: float | None = None  # what no gap between two of its tokens should exceed
    ttft_target_ms: float | None = None  # from arrived_s to the first token
    tpot_target_ms: float | None = None  # what the mean of the gaps between its tokens should not exceed
    cache_salt: str = ""  # prompts share cached pages only under an equal salt
    tenant: str = ""  # who it is accounted to; among tenants service is fair, whatever their requests ask for
    log_id: str = ""  # what logs call it
    # Log-probabilities of each token of the output, or of each token of the prompt but the first, and of so many
    # likeliest tokens in its place, 0 to MAX_LOGPROBS. None: not asked for.
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str = ""  # what the output must follow, as llguidance writes grammars; "": nothing
    # Of a request that other engines had before: it goes on behind the tokens that it has emitted.
    num_moves: int = 0  # engines that had it
    output_token_ids: bytes = b""  # packed int32; they count to max_tokens and min_tokens, and for penalties
    first_token_s: float | None = None  # when the first of them came
    num_deaths: int = 0  # of workers and engines that had it, since its last new token


class Cancel(Struct, frozen=True, array_like=True, tag="cancel", gc=False):
    """Ends a request; its pages are free in the next step. No output follows. Unknown ids are ignored."""

    request_id: int


class StatsRequest(Struct, frozen=True, array_like=True, tag="stats?", gc=False):
    """Asks for one EngineStats."""

    steps: bool = False  # with the steps since the last such question; they are kept while somebody asks


class ReportRequest(Struct, frozen=True, array_like=True, tag="report?", gc=False):
    """Asks for an EngineReport. Who routes requests asks ten times a second."""


class Attach(Struct, frozen=True, array_like=True, tag="attach", gc=False):
    """The sender took the place of another Engine, which is gone: that one's requests end. Answered by Ready."""


class SenderEnded(Struct, frozen=True, array_like=True, tag="sender_ended", gc=False):
    """Said by whoever watches the sender of a channel: it has ended, and its requests with ids below this one end."""

    below: int


# --- scheduler -> Engine ----------------------------------------------------------------------------------------------


class Ready(Struct, frozen=True, array_like=True, tag="ready", gc=False):
    """Requests are served from now on."""

    worker: WorkerReady
    num_slots: int  # requests that may run at once
    token_budget: int
    num_engines: int = 1  # of a server elsewhere: engines behind it, of which each holds this at least


class Notice(Struct, frozen=True, array_like=True, tag="notice", gc=False):
    """What an operator should know, in one line."""

    text: str


class TokenOutput(Struct, frozen=True, array_like=True, gc=False):
    """New tokens of one request, with what is to be said of it. So come the first and the last output of each, and all
    of those that ask for log-probabilities."""

    request_id: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    started_s: float  # its first chunk was planned
    cached_tokens: int = 0  # of its prompt: found in the prefix cache, not computed
    logprobs: bytes = b""  # of its tokens, if it asks for them: `step_schema.logprob_words` each
    prompt_logprobs: bytes = b""  # of the next tokens of its prompt: the second one is the first


class Outputs(Struct, frozen=True, array_like=True, tag="outputs", gc=False):
    """What one step gave to its requests, each of which is in it once.

    Most get one token and no news: they come as two columns, because a message of hundreds of small objects costs the
    scheduler as much as the plan of a step.
    """

    outputs: tuple[TokenOutput, ...]
    request_ids: tuple[int, ...] = ()  # of those that get a token between their first and their last
    token_ids: tuple[int, ...] = ()  # theirs, in the same order

    def __len__(self) -> int:
        """Requests that get something."""
        return len(self.outputs) + len(self.request_ids)


class Blamed(Struct, frozen=True, array_like=True, tag="blamed", gc=False):
    """A worker group died with rows of these requests in flight. What counts against them goes along when another
    engine has to go on with them."""

    request_ids: tuple[int, ...]
    num_deaths: tuple[int, ...]  # of each, since its last new token


class Rejected(Struct, frozen=True, array_like=True, tag="rejected", gc=False):
    """A request that is not served, or not to its end: nothing of it is kept."""

    request_id: int
    error: str  # a class of graphgen.ipc.errors: InvalidRequestError, OverloadedError, DeadlineError, NumericalError
    message: str
    retry_after_s: float | None = None  # of an OverloadedError: the same request may fit then


class BucketSteps(Struct, frozen=True, array_like=True, gc=False):
    """The steps of one bucket that have ended."""

    bucket: Bucket
    steps: int
    milliseconds: float  # on the device, of all of them


class StepSummary(Struct, frozen=True, array_like=True, gc=False):
    """One step that has ended, for who watches the engine."""

    step_id: int
    chunk_rows: int
    decode_rows: int
    padding_rows: int
    milliseconds: float  # on the device
    finished_s: float


class EngineStats(Struct, frozen=True, array_like=True, tag="stats", gc=False):
    """A snapshot of the engine. Step times in milliseconds over the last 1000 steps, 0 before the first."""

    running: int
    waiting: int
    pages_free: int
    pages_total: int
    steps: int
    graph_replays: int
    eager_steps: int
    recompilations: int
    padding_share: float  # rows of all steps that held no token / all rows
    preemptions: int
    finished: int
    step_ms_p50: float
    step_ms_p95: float
    step_ms_p99: float
    step_ms_max: float
    pages_cached: int = 0  # of the free pages: those that still hold what a prompt may share
    prefix_queries: int = 0  # prompt tokens of all requests that were started
    prefix_hits: int = 0  # of these: tokens whose pages were found in the prefix cache
    refused: int = 0  # requests that an OverloadedError turned away
    deadline_misses: int = 0  # requests that a DeadlineError ended
    ttft_targets_met: int = 0  # first tokens of requests with a ttft_target_ms that came in time
    ttft_targets_missed: int = 0
    tpot_targets_met: int = 0  # finished requests of at least two tokens that kept their tpot_target_ms
    tpot_targets_missed: int = 0
    worker_restarts: int = 0  # worker groups that took the place of one that died or hung
    worker_loss: str = ""  # why the last one was lost
    worker_pause_s: float = 0.0  # from there until its successor served
    buckets_captured: int = 0  # that steps may use now
    buckets_total: int = 0  # of these and those that are captured while nothing runs
    capture_ms_max: float = 0.0  # the longest of the captures since ready: a request may have waited so long for it
    poisoned: int = 0  # requests that were given up because the worker ended each time it computed them
    numerical_errors: int = 0  # requests that a NumericalError ended: their logits were all NaN or -inf
    total_rows: int = 0  # rows of all steps
    padding_rows: int = 0  # of these: rows that held no token
    decode_rows: int = 0  # of these: rows of decodes; the others are of chunks
    waiting_by_class: tuple[int, ...] = ()  # requests that wait, by service class
    buckets: tuple[BucketSteps, ...] = ()  # those that a step has run in
    steps_within_ms: tuple[int, ...] = ()  # steps by their time on the device, see STEP_BOUNDS_MS; above them the last
    recent_steps: tuple[StepSummary, ...] = ()  # the oldest first, where they were asked for
    engines: "tuple[EngineStats | None, ...]" = ()  # of several engines each one's own; None: it does not serve now

    def __repr__(self) -> str:
        return short_repr(self)


EngineToScheduler = Submit | Cancel | StatsRequest | ReportRequest | Probe | Attach | SenderEnded | Shutdown

SchedulerToEngine = (
    Ready | Progress | Notice | Outputs | Rejected | Blamed | EngineStats | EngineReport | Probe | Failed
)
