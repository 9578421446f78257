"""What a step gives: the live drawing rows of every field, whatever ran after it, and nothing of the padding."""

import numpy as np
import pytest
import torch

from graphgen.capture.stream import open_stream
from graphgen.ipc.codec import pack_int32, unpack_int32
from graphgen.ipc.step_schema import OUTPUT_FIELDS, OutputField, StepShape, unpack_columns
from graphgen.ipc.worker_messages import Bucket, Chunk, DrawnRows, StepPlan
from graphgen.models.sampling import NO_TOKEN
from graphgen.worker.outputs import OUTPUT_RING, OutputRing, StepOutputs, live_drawing_rows, output_layout

CPU = torch.device("cpu")
SHAPE = StepShape(Bucket(8, 4), num_chunks=3, num_new_pages=0)
PLAN = StepPlan(
    step_id=1,
    bucket=SHAPE.bucket,
    chunks=tuple(Chunk(slot=slot, start=0, length=2, draws=draws) for slot, draws in enumerate((True, False))),
    decode_slots=pack_int32([5, 6, 7]),
    planned_s=0.0,
)


def run(ring: OutputRing, values: dict[str, torch.Tensor], shape: StepShape = SHAPE) -> StepOutputs:
    """A step that writes these words of all its drawing rows."""
    stream = open_stream(CPU)
    row, views = ring.next_row(), ring.views(shape)
    for name, words in values.items():
        views[name][row] = words.flatten()
    fetched, outputs = ring.fetch(row, shape, live_drawing_rows(PLAN, shape), stream)
    fetched.wait()
    stream.close()
    return outputs


def test_live_rows_are_the_chunks_that_draw_and_then_the_decodes() -> None:
    assert live_drawing_rows(PLAN, SHAPE).tolist() == [0, 3, 4, 5]
    outputs = run(OutputRing(SHAPE, CPU), {"token_ids": torch.arange(10, 17)})
    drawn, failed = outputs.read()
    assert unpack_int32(drawn.token_ids).tolist() == [10, 13, 14, 15]
    assert failed == ()


def test_a_row_that_drew_nothing_is_told_by_its_place_among_the_live_ones() -> None:
    token_ids = torch.arange(10, 17)
    token_ids[[1, 4]] = NO_TOKEN  # row 1 is padding
    drawn, failed = run(OutputRing(SHAPE, CPU), {"token_ids": token_ids}).read()
    assert unpack_int32(drawn.token_ids).tolist() == [10, 13, 0, 15]
    assert failed == (2,)


def test_outputs_stay_until_as_many_steps_as_the_ring_has_rows_have_run() -> None:
    ring = OutputRing(SHAPE, CPU)
    kept = [run(ring, {"token_ids": torch.full((7,), number)}) for number in range(OUTPUT_RING)]
    tokens = [unpack_int32(outputs.read()[0].token_ids).tolist() for outputs in kept]
    assert tokens == [[number] * 4 for number in range(OUTPUT_RING)]


class RankedRows(DrawnRows, frozen=True, array_like=True, gc=False, kw_only=True):
    """Rows that bring one thing more."""

    ranks: bytes


def test_a_new_field_is_one_line_of_the_schema() -> None:
    """Two words a row, in a step with fewer drawing rows than the ring has room for."""
    fields = (*OUTPUT_FIELDS, OutputField("ranks", words=2))
    widest = StepShape(Bucket(8, 40), num_chunks=3, num_new_pages=0)
    assert output_layout(SHAPE, fields).offset("logprobs") == 3 * SHAPE.num_drawing_rows
    values = {"token_ids": torch.arange(10, 17), "ranks": torch.arange(14).view(7, 2)}
    drawn, _ = run(OutputRing(widest, CPU, fields), values).read(RankedRows)
    assert isinstance(drawn, RankedRows)
    columns = unpack_columns(drawn, fields)
    assert np.asarray(columns["token_ids"]).tolist() == [10, 13, 14, 15]
    assert np.asarray(columns["ranks"]).reshape(-1, 2).tolist() == [[0, 1], [6, 7], [8, 9], [10, 11]]
    torn = RankedRows(token_ids=drawn.token_ids, ranks=drawn.ranks[:-4])
    with pytest.raises(ValueError, match="ranks has 7 words"):
        unpack_columns(torn, fields)
