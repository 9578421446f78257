"""What a step's input and output hold, field by field.

Owns the two schemas and the shape of a step that lengths follow from; no array and no tensor, since the scheduler reads
this too. A new field is one line here and its use: who makes it (an attribute of Chunk, StepPlan or DrawnRows) and
the kernel that reads or writes it.

    INPUT_FIELDS   the words a plan becomes, in this order, in one block that is copied to the device at once
    OUTPUT_FIELDS  the words that come back for each drawing row, one column a field
    LOGPROB_WORDS  the words of a row that was asked for log-probabilities, which come back from no other

Read by the packing of plans (`graphgen.worker.inputs`), the row expanders (`graphgen.worker.rows`, `rows_cuda`), the
ring of outputs (`graphgen.worker.outputs`), the scheduler, and the workers of tests.
"""

from array import array
from collections.abc import Callable, Sequence
from enum import Enum, IntEnum

from msgspec import Struct

from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.worker_messages import MAX_LOGPROBS, Bucket, DrawnRows, StepPlan

WORD_BYTES = 4
NEW_PAGE_WORDS = 4  # page group, slot, index in its block table, page
PAGE_COPY_WORDS = 2  # source, destination
SCORED_ROW_WORDS = 3  # prefill row, the prompt's next token, 1 + likeliest tokens

MAX_SCORED_ROWS = 256
"""Rows of a step whose logits are computed for the prompt's next token. They cost every request that runs beside them,
so a step has no more of them, however long its chunks could be."""


class Counts(IntEnum):
    """Words of the field `counts`."""

    PREFILL_ROWS = 0  # live ones
    NEW_PAGES = 1  # live ones
    OUTPUT_ROW = 2  # row of the ring of outputs that the step writes


class Padding(Enum):
    """What fills a field behind its live words."""

    ZERO = "0"
    TRASH_SLOT = "the trash slot"
    UNREAD = "whatever was there: nothing reads it"


# --- the shape of a step -----------------------------------------------------------------------------------------


class StepShape(Struct, frozen=True):
    """What a step has room for. Steps of one shape run the same kernels at the same addresses."""

    bucket: Bucket  # its rows
    num_chunks: int
    num_new_pages: int
    num_scored_rows: int = 0

    @property
    def num_drawing_rows(self) -> int:
        """The last row of each chunk, and the decode rows."""
        return self.num_chunks + self.bucket.decode_rows


class StepBounds(Struct, frozen=True):
    """What bounds every step of an engine."""

    max_chunks: int
    trash_slot: int
    num_groups: int  # page groups
    most_pages: int  # that a request holds at once, in all of them
    params_width: int  # words of a slot's parameters

    def any_plan(self, bucket: Bucket) -> StepShape:
        """Room for every plan of this bucket: a chunk may bring all pages of its request, a decode row one of each
        group."""
        num_chunks = min(self.max_chunks, bucket.prefill_rows)
        num_new_pages = num_chunks * self.most_pages + bucket.decode_rows * self.num_groups
        return StepShape(bucket, num_chunks, num_new_pages, MAX_SCORED_ROWS if bucket.prefill_rows else 0)

    def this_plan(self, plan: StepPlan) -> StepShape:
        """No more room than this plan needs; prefill rows belong to one chunk at least."""
        num_chunks = max(len(plan.chunks), min(1, plan.bucket.prefill_rows))
        return StepShape(plan.bucket, num_chunks, num_new_pages(plan), num_scored_rows(plan))


def num_new_pages(plan: StepPlan) -> int:
    """Entries of its block tables that it writes."""
    return len(plan.new_pages) // (WORD_BYTES * NEW_PAGE_WORDS)


def num_scored_rows(plan: StepPlan) -> int:
    """Rows whose next token of the prompt is asked for."""
    return len(plan.scored_rows) // (WORD_BYTES * SCORED_ROW_WORDS)


# --- the input -----------------------------------------------------------------------------------------------------

Source = Callable[[StepPlan], bytes | Sequence[int]]
"""A field's live words in a plan: packed int32, or ints."""


class InputField(Struct, frozen=True):
    """int32 words of the input block."""

    name: str
    length: Callable[[StepShape, StepBounds], int]
    padding: Padding = Padding.ZERO
    source: Source | None = None  # None: worked out by the packing of plans
    words: int = 1  # of one entry


def of_chunks(attribute: str) -> Source:
    """That attribute of each chunk."""
    return lambda plan: [getattr(chunk, attribute) for chunk in plan.chunks]


def _each_chunk(step: StepShape, bounds: StepBounds) -> int:
    return step.num_chunks


def _each_prefill_row(step: StepShape, bounds: StepBounds) -> int:
    return step.bucket.prefill_rows


