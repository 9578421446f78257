"""Every message that crosses a process boundary inside graphgen.

Owns the Structs and nothing else: no sockets, no policy. All are frozen, array-like (positional on the wire,
both ends are the same build) and hold ints, floats, strings and packed int32 bytes, never tensors.
`array("i")` or `numpy.frombuffer(..., "<i4")` reads the packed fields.

    Engine  -> scheduler     Submit | Cancel | StatsRequest | ReportRequest | Probe | Attach | SenderEnded | Shutdown
    scheduler -> Engine      Ready | Progress | Notice | Outputs | Rejected | Blamed | EngineStats | EngineReport
                             | Probe | Failed
    scheduler -> worker      StepPlan | Capture | Probe | Shutdown
    worker  -> scheduler     WorkerReady | Progress | StepResult | Captured | Probe | Failed
    supervisor -> frontend   Drain | EngineLost | DrainEngine | ExpectEngine | AddEngine | RemoveEngine
    frontend -> supervisor   Progress | Ready | EngineServes | EngineAway | EngineDrained | Notice | Listening
                             | RequestEnded | Drained | Failed

The frontends stand in the Engine's place when a server runs; the supervisor is the process that started all of them.

All `_s` times are `time.monotonic()` of the machine, which its processes share.
"""

from bisect import bisect_right
from collections.abc import Iterable
from typing import Literal

from msgspec import Struct

from graphgen.ipc.reports import EngineReport
from graphgen.ipc.short import short_repr

FinishReason = Literal["stop", "length", "aborted", "error"]

ObjectiveName = Literal["latency", "balanced", "throughput"]
"""What an engine is to be good at where requests state no target."""

MAX_PRIORITY = 9
"""The highest service class of a request; 0 is the lowest and the default."""

MAX_TARGET_MS = 1e9
"""The largest deadline or latency target of a request: eleven days."""

STEP_BOUNDS_MS = (0.5, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000, 2000, 5000)
"""Upper ends of the ranges in which steps are counted by their time."""

MAX_STOP_TOKEN_IDS = 16
"""Stop token ids of one request, end-of-sequence ids included: the width of a device table."""

MAX_LOGIT_BIASES = 1024
"""Tokens whose logits a request may change: the width of a device table, a power of 2."""

MAX_LOGPROBS = 20
"""Likeliest tokens of a position whose log-probabilities a request may ask for."""


class Bucket(Struct, frozen=True, array_like=True, gc=False):
    """Rows of a step: [0, prefill_rows) hold prompt chunks, the next `decode_rows` hold decodes. On a device with
    graphs it is a captured shape."""

    prefill_rows: int
    decode_rows: int

    @property
    def num_rows(self) -> int:
        """Token rows of the shape: its token budget."""
        return self.prefill_rows + self.decode_rows

    def __str__(self) -> str:
        return f"{self.prefill_rows}+{self.decode_rows}"


class SamplerParams(Struct, frozen=True, array_like=True, gc=False):
    """How one request draws its tokens, resolved: no value is optional. Neutral values switch a rule off."""

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off
    min_p: float = 0.0  # 0 is off
    repetition_penalty: float = 1.0  # 1 is off; over prompt and output
    presence_penalty: float = 0.0  # 0 is off; over output
    frequency_penalty: float = 0.0  # 0 is off; over output
    seed: int = 0  # 0 <= seed < 2**63
    # What is added to logits: the ids of n tokens, rising, packed int32, then n biases, packed float32.
    biases: bytes = b""


# --- Engine -> scheduler ---------------------------------------------------------------------------------------


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


class Probe(Struct, frozen=True, array_like=True, tag="probe", gc=False):
    """Goes from the Engine through scheduler, worker and device and comes back as it is: all three are alive."""

    probe_id: int


class ReportRequest(Struct, frozen=True, array_like=True, tag="report?", gc=False):
    """Asks for an EngineReport. Who routes requests asks ten times a second."""


class Attach(Struct, frozen=True, array_like=True, tag="attach", gc=False):
    """The sender took the place of another Engine, which is gone: that one's requests end. Answered by Ready."""


class SenderEnded(Struct, frozen=True, array_like=True, tag="sender_ended", gc=False):
    """Said by whoever watches the sender of a channel: it has ended, and its requests with ids below this one end."""

    below: int


class Shutdown(Struct, frozen=True, array_like=True, tag="shutdown", gc=False):
    """The receiver ends at once."""


