"""The page pool: every page has at most one holder, and mistakes are errors at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphgen.scheduler.pages import PagePool


def test_all_pages_can_be_taken_once() -> None:
    pool = PagePool(5)
    assert sorted(pool.take(2) + pool.take(3)) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0


def test_taking_more_than_is_free_takes_nothing() -> None:
    pool = PagePool(3)
    with pytest.raises(ValueError, match="4 pages were asked for, 3 of 3 are free"):
        pool.take(4)
    assert pool.num_free == 3


def test_a_page_given_back_twice_is_an_error() -> None:
    pool = PagePool(3)
    pages = pool.take(2)
    pool.give_back(pages[:1])
    with pytest.raises(ValueError, match=f"page {pages[0]} is given back twice"):
        pool.give_back(pages[:1])
    assert pool.num_free == 2


@pytest.mark.parametrize("page", [-1, 3, 99])
def test_a_page_of_another_pool_is_an_error(page: int) -> None:
    pool = PagePool(3)
    pool.take(3)
    with pytest.raises(ValueError, match=f"page {page} is given back, the pool has pages 0 to 2"):
        pool.give_back([page])


def test_a_page_that_was_never_taken_is_an_error() -> None:
    with pytest.raises(ValueError, match="page 1 is given back twice"):
        PagePool(3).give_back([1])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=60))
def test_no_page_is_lost_or_handed_out_twice(calls: list[tuple[bool, int]]) -> None:
    pool, held = PagePool(10), list[int]()
    for takes, count in calls:
        if takes and count <= pool.num_free:
            held += pool.take(count)
        elif not takes:
            pool.give_back(held[:count])
            held = held[count:]
        assert len(set(held)) == len(held)
        assert len(held) + pool.num_free == 10
    pool.give_back(held)
    assert sorted(pool.take(10)) == list(range(10))
