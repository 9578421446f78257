"""The cost model against times that follow its own formula, and against what it must refuse to believe."""

from random import Random

import pytest

from graphgen.ipc.attended import Attended
from graphgen.ipc.worker_messages import Bucket, BucketTime, StepTimeTable
from graphgen.scheduler.cost_model import CostModel

SMALL, LARGE, DECODE = Bucket(112, 16), Bucket(496, 16), Bucket(0, 16)
TABLE = StepTimeTable(
    times=(BucketTime(DECODE, 5.0), BucketTime(SMALL, 7.0), BucketTime(LARGE, 14.0)),
    decode_context=1000,
    prompt_start=500,
    ms_per_decode_position=1e-4,
    ms_per_prompt_pair=2e-6,
    ms_per_chunk_position=3e-4,
)
MEASURED = {bucket: Attended(16_000).with_chunk(500, bucket.prefill_rows) for bucket in (SMALL, LARGE, DECODE)}
MILLISECONDS = {time.bucket: time.milliseconds for time in TABLE.times}


def test_pairs_are_those_of_a_causal_mask() -> None:
    for start, length in ((0, 1), (0, 5), (7, 3), (500, 112)):
        pairs = sum(start + row + 1 for row in range(length))
        assert Attended(9, 1000, 20).with_chunk(start, length) == (9, 1000 + pairs, 20 + start + length)
    assert Attended(9).with_chunk(500, 0) == Attended(9), "no rows read nothing"


def test_the_measured_step_takes_the_measured_time_and_longer_contexts_take_longer() -> None:
    model = CostModel(TABLE)
    positions, pairs, chunks = MEASURED[SMALL]
    assert model.predict_ms(SMALL, MEASURED[SMALL]) == pytest.approx(7.0)
    assert model.predict_ms(SMALL, Attended(positions + 10_000, pairs, chunks)) == pytest.approx(8.0)
    assert model.predict_ms(SMALL, Attended(positions, pairs + 500_000, chunks)) == pytest.approx(8.0)
    assert model.predict_ms(SMALL, Attended(positions, pairs, chunks + 10_000)) == pytest.approx(10.0)
    assert model.predict_ms(DECODE, Attended()) == pytest.approx(3.4)
    assert model.predict_ms(Bucket(1, 1), Attended()) is None


def test_two_chunks_take_longer_than_one_that_attends_to_as_much() -> None:
    """Each reads the keys and values of its own request."""
    model = CostModel(TABLE)
    one, two = Attended(16_000).with_chunk(500, 112), Attended(16_000).with_chunk(500, 56).with_chunk(556, 56)
    assert one.prompt_pairs == two.prompt_pairs
    assert model.predict_ms(SMALL, two) == pytest.approx(7.0 + 3e-4 * 556)


def test_no_extrapolation_reaches_zero() -> None:
    steep = StepTimeTable((BucketTime(DECODE, 5.0),), 1000, 0, 1e-2, 0.0, 0.0)
    assert CostModel(steep).predict_ms(DECODE, Attended()) == pytest.approx(1.0)


def test_a_slower_device_is_believed_after_some_steps() -> None:
    model = CostModel(TABLE)
    for _ in range(200):
        model.correct(DECODE, MEASURED[DECODE], 6.0)
    assert model.predict_ms(DECODE, MEASURED[DECODE]) == pytest.approx(6.0, rel=0.01)
    assert model.predict_ms(SMALL, MEASURED[SMALL]) == pytest.approx(7.0)
    model.correct(DECODE, MEASURED[DECODE], -1.0)
    assert model.predict_ms(DECODE, MEASURED[DECODE]) == pytest.approx(6.0, rel=0.01)


def test_a_slower_clock_shows_in_buckets_that_did_not_run() -> None:
    """Steps with prompts share a pace, also one that falls again; what the table has wrong of one bucket does not."""
    model = CostModel(TABLE)
    for _ in range(400):
        for bucket in (SMALL, LARGE):
            model.correct(bucket, MEASURED[bucket], 1.1 * MILLISECONDS[bucket])
    for _ in range(40):
        model.correct(LARGE, MEASURED[LARGE], MILLISECONDS[LARGE])
    assert model.predict_ms(SMALL, MEASURED[SMALL]) == pytest.approx(7.0, rel=0.04)
    assert model.predict_ms(DECODE, MEASURED[DECODE]) == pytest.approx(5.0)
    for _ in range(2000):
        model.correct(SMALL, MEASURED[SMALL], 7.0)
        model.correct(LARGE, MEASURED[LARGE], 16.0)
    assert model.predict_ms(SMALL, MEASURED[SMALL]) == pytest.approx(7.0, rel=0.01)
    assert model.predict_ms(LARGE, MEASURED[LARGE]) == pytest.approx(16.0, rel=0.01)


