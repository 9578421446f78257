"""The cost model against times that follow its own formula, and against what it must refuse to believe."""

import pytest

from graphgen.ipc.messages import Bucket, BucketTime, StepTimeTable
from graphgen.scheduler.cost_model import CostModel, prompt_pairs

SMALL, LARGE, DECODE = Bucket(112, 16), Bucket(496, 16), Bucket(0, 16)
TABLE = StepTimeTable(
    times=(BucketTime(DECODE, 5.0), BucketTime(SMALL, 7.0), BucketTime(LARGE, 14.0)),
    decode_context=1000,
    prompt_start=500,
    ms_per_decode_position=1e-4,
    ms_per_prompt_pair=2e-6,
)


def test_pairs_are_those_of_a_causal_mask() -> None:
    for start, length in ((0, 1), (0, 5), (7, 3), (500, 112)):
        assert prompt_pairs(start, length) == sum(start + row + 1 for row in range(length))


def test_the_measured_step_takes_the_measured_time_and_longer_contexts_take_longer() -> None:
    model = CostModel(TABLE)
    measured = prompt_pairs(500, 112)
    assert model.predict_ms(SMALL, 16_000, measured) == pytest.approx(7.0)
    assert model.predict_ms(SMALL, 26_000, measured) == pytest.approx(8.0)
    assert model.predict_ms(SMALL, 16_000, measured + 500_000) == pytest.approx(8.0)
    assert model.predict_ms(DECODE, 0, 0) == pytest.approx(3.4)
    assert model.predict_ms(Bucket(1, 1), 0, 0) is None


def test_no_extrapolation_reaches_zero() -> None:
    steep = StepTimeTable((BucketTime(DECODE, 5.0),), 1000, 0, 1e-2, 0.0)
    assert CostModel(steep).predict_ms(DECODE, 0, 0) == pytest.approx(1.0)


def test_a_slower_device_is_believed_after_some_steps() -> None:
    model = CostModel(TABLE)
    for _ in range(200):
        model.correct(DECODE, 16_000, 0, 6.0)
    assert model.predict_ms(DECODE, 16_000, 0) == pytest.approx(6.0, rel=0.01)
    assert model.predict_ms(SMALL, 16_000, prompt_pairs(500, 112)) == pytest.approx(7.0)
    model.correct(DECODE, 16_000, 0, -1.0)
    assert model.predict_ms(DECODE, 16_000, 0) == pytest.approx(6.0, rel=0.01)


def test_the_first_steps_of_a_bucket_count_most() -> None:
    """After as many as the table counts, half of its error is gone, not a sixth."""
    model = CostModel(TABLE)
    for _ in range(3):
        model.correct(DECODE, 16_000, 0, 5.5)
    assert model.predict_ms(DECODE, 16_000, 0) == pytest.approx(5.25, rel=0.005)
    for _ in range(200):
        model.correct(DECODE, 16_000, 0, 5.5)
    model.correct(DECODE, 16_000, 0, 5.0)
    assert model.predict_ms(DECODE, 16_000, 0) == pytest.approx(5.5, rel=0.01)


def test_a_stalled_host_takes_no_bucket_out_of_use() -> None:
    """A step that seemed a hundred times as long: a bucket thought slow would not run again and be corrected."""
    model = CostModel(TABLE)
    for _ in range(100):
        model.correct(DECODE, 16_000, 0, 5.0)
    model.correct(DECODE, 16_000, 0, 500.0)
    after = model.predict_ms(DECODE, 16_000, 0)
    assert after is not None
    assert after * (1.0 + model.margin) < 5.3


def test_saturation_is_the_smallest_bucket_near_the_best_rate() -> None:
    model = CostModel(TABLE)
    assert model.saturation_rows([DECODE, SMALL, LARGE]) == LARGE.num_rows
    for _ in range(200):
        model.correct(LARGE, 16_000, prompt_pairs(500, 496), 27.0)
    assert model.saturation_rows([DECODE, SMALL, LARGE]) == SMALL.num_rows
    assert model.saturation_rows([DECODE, SMALL, Bucket(64, 64)]) is None
    assert model.saturation_rows([DECODE]) is None


def test_without_a_table_it_learns_what_it_sees() -> None:
    model = CostModel()
    assert model.predict_ms(SMALL, 1, 1) is None
    model.correct(SMALL, 1, 1, 9.0)
    assert model.predict_ms(SMALL, 5000, 5000) == pytest.approx(9.0)
