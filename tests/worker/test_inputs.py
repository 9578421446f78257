"""What a plan becomes in the input block: live words in place, padding everywhere else, no word too many."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from graphgen.ipc.codec import pack_int32
from graphgen.ipc.messages import Bucket, Chunk, SamplerParams, SlotInit, StepPlan
from graphgen.worker.inputs import InputShape, input_layout, pack_plan

SHAPE = InputShape(max_chunks=3, trash_slot=9, pages_per_slot=4, params_width=2)
BUCKET = Bucket(8, 4)
INIT = SlotInit(5, 0, (), SamplerParams())


def pack(plan: StepPlan, garbage: int) -> tuple[dict[str, list[int]], int, object]:
    """The block as the device will see it, packed over what an earlier step left there."""
    layout = input_layout(SHAPE.any_plan(plan.bucket), SHAPE)
    block = np.full(layout.num_words, garbage, np.int32)
    num_words, lengths = pack_plan(plan, layout, SHAPE, block, 3, lambda init: np.array([7, init.prompt_len], np.int32))
    return {name: view.tolist() for name, view in layout.host_views(block).items()}, num_words, lengths


@given(st.integers(-(2**31), 2**31 - 1))
def test_nothing_of_an_earlier_step_is_left_where_the_device_reads(garbage: int) -> None:
    chunks = (Chunk(2, 0, 5, True, INIT), Chunk(4, 16, 2, False, None))
    plan = StepPlan(
        1,
        BUCKET,
        chunks,
        pack_int32(range(10, 17)),
        pack_int32([0, 1]),
        pack_int32([30, 3]),
        pack_int32([2, 0, 55, 0, 1, 56]),
        pack_int32([54, 55]),
        0.0,
    )
    fields, num_words, lengths = pack(plan, garbage)
    assert fields["counts"] == [7, 2, 3]
    assert fields["chunk_slots"] == [2, 4, 9]
    assert fields["chunk_positions"] == [0, 16, 0]
    assert fields["chunk_starts"] == [0, 5, 7, 7]
    assert fields["chunk_samples"] == [1, 0, 0]
    assert fields["chunk_inits"] == [1, 0, 0]
    assert fields["slot_params"][:2] == [7, 5]
    assert fields["chunk_token_ids"] == [10, 11, 12, 13, 14, 15, 16, 0]
    assert fields["decode_slots"] == [0, 1, 9, 9]
    assert fields["decode_positions"] == [30, 3, 0, 0]
    assert fields["page_copies"][:2] == [54, 55]
    assert fields["new_pages"][:6] == [2, 0, 55, 0, 1, 56]
    assert num_words == sum(len(view) for name, view in fields.items() if name != "new_pages") + 6
    assert lengths.chunk_starts.tolist() == [0, 5, 7, 7]  # type: ignore[attr-defined]  # RegionLengths
    assert lengths.chunk_kv_lens.tolist() == [5, 18, 0]  # type: ignore[attr-defined]
    assert lengths.decode_kv_lens.tolist() == [31, 4, 1, 1]  # type: ignore[attr-defined]


def test_a_decode_bucket_has_no_chunks_and_a_page_for_every_row() -> None:
    positions = [63, 127, 191, 255]
    triples = [number for slot in range(4) for number in (slot, slot + 1, 90 + slot)]
    plan = StepPlan(
        1, Bucket(0, 4), (), b"", pack_int32(range(4)), pack_int32(positions), pack_int32(triples), b"", 0.0
    )
    fields, _, lengths = pack(plan, garbage=-1)
    assert fields["chunk_starts"] == [0]
    assert fields["chunk_slots"] == fields["slot_params"] == fields["chunk_token_ids"] == []
    assert fields["new_pages"] == triples
    assert lengths.decode_kv_lens.tolist() == [64, 128, 192, 256]  # type: ignore[attr-defined]


def test_every_chunk_may_bring_a_whole_block_table() -> None:
    triples = [number for slot in range(3) for index in range(4) for number in (slot, index, 4 * slot + index)]
    chunks = tuple(Chunk(slot, 0, 2, False, INIT) for slot in range(3))
    plan = StepPlan(1, BUCKET, chunks, pack_int32([1] * 6), b"", b"", pack_int32(triples), b"", 0.0)
    fields, _, _ = pack(plan, garbage=-1)
    assert fields["new_pages"][: len(triples)] == triples