def test_the_first_steps_of_a_bucket_count_most() -> None:
    """After as many as the table counts, more than half of its error is gone, not a fifth."""
    model = CostModel(TABLE)
    for _ in range(3):
        model.correct(DECODE, MEASURED[DECODE], 5.5)
    after = model.predict_ms(DECODE, MEASURED[DECODE])
    assert after is not None
    assert 5.25 < after < 5.5
    for _ in range(200):
        model.correct(DECODE, MEASURED[DECODE], 5.5)
    model.correct(DECODE, MEASURED[DECODE], 5.0)
    assert model.predict_ms(DECODE, MEASURED[DECODE]) == pytest.approx(5.5, rel=0.01)


def test_a_bound_leaves_room_for_what_is_not_known_yet() -> None:
    """More in a bucket that has not run than in one that has, and more where steps vary."""

    def room(model: CostModel, bucket: Bucket) -> float:
        bound, predicted = (f(bucket, MEASURED[bucket]) for f in (model.bound_ms, model.predict_ms))
        assert bound is not None
        assert predicted is not None
        return bound / predicted - 1.0

    steady, varying = CostModel(TABLE), CostModel(TABLE)
    assert room(steady, SMALL) == room(steady, LARGE) > 0.06
    for number in range(400):
        steady.correct(LARGE, MEASURED[LARGE], MILLISECONDS[LARGE])
        varying.correct(LARGE, MEASURED[LARGE], MILLISECONDS[LARGE] * (1.05 if number % 2 else 0.95))
    assert room(steady, LARGE) < 0.005
    assert room(steady, SMALL) == pytest.approx(0.06, abs=0.005)
    assert 0.09 < room(varying, LARGE) < 0.15
    assert steady.bound_ms(Bucket(1, 1), Attended()) is None


@pytest.mark.parametrize(("is_sure", "least", "most"), [(False, 0.93, 0.98), (True, 0.9985, 0.99999)])
def test_of_random_steps_the_bound_holds_so_many(is_sure: bool, least: float, most: float) -> None:
    """Of which one in twenty is much further off than the others."""
    model, random = CostModel(TABLE), Random(0)
    held = 0
    for _ in range(4000):
        measured = MILLISECONDS[LARGE] * random.gauss(1.0, 0.05 if random.random() < 0.05 else 0.02)
        bound = model.bound_ms(LARGE, MEASURED[LARGE], is_sure=is_sure)
        assert bound is not None
        held += measured <= bound
        model.correct(LARGE, MEASURED[LARGE], measured)
    assert least < held / 4000 < most


def test_a_stalled_host_takes_no_bucket_out_of_use() -> None:
    """A step that seemed a hundred times as long: a bucket thought slow would not run again and be corrected."""
    model = CostModel(TABLE)
    for _ in range(100):
        model.correct(DECODE, MEASURED[DECODE], 5.0)
    model.correct(DECODE, MEASURED[DECODE], 500.0)
    assert bound_of(model, DECODE) < 5.7
    for _ in range(4):  # not all steps say something of their bucket
        model.pass_over(DECODE)
    assert bound_of(model, DECODE) < 5.4


def bound_of(model: CostModel, bucket: Bucket, is_sure: bool = False) -> float:
    milliseconds = model.bound_ms(bucket, MEASURED[bucket], is_sure=is_sure)
    assert milliseconds is not None
    return milliseconds


def test_a_swing_of_the_clock_is_followed_and_soon_forgotten() -> None:
    """Also by steps of the other kind, which do not take part in it."""

    def room(bucket: Bucket) -> float:
        predicted_ms = model.predict_ms(bucket, MEASURED[bucket])
        assert predicted_ms is not None
        return bound_of(model, bucket) / predicted_ms

    model = CostModel(TABLE)
    for bucket in (LARGE, DECODE):
        for _ in range(100):
            model.correct(bucket, MEASURED[bucket], MILLISECONDS[bucket])
    steady = {bucket: room(bucket) for bucket in (LARGE, SMALL, DECODE)}
    model.correct(LARGE, MEASURED[LARGE], 1.1 * 14.0)
    assert model.predict_ms(LARGE, MEASURED[LARGE]) == pytest.approx(14.0, rel=0.01), "far steps are as ever"
    for bucket, swing in ((LARGE, 0.04), (SMALL, 0.04), (DECODE, 0.0)):
        more_doubt = room(bucket) / steady[bucket] / (1.0 + swing) - 1.0
        assert 0.0 < more_doubt < 0.02, "two fifths of it are expected once more"
    for _ in range(6):
        model.correct(DECODE, MEASURED[DECODE], 5.0)
    assert room(LARGE) < 1.01 * steady[LARGE]


def test_a_step_that_was_short_makes_no_bound_shorter_than_steps_are() -> None:
    """As after a device has idled."""
    model = CostModel(TABLE)
    for _ in range(100):
        model.correct(LARGE, MEASURED[LARGE], 14.0)
    model.correct(LARGE, MEASURED[LARGE], 0.85 * 14.0)
    assert bound_of(model, LARGE, is_sure=True) > 14.0


