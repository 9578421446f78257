"""The page pool: a page has the holders that were given it, and mistakes are errors at once."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from graphgen.scheduler.pages import PagePool

NUM_PAGES = 8


def pool_of(num_pages: int) -> PagePool:
    return PagePool(num_pages, on_reuse=lambda pages: None)


def test_all_pages_can_be_taken_once() -> None:
    pool = pool_of(5)
    assert sorted(pool.take(2) + pool.take(3)) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0


def test_taking_more_than_is_free_takes_nothing() -> None:
    pool = pool_of(3)
    with pytest.raises(ValueError, match="4 pages were asked for, 3 of 3 are free"):
        pool.take(4)
    assert pool.num_free == 3


def test_a_page_given_back_twice_is_an_error() -> None:
    pool = pool_of(3)
    pages = pool.take(2)
    pool.give_back(pages[:1])
    with pytest.raises(ValueError, match=f"page {pages[0]} is given back once too often"):
        pool.give_back(pages[:1])
    assert pool.num_free == 2


@pytest.mark.parametrize("page", [-1, 3, 99])
def test_a_page_of_another_pool_is_an_error(page: int) -> None:
    pool = pool_of(3)
    pool.take(3)
    with pytest.raises(ValueError, match=f"page {page} is given back, the pool has pages 0 to 2"):
        pool.give_back([page])


def test_an_empty_page_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="page 1 is to be shared, but nothing holds or keeps it"):
        pool_of(3).share([1])


def test_idle_pages_are_handed_out_last_and_the_least_recently_used_first() -> None:
    reused: list[int] = []
    pool = PagePool(4, on_reuse=reused.extend)
    first, second, third, fourth = pool.take(4)
    pool.keep([first, second, third])
    pool.give_back([second, first, third, fourth])
    pool.share([second])
    pool.give_back([second])
    assert pool.num_free == 4
    assert pool.num_idle == 3
    assert pool.take(1) == [fourth]
    assert reused == []
    assert pool.take(3) == [first, third, second]
    assert reused == [first, third, second]


class AnyUse(RuleBasedStateMachine):
    """Against a list of holders and a list of idle pages, kept by brute force."""

    def __init__(self) -> None:
        super().__init__()
        self.reused: list[int] = []
        self.pool = PagePool(NUM_PAGES, on_reuse=self.reused.extend)
        self.holds: list[list[int]] = []
        self.kept: set[int] = set()
        self.idle: list[int] = []

    @rule(count=st.integers(0, 4))
    def take(self, count: int) -> None:
        if count > self.pool.num_free:
            return
        self.reused.clear()
        held = {page for hold in self.holds for page in hold}
        num_empty = NUM_PAGES - len(held) - len(self.idle)
        pages = self.pool.take(count)
        assert not held & set(pages)
        assert self.reused == self.idle[: len(self.reused)], "idle pages go in order"
        assert len(self.reused) == max(0, count - num_empty), "empty pages go first"
        assert set(self.reused) == set(pages) & set(self.idle), "an idle page is reported when it is handed out"
        self.kept -= set(self.reused)
        del self.idle[: len(self.reused)]
        self.holds.append(pages)

    @rule(count=st.integers(0, NUM_PAGES))
    def make_empty(self, count: int) -> None:
        held = {page for hold in self.holds for page in hold}
        num_empty = NUM_PAGES - len(held) - len(self.idle)
        self.reused.clear()
        self.pool.make_empty(count)
        assert self.reused == self.idle[: max(0, count - num_empty)]
        self.kept -= set(self.reused)
        del self.idle[: len(self.reused)]

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        hold = self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1)))
        self.pool.give_back(hold)
        left = {page for other in self.holds for page in other}
        self.idle += [page for page in hold if page in self.kept and page not in left]

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        hold = data.draw(st.sampled_from(self.holds))
        self.pool.keep(hold)
        self.kept |= set(hold)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        pages = sorted({page for hold in self.holds for page in hold} | set(self.idle))
        if pages:
            page = data.draw(st.sampled_from(pages))
            self.pool.share([page])
            self.holds.append([page])
            if page in self.idle:
                self.idle.remove(page)

    @invariant()
    def counts_agree(self) -> None:
        holders = Counter(page for hold in self.holds for page in hold)
        assert [self.pool.num_holders(page) for page in range(NUM_PAGES)] == [
            holders[page] for page in range(NUM_PAGES)
        ]
        assert self.pool.num_free == NUM_PAGES - len(holders)
        assert self.pool.num_idle == len(self.idle)


TestAnyUse = AnyUse.TestCase
TestAnyUse.settings = settings(max_examples=100, stateful_step_count=30)
