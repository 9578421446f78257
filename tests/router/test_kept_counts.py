"""A sum over engines that end, begin anew and cannot be asked for a while."""

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from graphgen.ipc.engine_messages import EngineStats
from graphgen.router.engine_stats import sum_of
from graphgen.router.kept_counts import KeptCounts
from tests.fakes import STATS

Counts = tuple[int, int]
ENGINES = (0, 1, 2)


def stats_of(counts: Counts) -> EngineStats:
    return replace(STATS, steps=counts[0], finished=counts[1])


def summed(kept: KeptCounts, told: dict[int, Counts]) -> Counts:
    found = {number: stats_of(counts) for number, counts in told.items()}
    total = sum_of(list(found.values()), kept.take(found))
    return total.steps, total.finished


class World:
    """Engines that count, and the sum as it is told."""

    def __init__(self) -> None:
        self.kept = KeptCounts()
        self.counts: dict[int, Counts] = {}
        self.total = self.done = (0, 0)

    def work(self, number: int, steps: int, finished: int) -> None:
        before = self.counts.get(number, (0, 0))
        self.counts[number] = before[0] + steps, before[1] + finished
        self.done = self.done[0] + steps, self.done[1] + finished

    def ask(self, away: frozenset[int] = frozenset()) -> None:
        before = self.total
        self.total = summed(self.kept, {one: counts for one, counts in self.counts.items() if one not in away})
        assert before[0] <= self.total[0], "a sum fell"
        assert before[1] <= self.total[1], "a sum fell"

    def end(self, number: int) -> None:
        self.ask()  # so that nothing is lost that nobody was told of
        self.counts[number] = (0, 0)
        self.ask()

    def remove(self, number: int) -> None:
        self.ask()
        self.counts.pop(number, None)
        self.kept.remove(number)


ENGINE = st.sampled_from(ENGINES)
EVENTS = st.one_of(
    st.tuples(st.just("work"), ENGINE, st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.just("ask"), st.frozensets(ENGINE)),
    st.tuples(st.sampled_from(["end", "remove"]), ENGINE),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_no_sum_falls_and_what_was_told_once_stays_in_it(events: list[tuple[object, ...]]) -> None:
    world = World()
    for name, *arguments in events:
        getattr(world, str(name))(*arguments)
    world.ask()
    assert world.total == world.done


def test_an_engine_that_is_away_is_counted_once_when_it_is_back() -> None:
    kept = KeptCounts()
    assert summed(kept, {0: (5, 1), 1: (7, 0)}) == (12, 1)
    assert summed(kept, {1: (8, 0)}) == (13, 1)
    assert summed(kept, {0: (6, 1), 1: (8, 0)}) == (14, 1)


def test_one_count_that_falls_is_a_new_beginning() -> None:
    kept = KeptCounts()
    summed(kept, {0: (5, 1)})
    assert summed(kept, {0: (6, 0)}) == (11, 1)
    assert summed(kept, {0: (6, 0)}) == (11, 1), "its earlier life is added once"


def test_another_engine_of_a_number_may_have_counted_more() -> None:
    kept = KeptCounts()
    summed(kept, {0: (5, 1)})
    kept.remove(0)
    assert summed(kept, {0: (9, 9)}) == (14, 10)