# --- scheduler -> worker ---------------------------------------------------------------------------------------


class SlotInit(Struct, frozen=True, array_like=True, gc=False):
    """What a slot's device tables hold for the request that now owns the slot."""

    prompt_len: int  # tokens of the original prompt; tokens at later positions are the request's own output
    min_length: int  # stop tokens are not drawn while prompt and output together are shorter than this
    stop_token_ids: tuple[int, ...]
    sampler: SamplerParams
    max_len: int = 0  # of prompt and output together; some rotations follow from it
    logprobs: int | None = None  # see Submit
    grammar: str = ""  # see Submit
    output_token_ids: bytes = b""  # with a grammar: the output so far, packed int32


class Chunk(Struct, frozen=True, array_like=True, gc=False, kw_only=True):
    """Consecutive tokens of one request computed in one step."""

    slot: int
    start: int  # position of its first token
    length: int
    draws: bool  # the last chunk of what is known: its last row draws the next token
    init: SlotInit | None = None  # set in the first chunk after an admission: the slot has a new owner


class StepPlan(Struct, frozen=True, array_like=True, tag="plan", gc=False, kw_only=True):
    """One step. Chunks fill the prefill region from row 0, decodes the decode region, both in this order.

    How it lies on the device: `graphgen.ipc.step_schema`. The bytes are packed int32.
    """

    step_id: int
    bucket: Bucket
    chunks: tuple[Chunk, ...] = ()
    chunk_token_ids: bytes = b""  # the chunks' tokens one after another
    decode_slots: bytes = b""  # the row's token is the slot's last token, fed back on the device
    decode_positions: bytes = b""  # the row's position
    redrawn: bytes = b""  # (slot, token, 1 in the output and 0 in the prompt) each, of decode rows that compute a token
    # once more, since the one drawn behind it was refused: the row's token is this one
    new_pages: bytes = b""  # (page group, slot, index in its block table, page) each
    page_copies: bytes = b""  # pairs (source, destination) of whole pages, copied before anything is written; no
    # destination is the source of another pair
    scored_rows: bytes = b""  # (prefill row, the prompt's next token, 1 + likeliest tokens) each: what the row says of
    # that token. See `graphgen.ipc.step_schema`
    planned_s: float

    @property
    def num_tokens(self) -> int:
        """Of its chunks and its decode rows."""
        return (len(self.chunk_token_ids) + len(self.decode_slots)) // 4

    @property
    def num_decodes(self) -> int:
        return len(self.decode_slots) // 4

    @property
    def num_drawing_rows(self) -> int:
        """Rows that get a token: of its chunks those that draw, and the decode rows."""
        return sum(chunk.draws for chunk in self.chunks) + self.num_decodes


class Capture(Struct, frozen=True, array_like=True, tag="capture", gc=False):
    """Capture one more bucket, of `WorkerReady.rare`. Said only while nothing is in flight, and answered by Captured;
    plans that come meanwhile wait for it."""

    bucket: Bucket


# --- worker -> scheduler ---------------------------------------------------------------------------------------


class DrawnRows(Struct, frozen=True, array_like=True, gc=False, kw_only=True):
    """What the drawing rows of a step got, a column of packed int32 for each of `graphgen.ipc.step_schema`'s output
    fields: of the chunks that draw, in the plan's order, then of the decode rows in theirs."""

    token_ids: bytes  # 0 where nothing could be drawn


class StepResult(Struct, frozen=True, array_like=True, tag="result", gc=False, kw_only=True):
    """What one step gave, and when."""

    step_id: int
    drawn: DrawnRows
    received_s: float  # the plan reached the worker
    launched_s: float  # the step was handed to the device
    started_s: float  # the device began it
    finished_s: float  # the device finished it
    counters: "WorkerCounters"
    failed_draws: tuple[int, ...] = ()  # places among the drawing rows: those whose logits are all NaN or -inf
    logprobs: bytes = b""  # of the drawing rows whose requests ask for them, in order: `step_schema.logprob_words` each
    prompt_logprobs: bytes = b""  # the same of the scored rows
    refused_draws: tuple[int, ...] = ()  # those whose token their grammar does not allow: to be drawn again
    failed_grammars: tuple[tuple[int, str], ...] = ()  # those whose grammar cannot go on, and why


