"""Every client's turn comes as often as any other's, and nobody has more than its share."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphgen.ipc.errors import OverloadedError
from graphgen.server.frontend.turns import FairQueue, RateLimit, Shares

pushes = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3)), max_size=40)


@given(pushes)
def test_no_client_is_two_turns_ahead_of_another_that_waits(pushed: list[tuple[str, int]]) -> None:
    queue: FairQueue[tuple[str, int, int]] = FairQueue()
    for number, (client, priority) in enumerate(pushed):
        queue.push(client, (client, priority, number), priority)
    left = Counter(client for client, _ in pushed)
    turns: Counter[str] = Counter()
    popped = []
    while (item := queue.pop(lambda client: True)) is not None:
        popped.append(item)
        turns[item[0]] += 1
        left[item[0]] -= 1
        waiting = [client for client, count in left.items() if count]
        assert all(turns[item[0]] - turns[client] <= 1 for client in waiting)
    assert len(popped) == len(pushed)
    assert len(queue) == 0
    for client in "abcd":
        own = [(-priority, number) for name, priority, number in popped if name == client]
        assert own == sorted(own), "highest priority first, then the oldest"


@given(pushes, st.integers(0, 39))
def test_what_is_discarded_does_not_come(pushed: list[tuple[str, int]], chosen: int) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    items = [(client, number) for number, (client, _) in enumerate(pushed)]
    for (client, priority), item in zip(pushed, items, strict=True):
        queue.push(client, item, priority)
    if chosen < len(items):
        assert queue.discard(items[chosen][0], items[chosen])
        assert not queue.discard(items[chosen][0], items[chosen])
    popped = []
    while (left := queue.pop(lambda client: True)) is not None:
        popped.append(left)
    assert sorted(popped) == sorted(item for number, item in enumerate(items) if number != chosen)


def test_a_client_that_may_not_take_keeps_its_turn() -> None:
    queue: FairQueue[str] = FairQueue()
    for client in "aab":
        queue.push(client, client)
    assert queue.pop(lambda client: client != "a") == "b"
    assert queue.pop(lambda client: client != "a") is None
    assert [queue.pop(lambda client: True), queue.pop(lambda client: True)] == ["a", "a"]


def test_shares_are_counted_to_the_last() -> None:
    shares = Shares(open_requests=2, open_prompt_tokens=100, total_prompt_tokens=150)
    shares.open_request("a")
    shares.open_request("a")
    with pytest.raises(OverloadedError, match=r"2 open requests, the limit is 2"):
        shares.open_request("a")
    shares.open_request("b")
    shares.add_prompt("a", 100)
    with pytest.raises(OverloadedError, match=r"101 prompt tokens, the limit is 100"):
        shares.add_prompt("a", 1)
    with pytest.raises(OverloadedError, match=r"more than 150"):
        shares.add_prompt("b", 51)
    shares.add_prompt("b", 50)
    shares.close_request("a", 100)
    shares.open_request("a")
    shares.add_prompt("a", 100)


@given(st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 50)), max_size=50))
def test_no_more_is_received_than_the_rate_allows(turns: list[tuple[float, int]]) -> None:
    limit = RateLimit(per_s=100.0, burst=20, now_s=0.0)
    now_s, taken = 0.0, 0
    for gap_s, wanted in turns:
        now_s += gap_s
        taken += limit.take(wanted, now_s)
        assert taken <= 20 + 100 * now_s + 1e-6


def test_a_message_that_costs_more_is_paid_for_later() -> None:
    limit = RateLimit(per_s=100.0, burst=20, now_s=0.0)
    assert limit.take(1, 0.0) == 1
    limit.spend(100)
    assert limit.take(5, 0.5) == 0
    assert limit.take(5, 1.0) == 5
