"""How many engines a cluster gets: rules that hold for every load, and a burst in virtual time."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphgen.cluster.scaling import Load, Scaling, ScalingLimits
from graphgen.ipc.errors import ConfigError

LOOK_S = 1.0
loads = st.none() | st.builds(
    Load, st.integers(0, 5000), st.integers(0, 500), st.floats(0, 1), st.integers(0, 12), st.integers(1, 300)
)
limits = st.integers(1, 6).flatmap(
    lambda least: st.builds(
        ScalingLimits,
        least=st.just(least),
        most=st.integers(least, 12),
        waiting_per_engine=st.integers(1, 50),
        up_after_s=st.floats(0, 10),
        down_after_s=st.floats(0, 100),
    )
)
UNDELAYED = ScalingLimits(least=1, most=3, waiting_per_engine=35, up_after_s=0.0, down_after_s=0.0)
DOUBLING = ScalingLimits(least=1, most=12, waiting_per_engine=1)


@given(limits, st.integers(0, 30), st.lists(loads, max_size=200), st.floats(0, 200))
def test_the_number_stays_within_its_limits_and_never_more_than_doubles(
    limits: ScalingLimits, first: int, loads: list[Load | None], cold_start_s: float
) -> None:
    scaling = Scaling(limits, first)
    scaling.engine_started(cold_start_s)
    numbers = [scaling.num_engines]
    numbers += [scaling.decide(number * LOOK_S, load).num_engines for number, load in enumerate(loads)]
    assert all(limits.least <= number <= limits.most for number in numbers)
    assert all(before - 1 <= after <= 2 * before for before, after in pairwise(numbers))


@given(limits, st.integers(1, 12), st.lists(loads, max_size=200))
def test_what_waits_is_never_answered_with_fewer_engines(
    limits: ScalingLimits, first: int, loads: list[Load | None]
) -> None:
    scaling = Scaling(limits, first)
    for number, load in enumerate(loads):
        before = scaling.num_engines
        after = scaling.decide(number * LOOK_S, load).num_engines
        assert after >= before or (load is not None and not load.num_waiting)
        assert after == before or load is not None


@settings(max_examples=50)
@example(UNDELAYED, 10, 0.0, 84, 47, 0)  # no queue has said yet how many requests an engine can run
@example(DOUBLING, 6, 0.0, 72, 10, 0)  # the queue is long enough for twice the engines, which would be too many
@example(DOUBLING, 1, 0.0, 70, 40, 20)  # it is as long until another engine serves, and three would be too many
@given(limits, st.integers(1, 12), st.floats(0, 1), st.integers(0, 100), st.integers(1, 50), st.integers(0, 20))
def test_a_constant_load_comes_to_rest(
    limits: ScalingLimits, first: int, kv_share: float, num_open: int, num_slots: int, start_looks: int
) -> None:
    """However many engines there are, they share the same requests. kv_share: of a cache that a full engine's hold.
    start_looks: from the decision until an engine serves."""
    scaling = Scaling(limits, first)
    scaling.engine_started(max(1, start_looks) * LOOK_S)
    numbers = [scaling.num_engines]
    for number in range(2500):
        serving = min(numbers[-start_looks - 1 :])
        running = min(num_open, num_slots * serving)
        load = Load(num_open - running, running, kv_share * running / num_slots / serving, serving, num_slots)
        numbers.append(scaling.decide(number * LOOK_S, load).num_engines)
    turns = [b - a for a, b in pairwise(numbers) if a != b]
    assert len({turn > 0 for turn in turns}) <= 1, "it goes up or down, never both"
    assert len(set(numbers[-500:])) == 1


@given(limits, st.integers(1, 12))
def test_nothing_to_do_leads_to_the_least_number(limits: ScalingLimits, first: int) -> None:
    scaling = Scaling(limits, first)
    scaling.engine_started(1.0)
    for number in range(2000):
        scaling.decide(number * LOOK_S, Load(0, 0, 0.0, scaling.num_engines, 1))
    assert scaling.num_engines == limits.least


def test_a_queue_adds_engines_once_while_they_start() -> None:
    scaling = Scaling(ScalingLimits(least=1, most=8, waiting_per_engine=10, up_after_s=2.0), 2)
    numbers = [scaling.decide(second, Load(35, 9, 0.5, 2, 32)).num_engines for second in range(60)]
    assert numbers[:3] == [2, 2, 4], "after up_after_s as many as 35 waiting ones need"
    assert set(numbers[2:]) == {4}, "the two that start are enough for this queue"


def test_a_queue_that_grows_gets_what_it_will_need_when_they_serve() -> None:
    """5 more a second, 20 s until another engine serves: 100 more than the 21 by then."""
    scaling = Scaling(ScalingLimits(least=1, most=64, waiting_per_engine=10, up_after_s=2.0), 8)
    scaling.engine_started(20.0)
    grown = [scaling.decide(second, Load(81 + 5 * second, 9, 0.5, 8, 32)).num_engines for second in range(3)]
    assert grown == [8, 8, 16], "16 are the double; 20 would be needed"


def test_a_queue_that_is_gone_before_an_engine_serves_adds_none() -> None:
    scaling = Scaling(ScalingLimits(least=1, most=8, waiting_per_engine=10, up_after_s=2.0), 1)
    scaling.engine_started(60.0)
    for second in range(40):
        assert scaling.decide(second, Load(200 - 5 * second, 9, 0.5, 1, 32)).num_engines == 1


def test_a_moment_of_pressure_adds_nothing() -> None:
    scaling = Scaling(ScalingLimits(least=1, most=8, waiting_per_engine=10, up_after_s=3.0), 1)
    for second in range(60):
        waits = 100 if second % 3 else 0  # never for 3 s at a stretch
        assert scaling.decide(second, Load(waits, 9, 0.5, 1, 32)).num_engines == 1


def test_full_caches_add_one_engine() -> None:
    scaling = Scaling(ScalingLimits(least=1, most=8, up_after_s=2.0), 2)
    decided = [scaling.decide(second, Load(0, 9, 0.9, 2, 32)) for second in range(10)]
    assert [one.num_engines for one in decided] == [2, 2, *[3] * 8]
    assert decided[2].reason == "90% of the KV caches are held"


def test_an_engine_that_was_slow_to_start_is_kept_longer() -> None:
    def quiet_s(cold_start_s: float) -> int:
        scaling = Scaling(ScalingLimits(least=1, most=4, down_after_s=30.0), 2)
        scaling.engine_started(cold_start_s)
        return next(second for second in range(999) if scaling.decide(second, Load(0, 9, 0.1, 2, 32)).num_engines == 1)

    assert quiet_s(cold_start_s=5.0) == 30
    assert quiet_s(cold_start_s=100.0) == 300


def test_what_the_others_could_not_hold_keeps_an_engine() -> None:
    scaling = Scaling(ScalingLimits(least=1, most=4, down_after_s=5.0), 3)
    scaling.engine_started(1.0)
    for second in range(100):
        scaling.decide(second, Load(0, 9, 0.41, 3, 32))  # 0.615 of two caches
    assert scaling.num_engines == 3
    for second in range(100, 106):
        scaling.decide(second, Load(0, 9, 0.39, 3, 32))
    assert scaling.num_engines == 2


def test_engines_that_find_no_place_are_given_up_when_nothing_waits() -> None:
    scaling = Scaling(ScalingLimits(least=1, most=4, down_after_s=5.0), 4)
    scaling.engine_started(1.0)
    for second in range(40):
        scaling.decide(second, Load(0, 9, 0.5, 1, 32))
    assert scaling.num_engines == 1, "the one that serves is enough"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"least": 0, "most": 2}, "least number of engines is 0"),
        ({"least": 3, "most": 2}, "is 3 and the most 2"),
        ({"least": 1, "most": 2, "spare_kv": 0.95}, "0.95"),
        ({"least": 1, "most": 2, "down_after_s": -1.0}, "down_after_s is -1"),
        ({"least": 1, "most": 2, "waiting_per_engine": 0}, "waiting_per_engine is 0"),
    ],
)
def test_limits_that_cannot_be_met_are_refused(values: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ScalingLimits(**values)  # type: ignore[arg-type]


def test_a_burst_is_served_by_more_engines_which_go_again() -> None:
    """10 minutes of 30 requests a second where one engine serves 10, between hours of 4 a second; engines start in
    45 s."""
    served_per_s, cold_start_s = 10.0, 45.0
    scaling = Scaling(ScalingLimits(least=1, most=8), 1)
    starts: list[float] = []  # when each engine that was asked for serves
    queue, numbers, queues = 0.0, [], []
    for second in range(3 * 3600):
        arrivals = 30.0 if 3600 <= second < 4200 else 4.0
        serving = 1 + sum(ready_s <= second for ready_s in starts)
        queue = max(0.0, queue + arrivals - served_per_s * serving)
        busy = 1.0 if queue else arrivals / (served_per_s * serving)
        load = Load(int(queue), int(32 * busy * serving), 0.8 * busy, serving, 32)
        number = scaling.decide(second, load).num_engines
        while len(starts) < number - 1:
            starts.append(second + cold_start_s)
            scaling.engine_started(cold_start_s)
        del starts[number - 1 :]
        numbers.append(number)
        queues.append(queue)
    first_up = next(second for second, number in enumerate(numbers) if number > 1)
    assert first_up <= 3600 + 5, "within seconds of the burst"
    assert max(numbers) >= 3, "as many as 30 a second need"
    assert max(queues[: 3600 + 100]) < 20 * 60, "what gathers while the first ones start"
    assert not any(queues[3600 + 100 :]), "and is gone soon after, for good"
    turns = [after - before for before, after in pairwise(numbers) if before != after]
    ups = [turn for turn in turns if turn > 0]
    assert turns == ups + [-1] * sum(ups), "up in few steps, then down one by one: nothing goes to and fro"
    assert len(ups) <= 3
    assert numbers[-1] == 1