def _each_decode_row(step: StepShape, bounds: StepBounds) -> int:
    return step.bucket.decode_rows


INPUT_FIELDS: tuple[InputField, ...] = (
    # See `Counts`.
    InputField("counts", lambda step, bounds: len(Counts)),
    # Here, so that they lie at one address in every step that has prompt rows. Padding asks for nothing.
    InputField(
        "scored_rows",
        lambda step, bounds: step.num_scored_rows * SCORED_ROW_WORDS,
        Padding.ZERO,
        lambda plan: plan.scored_rows,
        SCORED_ROW_WORDS,
    ),
    InputField("chunk_slots", _each_chunk, Padding.TRASH_SLOT, of_chunks("slot")),
    # Of each chunk's first token.
    InputField("chunk_positions", _each_chunk, Padding.ZERO, of_chunks("start")),
    # First row of each chunk, padded with the number of live prefill rows.
    InputField("chunk_starts", lambda step, bounds: step.num_chunks + 1),
    # 1 where the chunk's last row draws a token.
    InputField("chunk_draws", _each_chunk, Padding.ZERO, of_chunks("draws")),
    # 1 where the slot has a new owner, whose parameters are in slot_params at the chunk's place.
    InputField("chunk_inits", _each_chunk, Padding.ZERO, lambda plan: [one.init is not None for one in plan.chunks]),
    InputField("slot_params", lambda step, bounds: step.num_chunks * bounds.params_width, Padding.UNREAD),
    InputField("chunk_token_ids", _each_prefill_row, Padding.ZERO, lambda plan: plan.chunk_token_ids),
    InputField("decode_slots", _each_decode_row, Padding.TRASH_SLOT, lambda plan: plan.decode_slots),
    InputField("decode_positions", _each_decode_row, Padding.ZERO, lambda plan: plan.decode_positions),
    InputField(
        "page_copies",
        lambda step, bounds: step.num_chunks * bounds.num_groups * PAGE_COPY_WORDS,
        Padding.UNREAD,
        lambda plan: plan.page_copies,
        PAGE_COPY_WORDS,
    ),
    # The last one: only the live part of it is copied to the device.
    InputField(
        "new_pages",
        lambda step, bounds: step.num_new_pages * NEW_PAGE_WORDS,
        Padding.UNREAD,
        lambda plan: plan.new_pages,
        NEW_PAGE_WORDS,
    ),
)


def live_entries(plan: StepPlan, name: str) -> list[tuple[int, ...]]:
    """What a plan has of a field that has a source: one tuple of its words for each entry, without padding."""
    (field,) = (one for one in INPUT_FIELDS if one.name == name)
    assert field.source is not None, f"{name} is worked out by the packing of plans"
    values = field.source(plan)
    words = unpack_int32(values) if isinstance(values, bytes) else values
    return list(zip(*(words[place :: field.words] for place in range(field.words)), strict=True))


# --- the output ----------------------------------------------------------------------------------------------------


class OutputField(Struct, frozen=True):
    """int32 words of each drawing row, and an attribute of DrawnRows."""

    name: str
    words: int = 1  # of one row


OUTPUT_FIELDS: tuple[OutputField, ...] = (
    # On the device NO_TOKEN where nothing could be drawn; in a StepResult 0, and the row's place in `failed_draws`.
    OutputField("token_ids"),
)


def unpack_columns(drawn: DrawnRows, fields: Sequence[OutputField] = OUTPUT_FIELDS) -> dict[str, "array[int]"]:
    """The words of each output field. Raises ValueError unless all are of equally many rows."""
    columns = {field.name: unpack_int32(getattr(drawn, field.name)) for field in fields}
    num_rows = {len(columns[field.name]) / field.words for field in fields}
    if len(num_rows) > 1:
        lengths = ", ".join(f"{name} has {len(words)} words" for name, words in columns.items())
        raise ValueError(f"the columns of a step result are of different numbers of rows: {lengths}")
    return columns


# --- log-probabilities -------------------------------------------------------------------------------------------

LOGPROB_WORDS = 2 + 2 * MAX_LOGPROBS
"""On the device, of one row: the token's log-probability (the bits of a float32), its rank from 1 on, the ids of the
likeliest tokens, likeliest first, and their log-probabilities. Rows that nobody asks hold whatever was there."""

LOGPROBS = OutputField("logprobs", LOGPROB_WORDS)
"""Of each drawing row, behind OUTPUT_FIELDS: fetched from the device only where some row asks."""


def logprob_words(num_top: int) -> int:
    """The same in a message: with as many likeliest tokens as were asked for."""
    return 2 + 2 * num_top