class Captured(Struct, frozen=True, array_like=True, tag="captured", gc=False):
    """A bucket was captured, and steps may use it; or it was given up."""

    bucket: Bucket
    seconds: float  # that it took, in which no plan was launched
    milliseconds: float | None = None  # of a step, as in StepTimeTable; None: the table has it, or there is none
    problem: str = ""  # why it was given up


class WorkerCounters(Struct, frozen=True, array_like=True, gc=False):
    """Totals since ready."""

    graph_replays: int = 0
    eager_steps: int = 0  # steps that ran without a graph on a device that has graphs; 0 on a healthy engine
    recompilations: int = 0


class Phase(Struct, frozen=True, array_like=True, gc=False):
    """One phase of the start. Phases follow one another, so their seconds add up."""

    name: str
    seconds: float
    hidden_s: float = 0.0  # work of this phase that was done beside earlier ones, and no part of `seconds`

    def __str__(self) -> str:
        hidden = f"  and {self.hidden_s:.2f} s beside earlier phases" if self.hidden_s >= 0.005 else ""
        return f"{self.name:<24}{self.seconds:8.2f} s{hidden}"

    def __repr__(self) -> str:
        return short_repr(self)


TIMING_PHASE = "timing"
"""Name of the phase in which a start measured the step times."""


class BucketTime(Struct, frozen=True, array_like=True, gc=False):
    """How long a step of one bucket takes on the device, all its rows live."""

    bucket: Bucket
    milliseconds: float


class StepTimeTable(Struct, frozen=True, array_like=True, gc=False):
    """Measured step times of a worker's buckets, and how they grow with what the rows attend to.

    A pair is one prompt row and one position it attends to.
    """

    times: tuple[BucketTime, ...]
    decode_context: int  # positions that each decode row attended to in `times`
    prompt_start: int  # position of the one chunk's first token in `times`
    ms_per_decode_position: float  # of one decode row, for each further position it attends to
    ms_per_prompt_pair: float

    def has(self, buckets: Iterable[Bucket]) -> bool:
        """Whether each of them has a time."""
        return {time.bucket for time in self.times}.issuperset(buckets)

    def __repr__(self) -> str:
        return short_repr(self)


