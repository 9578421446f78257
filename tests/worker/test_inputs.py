"""What a plan becomes in the input block: live words in place, padding everywhere else, no word too many."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from graphgen.ipc.codec import pack_int32
from graphgen.ipc.step_schema import (
    INPUT_FIELDS,
    MAX_SCORED_ROWS,
    SCORED_ROW_WORDS,
    InputField,
    Padding,
    StepBounds,
    of_chunks,
)
from graphgen.ipc.worker_messages import Bucket, Chunk, SamplerParams, SlotInit, StepPlan
from graphgen.worker.inputs import InputPacker, RegionLengths, input_layout

BOUNDS = StepBounds(max_chunks=3, trash_slot=9, num_groups=1, most_pages=4, params_width=2)
BUCKET = Bucket(8, 4)
INIT = SlotInit(5, 0, (), SamplerParams())


def pack(
    plan: StepPlan, garbage: int, fields: tuple[InputField, ...] = INPUT_FIELDS
) -> tuple[dict[str, list[int]], int, RegionLengths]:
    """The block as the device will see it, packed over what an earlier step left there."""
    layout = input_layout(BOUNDS.any_plan(plan.bucket), BOUNDS, fields)
    packer = InputPacker(BOUNDS, lambda init: np.array([7, init.prompt_len], np.int32), fields)
    block = np.full(layout.num_words, garbage, np.int32)
    num_words, lengths = packer.pack(plan, layout, block, output_row=3)
    packed = {name: view.tolist() for name, view in layout.host_views(block).items()}
    block.fill(garbage)  # the next step, while attention still plans from the lengths of this one
    return packed, num_words, lengths


@given(st.integers(-(2**31), 2**31 - 1))
def test_nothing_of_an_earlier_step_is_left_where_the_device_reads(garbage: int) -> None:
    plan = StepPlan(
        step_id=1,
        bucket=BUCKET,
        chunks=(
            Chunk(slot=2, start=0, length=5, draws=True, init=INIT),
            Chunk(slot=4, start=16, length=2, draws=False),
        ),
        chunk_token_ids=pack_int32(range(10, 17)),
        decode_slots=pack_int32([0, 1]),
        decode_positions=pack_int32([30, 3]),
        new_pages=pack_int32([0, 2, 0, 55, 0, 0, 1, 56]),
        page_copies=pack_int32([54, 55]),
        scored_rows=pack_int32([5, 99, 1]),
        planned_s=0.0,
    )
    fields, num_words, lengths = pack(plan, garbage)
    assert list(fields) == [
        *("counts", "scored_rows", "chunk_slots", "chunk_positions", "chunk_starts", "chunk_draws", "chunk_inits"),
        *("slot_params", "chunk_token_ids", "decode_slots", "decode_positions", "page_copies", "new_pages"),
    ], "captured graphs and kernels read the fields in this order"
    assert fields["counts"] == [7, 2, 3]
    assert fields["scored_rows"] == [5, 99, 1] + [0] * SCORED_ROW_WORDS * (MAX_SCORED_ROWS - 1)
    assert fields["chunk_slots"] == [2, 4, 9]
    assert fields["chunk_positions"] == [0, 16, 0]
    assert fields["chunk_starts"] == [0, 5, 7, 7]
    assert fields["chunk_draws"] == [1, 0, 0]
    assert fields["chunk_inits"] == [1, 0, 0]
    assert fields["slot_params"][:2] == [7, 5]
    assert fields["chunk_token_ids"] == [10, 11, 12, 13, 14, 15, 16, 0]
    assert fields["decode_slots"] == [0, 1, 9, 9]
    assert fields["decode_positions"] == [30, 3, 0, 0]
    assert fields["page_copies"][:2] == [54, 55]
    assert fields["new_pages"][:8] == [0, 2, 0, 55, 0, 0, 1, 56]
    assert num_words == sum(len(view) for name, view in fields.items() if name != "new_pages") + 8
    assert lengths.chunk_starts.tolist() == [0, 5, 7, 7]
    assert lengths.chunk_kv_lens.tolist() == [5, 18, 0]
    assert lengths.decode_kv_lens.tolist() == [31, 4, 1, 1]


def test_a_decode_bucket_has_no_chunks_and_a_page_for_every_row() -> None:
    entries = [number for slot in range(4) for number in (0, slot, slot + 1, 90 + slot)]
    plan = StepPlan(
        step_id=1,
        bucket=Bucket(0, 4),
        decode_slots=pack_int32(range(4)),
        decode_positions=pack_int32([63, 127, 191, 255]),
        new_pages=pack_int32(entries),
        planned_s=0.0,
    )
    fields, _, lengths = pack(plan, garbage=-1)
    assert fields["chunk_starts"] == [0]
    assert fields["chunk_slots"] == fields["slot_params"] == fields["chunk_token_ids"] == []
    assert fields["new_pages"] == entries
    assert lengths.decode_kv_lens.tolist() == [64, 128, 192, 256]


def test_every_chunk_may_bring_a_whole_block_table() -> None:
    entries = [number for slot in range(3) for index in range(4) for number in (0, slot, index, 4 * slot + index)]
    plan = StepPlan(
        step_id=1,
        bucket=BUCKET,
        chunks=tuple(Chunk(slot=slot, start=0, length=2, draws=False, init=INIT) for slot in range(3)),
        chunk_token_ids=pack_int32([1] * 6),
        new_pages=pack_int32(entries),
        planned_s=0.0,
    )
    fields, _, _ = pack(plan, garbage=-1)
    assert fields["new_pages"][: len(entries)] == entries


class AdapterChunk(Chunk, frozen=True, array_like=True, gc=False, kw_only=True):
    """A chunk that says one thing more."""

    adapter: int


def test_a_new_field_is_one_line_of_the_schema() -> None:
    line = InputField("chunk_adapters", lambda step, bounds: step.num_chunks, Padding.TRASH_SLOT, of_chunks("adapter"))
    plan = StepPlan(
        step_id=1,
        bucket=BUCKET,
        chunks=(AdapterChunk(slot=2, start=0, length=5, draws=True, init=INIT, adapter=6),),
        chunk_token_ids=pack_int32(range(5)),
        new_pages=pack_int32([0, 2, 0, 55]),
        planned_s=0.0,
    )
    before, num_words_before, _ = pack(plan, garbage=-1)
    fields, num_words, _ = pack(plan, -1, (*INPUT_FIELDS[:3], line, *INPUT_FIELDS[3:]))
    assert fields.pop("chunk_adapters") == [6, 9, 9]
    assert fields == before, "the others are what they were"
    assert num_words == num_words_before + 3
