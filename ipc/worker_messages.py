"""The messages between an engine's scheduler and its workers.

Owns the Structs and nothing else: no sockets, no policy. All are frozen, array-like (positional on the wire, both ends
are the same build) and hold ints, floats, strings and packed int32 bytes, never tensors. `array("i")` or
`numpy.frombuffer(..., "<i4")` reads the packed fields.

    scheduler -> worker      StepPlan | Capture | Probe | Shutdown
    worker  -> scheduler     WorkerReady | Progress | StepResult | Captured | Probe | Failed

All `_s` times are `time.monotonic()` of the machine, which its processes share.
"""

from bisect import bisect_right
from collections.abc import Iterable

from msgspec import Struct

from graphgen.ipc.short import short_repr

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


class Probe(Struct, frozen=True, array_like=True, tag="probe", gc=False):
    """Goes from the Engine through scheduler, worker and device and comes back as it is: all three are alive."""

    probe_id: int


class Shutdown(Struct, frozen=True, array_like=True, tag="shutdown", gc=False):
    """The receiver ends at once."""


# --- scheduler -> worker ----------------------------------------------------------------------------------------------


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


# --- worker -> scheduler ----------------------------------------------------------------------------------------------


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
    ms_per_chunk_position: float  # of one chunk, for each further position that it reads for all of its rows

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


SchedulerToWorker = StepPlan | Capture | Probe | Shutdown

WorkerToScheduler = WorkerReady | Progress | StepResult | Captured | Probe | Failed
