"""Layers with windows: what a request holds and shares of each page group, and that the rest is free for others."""

import itertools

import pytest

from graphgen.ipc.errors import InvalidRequestError
from graphgen.ipc.worker_messages import Bucket
from graphgen.scheduler.page_groups import PageGroups
from graphgen.scheduler.policy import Scheduler
from graphgen.scheduler.request import RunningRequest
from tests.scheduler.harness import Harness, make_limits, make_submit

PAGE = 4
WIDE = (Bucket(0, 4), Bucket(16, 4))


def open_harness(windows: tuple[int | None, ...], num_pages: int = 60, **limits: int) -> Harness:
    return Harness(
        make_limits(
            windows=windows,
            num_pages=num_pages,
            page_size=PAGE,
            buckets=WIDE,
            token_budget=20,
            max_model_len=200,
            **limits,  # type: ignore[arg-type]  # all others are ints
        )
    )


def prompt(length: int, own: int = 0) -> list[int]:
    return [(own + 3 * position) % 50 for position in range(length)]


def running(harness: Harness) -> RunningRequest:
    (one,) = harness.scheduler._life.running
    return one


def held(harness: Harness) -> list[tuple[int, int]]:
    """Of the one running request, in each group: the first entry of its block table that it holds, and how many."""
    return [(table.first, len(table.pages)) for table in running(harness).tables]


def step(harness: Harness) -> None:
    harness.schedule()
    harness.deliver()


def cached(harness: Harness, request_id: int) -> int:
    return min(start for step in harness.descriptions for one, start, _ in step.chunks if one == request_id)


@pytest.mark.parametrize("window", [1, 3, 4, 5, 6, 8, 9])
def test_a_decode_holds_the_pages_that_its_rows_see_and_no_other(window: int) -> None:
    harness = open_harness((None, window), steps_in_flight=1)
    harness.add(make_submit(0, prompt(30), 40))
    for _ in range(4):
        step(harness)  # 16 positions, 14, and one each
    for position in range(32, 60):
        step(harness)  # computes this position
        oldest = (position - position % PAGE - window + 1) // PAGE  # that the first row of its page sees
        full, windowed = held(harness)
        assert full == (0, position // PAGE + 1)
        assert windowed == (oldest, position // PAGE + 1 - oldest), f"at position {position}"
        assert harness.scheduler.pages_free == 60 - full[1] - windowed[1]
    harness.run()


def test_a_prompt_of_many_windows_fits_into_the_pages_of_few() -> None:
    """Chunks of 16, a window of 8: 2 pages of the window, 4 of the chunk, and one more for a copied page."""
    harness = open_harness((8,), num_pages=7)
    harness.add(make_submit(0, prompt(150), 30))
    while harness.scheduler.running or harness.scheduler.waiting:
        step(harness)
        if harness.scheduler.running:
            assert held(harness)[0][1] <= 7
    harness.check_all_ended()


def test_what_can_never_fit_is_told_by_what_it_holds_at_once() -> None:
    scheduler = Scheduler(open_harness((None, 8), num_pages=20).limits)
    scheduler.add(make_submit(0, prompt(40), 13))  # 13 pages of all positions and 7 of the window
    with pytest.raises(InvalidRequestError, match="together they take 21 pages of 4 positions, the KV cache has 20"):
        scheduler.add(make_submit(1, prompt(40), 14))


def test_the_window_before_a_cached_end_is_enough_to_go_on_there() -> None:
    harness = open_harness((None, 6))
    harness.add(make_submit(0, prompt(40), 8))
    harness.run()
    harness.add(make_submit(1, [*harness.senders[0].prompt, *harness.senders[0].drawn, 7, 7, 7], 4))
    harness.schedule()
    assert cached(harness, 1) == 46, "11 pages, and what was known of the twelfth when it ended"
    assert harness.pages.num_copies == 1
    found = harness.scheduler._life.cache.find(running(harness).request.chain, 11)
    assert [len(pages) for pages in found.tables] == [11, 2]
    harness.run()


def test_where_the_window_is_gone_nothing_is_shared_although_all_other_pages_are_there() -> None:
    """15 pages of all positions leave 9 of 24 for the 15 of the windows: the first of these are overwritten."""
    for shared_len, num_cached in ((20, 0), (44, 44)):
        harness = open_harness((None, 6), num_pages=24)
        harness.add(make_submit(0, prompt(60), 1))
        harness.run()
        harness.add(make_submit(1, [*prompt(shared_len), 9, 9, 9], 1))
        harness.schedule()
        assert cached(harness, 1) == num_cached
        harness.run()


def test_a_prompt_goes_on_at_the_last_end_that_every_group_has() -> None:
    harness = open_harness((None, 6))
    harness.add(make_submit(0, prompt(60), 1))
    harness.run()
    cache, tokens = harness.scheduler._life.cache, [*prompt(60), 1]
    scheduler = Scheduler(harness.limits)
    scheduler.add(make_submit(0, tokens, 1))
    chain = next(iter(scheduler._requests.values())).chain
    found = cache.find(chain, 15)
    assert found.num_pages == 15
    lost = cache.find(chain, 15).tables[1][0]
    cache._forget((lost,))
    assert cache.find(chain, 15).num_pages == 13, "the page that is lost is the fourteenth"
    assert [len(pages) for pages in cache.find(chain, 15).tables] == [13, 2]


def test_windows_of_several_requests_that_share_a_beginning_all_move_on() -> None:
    """When they leave the shared pages, no page becomes free until the last has left, and each needs its own."""
    harness = open_harness((None, 9), num_pages=64, max_chunks=4)
    shared = prompt(24)
    harness.add(make_submit(0, shared, 2))
    harness.run()
    for request_id in range(1, 5):
        harness.add(make_submit(request_id, [*shared, *prompt(12, request_id)], 20))
    harness.run()
    assert all(cached(harness, request_id) == 24 for request_id in range(1, 5))


def test_a_request_that_was_preempted_goes_on_at_its_last_window() -> None:
    harness = open_harness((None, 6), num_pages=40, steps_in_flight=1)
    harness.add(make_submit(0, prompt(30), 30))
    for _ in range(20):
        step(harness)
    harness.scheduler._life.preemption.preempt(running(harness))
    num_tokens = 30 + len(harness.senders[0].received)
    harness.schedule()
    start = harness.descriptions[-1].chunks[0][1]
    assert num_tokens - start <= PAGE, "its pages are still there"
    harness.run()


@pytest.mark.parametrize("page_size", [1, 3, 4])
def test_tables_end_where_the_next_chunk_ends_and_no_later(page_size: int) -> None:
    for longest_chunk, num_tokens in itertools.product((1, 4, 8), range(1, 30)):
        groups = PageGroups((5, None), page_size, longest_chunk)
        for start in range(num_tokens):
            ends_by_length = {position // page_size + 1 for position in range(start, num_tokens)[:longest_chunk]}
            assert groups.chunk_end(start, num_tokens) == max(ends_by_length)
            # A request that starts in the middle of a page has copied the beginning of it.
            windowed, whole = groups.start_ends(start // page_size, num_tokens, None)
            assert max(ends_by_length) <= windowed <= whole == (num_tokens - 1) // page_size + 1
