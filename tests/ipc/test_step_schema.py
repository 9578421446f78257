"""The schema of a step and the messages that carry it say the same."""

from graphgen.ipc.codec import pack_int32
from graphgen.ipc.step_schema import INPUT_FIELDS, OUTPUT_FIELDS, live_entries
from graphgen.ipc.worker_messages import Bucket, Chunk, DrawnRows, StepPlan

PLAN = StepPlan(
    step_id=1,
    bucket=Bucket(4, 2),
    chunks=(Chunk(slot=3, start=16, length=2, draws=True), Chunk(slot=1, start=0, length=1, draws=False)),
    chunk_token_ids=pack_int32([7, 8, 9]),
    decode_slots=pack_int32([0]),
    decode_positions=pack_int32([5]),
    new_pages=pack_int32([0, 3, 1, 40, 1, 1, 0, 41]),
    page_copies=pack_int32([30, 40]),
    scored_rows=pack_int32([2, 77, 4]),
    planned_s=0.0,
)


def test_live_entries_are_those_of_the_plan() -> None:
    assert live_entries(PLAN, "chunk_slots") == [(3,), (1,)]
    assert live_entries(PLAN, "chunk_draws") == [(True,), (False,)]
    assert live_entries(PLAN, "new_pages") == [(0, 3, 1, 40), (1, 1, 0, 41)]
    assert live_entries(PLAN, "page_copies") == [(30, 40)]
    assert live_entries(PLAN, "scored_rows") == [(2, 77, 4)]
    assert (PLAN.num_tokens, PLAN.num_decodes, PLAN.num_drawing_rows) == (4, 1, 2)


def test_all_bytes_of_a_plan_reach_the_device() -> None:
    packed = {name for name in StepPlan.__struct_fields__ if isinstance(getattr(PLAN, name), bytes)}
    packed.remove("redrawn")  # which few steps have: `graphgen.worker.redraw_copies` brings it beside the block
    assert packed == {field.name for field in INPUT_FIELDS} & {*StepPlan.__struct_fields__}
    for name in packed:
        assert pack_int32(word for entry in live_entries(PLAN, name) for word in entry) == getattr(PLAN, name)


def test_every_output_field_has_a_column_in_the_result() -> None:
    assert tuple(field.name for field in OUTPUT_FIELDS) == DrawnRows.__struct_fields__