class PageGroup(Struct, frozen=True, array_like=True, gc=False):
    """Layers that keep the same positions of a request, and have block tables of their own. Pages of all groups are of
    one size and come from one pool."""

    window: int | None = None  # positions that a row sees, its own included; None: all before it

    def most_pages(self, num_positions: int, page_size: int, longest_chunk: int) -> int:
        """Pages that a request of so many positions holds at once: all, or those that the window and a chunk touch, and
        one whose beginning is copied."""
        num_pages = -(-num_positions // page_size)
        if self.window is None:
            return num_pages
        return min(num_pages, -(-(self.window - 1) // page_size) + -(-longest_chunk // page_size) + 1)


class WorkerReady(Struct, frozen=True, array_like=True, tag="worker_ready", gc=False):
    """The worker serves. What it decided from the device it found."""

    device: str
    attention: str
    graphs: bool  # False on a device without graphs (the CPU): a step has the rows of its plan, nothing is padded
    compiled: bool
    buckets: tuple[Bucket, ...]
    max_chunks: int  # chunks one step may hold
    num_pages: int
    page_size: int
    phases: tuple[Phase, ...]
    step_times: StepTimeTable | None = None  # None: nobody has measured this device
    device_bytes: int = 0  # of a CUDA device, held by this worker when it was ready
    page_groups: tuple[PageGroup, ...] = (PageGroup(),)
    page_bytes: int = 0  # of one page, in all layers of its group; of several ranks, of each
    max_chunk_pages: int | None = None  # pages that the chunks of one step may see together; None: any number
    num_ranks: int = 1  # that share the model
    collectives: str = ""  # how they add up, for people
    rare: tuple[Bucket, ...] = ()  # of the buckets, those that are captured later, while nothing runs

    @property
    def captured(self) -> tuple[Bucket, ...]:
        """The buckets that steps may use as soon as the worker is ready."""
        return tuple(bucket for bucket in self.buckets if bucket not in self.rare)

    def most_positions(self, limit: int) -> int:
        """Of a request that has all pages to itself, at most `limit`."""
        longest_chunk = max(bucket.prefill_rows for bucket in self.buckets)

        def num_pages(num_positions: int) -> int:
            return sum(one.most_pages(num_positions, self.page_size, longest_chunk) for one in self.page_groups)

        return bisect_right(range(limit + 1), self.num_pages, key=num_pages) - 1

    def __repr__(self) -> str:
        return short_repr(self)


class Progress(Struct, frozen=True, array_like=True, tag="progress", gc=False):
    """The start advanced: `done` of `total` units of `phase`; a total of 0 where that cannot be told."""

    phase: str
    done: int
    total: int


class Failed(Struct, frozen=True, array_like=True, tag="failed", gc=False):
    """The sender cannot go on and ends. `error` names a class of graphgen.ipc.errors where one fits."""

    where: str
    error: str
    message: str


# --- scheduler -> Engine ---------------------------------------------------------------------------------------


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


# --- supervisor <-> frontend -----------------------------------------------------------------------------------


class Drain(Struct, frozen=True, array_like=True, tag="drain", gc=False):
    """Take no new requests, finish the open ones within the time, then end. 0: end at once, with an error for each."""

    grace_s: float


class EngineLost(Struct, frozen=True, array_like=True, tag="engine_lost", gc=False):
    """An engine ended. With several, its requests go on at another; of the only one every open request ends with an
    error. When it was the last one and is not started again, the frontend ends too."""

    message: str
    restarts: bool = False  # another is being started in its place
    engine: int = 0  # its number
    is_last: bool = True  # no other is left


class DrainEngine(Struct, frozen=True, array_like=True, tag="drain_engine", gc=False):
    """One of several engines gets no new requests; what is open there after the time goes on at others. Answered by
    EngineDrained."""

    engine: int
    grace_s: float


class ExpectEngine(Struct, frozen=True, array_like=True, tag="expect_engine", gc=False):
    """An engine that had drained, or was given up, is being started again."""

    engine: int


class AddEngine(Struct, frozen=True, array_like=True, tag="add_engine", gc=False):
    """A server elsewhere is one of the engines from here on, also one that had drained. Answered by EngineServes, or by
    EngineAway."""

    engine: int
    address: str


class RemoveEngine(Struct, frozen=True, array_like=True, tag="remove_engine", gc=False):
    """A server elsewhere, at which nothing is open, is none of the engines any more."""

    engine: int


class EngineAway(Struct, frozen=True, array_like=True, tag="engine_away", gc=False):
    """A server elsewhere cannot be reached now. What it had goes on at others, and it is tried again."""

    engine: int
    reason: str
    is_refused: bool = False  # it can be reached, and is none of these engines


class EngineDrained(Struct, frozen=True, array_like=True, tag="engine_drained", gc=False):
    """Nothing is open at the engine, which may be ended; or it could not drain."""

    engine: int
    error: str = ""


class Listening(Struct, frozen=True, array_like=True, tag="listening", gc=False):
    """The public sockets are bound and requests are served."""

    data: str
    control: str


class RequestEnded(Struct, frozen=True, array_like=True, tag="request_ended", gc=False):
    """What an operator may know of a request that has ended: no word of it, and no name that acts for its session."""

    request_id: int  # the client's
    key: str  # the CURVE key of its connection; "" without keys
    address: str  # where the connection comes from; "" where that is not known
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int  # of all samples
    finish: tuple[str, ...]  # of each sample, or the code of the error that ended it
    first_token_ms: float  # from its arrival; 0 without a token
    total_ms: float
    log_id: str = ""  # what its client called it


class EngineServes(Struct, frozen=True, array_like=True, tag="engine_serves", gc=False):
    """An engine serves that was started in the place of one that ended."""

    engine: int


class Drained(Struct, frozen=True, array_like=True, tag="drained", gc=False):
    """The frontend ends. Of the requests that were open, so many got an error for their end."""

    num_lost: int


EngineToScheduler = Submit | Cancel | StatsRequest | ReportRequest | Probe | Attach | SenderEnded | Shutdown
SchedulerToEngine = (
    Ready | Progress | Notice | Outputs | Rejected | Blamed | EngineStats | EngineReport | Probe | Failed
)
SchedulerToWorker = StepPlan | Capture | Probe | Shutdown
WorkerToScheduler = WorkerReady | Progress | StepResult | Captured | Probe | Failed
SupervisorToFrontend = Drain | EngineLost | DrainEngine | ExpectEngine | AddEngine | RemoveEngine
FrontendToSupervisor = (
    Progress | Ready | EngineServes | EngineAway | EngineDrained | Notice | Listening | RequestEnded | Drained | Failed
)