def test_where_a_clock_swings_as_many_steps_stay_within_the_bound() -> None:
    """Steps of which neighbours take longer together, as on a GPU at its power limit; planned two ahead."""
    model, random, swing = CostModel(TABLE), Random(0), 0.0
    planned, num_above = [99.0, 99.0], 0
    for _ in range(4000):
        swing = 0.75 * swing + random.gauss(0.0, 0.013)
        measured_ms = 14.0 * (1.0 + swing)
        num_above += measured_ms > planned.pop(0)
        model.correct(LARGE, MEASURED[LARGE], measured_ms)
        planned.append(bound_of(model, LARGE))
    assert 0.02 < num_above / 4000 < 0.05


def test_saturation_is_the_smallest_bucket_near_the_best_rate() -> None:
    model = CostModel(TABLE)
    assert model.saturation_rows([DECODE, SMALL, LARGE]) == LARGE.num_rows
    for _ in range(200):
        model.correct(SMALL, MEASURED[SMALL], 7.0)
        model.correct(LARGE, MEASURED[LARGE], 28.5)
    assert model.saturation_rows([DECODE, SMALL, LARGE]) == SMALL.num_rows
    assert model.saturation_rows([DECODE, SMALL, Bucket(64, 64)]) is None
    assert model.saturation_rows([DECODE]) is None


@pytest.mark.parametrize(
    ("small_ms", "current", "expected"),
    [
        # LARGE computes 496 / 14 prompt rows a ms; at 3.474 ms SMALL computes 0.91 of that.
        (3.46, None, SMALL),
        (3.49, None, LARGE),
        (3.42, LARGE, LARGE),
        (3.39, LARGE, SMALL),
        (3.53, SMALL, SMALL),
        (3.56, SMALL, LARGE),
    ],
)
def test_the_saturation_point_moves_only_when_another_is_clearly_better(
    small_ms: float, current: Bucket | None, expected: Bucket
) -> None:
    times = (BucketTime(SMALL, small_ms), BucketTime(LARGE, 14.0))
    model = CostModel(StepTimeTable(times, 1000, 500, 0.0, 0.0, 0.0))
    rows = None if current is None else current.num_rows
    assert model.saturation_rows([SMALL, LARGE], rows) == expected.num_rows


def test_what_is_learned_of_a_size_holds_for_its_buckets_that_have_not_run() -> None:
    """Of two buckets of 512 rows the one that never runs seemed the faster; both are as much slower than the table."""
    other = Bucket(480, 32)
    times = (BucketTime(SMALL, 3.6), BucketTime(LARGE, 14.0), BucketTime(other, 13.0))
    model = CostModel(StepTimeTable(times, 1000, 500, 0.0, 0.0, 0.0))
    assert model.saturation_rows([SMALL, LARGE, other]) == LARGE.num_rows
    for _ in range(200):
        model.correct(SMALL, Attended(), 3.6)
        model.correct(LARGE, Attended(), 16.0)
    assert model.saturation_rows([SMALL, LARGE, other], LARGE.num_rows) == SMALL.num_rows


@pytest.mark.parametrize("slower", [1.04, 1.25])
def test_the_saturation_point_stays_where_a_device_is_slower_than_its_table(slower: float) -> None:
    """Of both sizes alike, and one runs. By that one's own factor the other would seem the better."""
    for ran in (SMALL, LARGE):
        model = CostModel(StepTimeTable((BucketTime(SMALL, 3.46), BucketTime(LARGE, 14.0)), 1000, 500, 0.0, 0.0, 0.0))
        assert model.saturation_rows([SMALL, LARGE]) == SMALL.num_rows
        for _ in range(200):
            model.correct(ran, Attended(), slower * {SMALL: 3.46, LARGE: 14.0}[ran])
        assert model.saturation_rows([SMALL, LARGE]) == SMALL.num_rows
        assert model.saturation_rows([SMALL, LARGE], SMALL.num_rows) == SMALL.num_rows


def test_a_device_slower_than_its_table_makes_no_size_better_that_has_not_run() -> None:
    """Else steps grow because the larger ones were not tried yet."""
    model = CostModel(TABLE)
    before = model.prompt_rates([SMALL, LARGE], 16, 16_000)
    for _ in range(200):
        model.correct(SMALL, MEASURED[SMALL], 1.04 * MILLISECONDS[SMALL])
    after = model.prompt_rates([SMALL, LARGE], 16, 16_000)
    assert after[0] < 0.99 * before[0], "a part of it was meant to be taken for the bucket's own"
    assert after[1] / after[0] == pytest.approx(before[1] / before[0])
    for _ in range(200):
        model.correct(LARGE, MEASURED[LARGE], 1.2 * MILLISECONDS[LARGE])
    last = model.prompt_rates([SMALL, LARGE], 16, 16_000)
    assert last[1] / last[0] < 0.95 * after[1] / after[0], "of one that ran, its own time counts"


def test_without_a_table_it_learns_what_it_sees() -> None:
    model = CostModel()
    assert model.predict_ms(SMALL, Attended(1, 1, 1)) is None
    model.correct(SMALL, Attended(1, 1, 1), 9.0)
    assert model.predict_ms(SMALL, Attended(5000, 5000, 5000)) == pytest.approx(9.0)
