"""Every client's turn comes as often as any other's, and nobody has more than its share."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphgen.ipc.errors import InvalidRequestError, OverloadedError
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
    while (item := queue.pop(lambda client, item: True)) is not None:
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


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 16)), max_size=60))
def test_clients_are_served_the_same_number_of_samples(pushed: list[tuple[str, int]]) -> None:
    """Whatever their requests' sizes are: no client that waits is behind another by more than the largest request."""
    queue: FairQueue[int] = FairQueue()
    for client, size in pushed:
        queue.push(client, size, size=size)
    left = Counter(client for client, _ in pushed)
    served: Counter[str] = Counter()
    taken: list[str] = []

    def note(client: str, item: int) -> bool:
        taken.append(client)
        return True

    while (item := queue.pop(note)) is not None:
        client = taken[-1]
        served[client] += item
        left[client] -= 1
        waiting = [one for one, count in left.items() if count]
        assert all(served[client] - served[one] <= 16 for one in waiting)
    assert len(taken) == len(pushed)


def test_a_request_that_may_not_be_taken_yet_holds_its_client_up_and_no_other() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", "large", size=16)
    queue.push("a", "small")
    queue.push("b", "other")
    assert queue.pop(lambda client, item: item != "large") == "other"
    assert queue.pop(lambda client, item: item != "large") is None
    assert queue.pop(lambda client, item: True) == "large"


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
    while (left := queue.pop(lambda client, item: True)) is not None:
        popped.append(left)
    assert sorted(popped) == sorted(item for number, item in enumerate(items) if number != chosen)


def test_a_client_that_may_not_take_keeps_its_turn() -> None:
    queue: FairQueue[str] = FairQueue()
    for client in "aab":
        queue.push(client, client)
    assert queue.pop(lambda client, item: client != "a") == "b"
    assert queue.pop(lambda client, item: client != "a") is None
    assert [queue.pop(lambda client, item: True), queue.pop(lambda client, item: True)] == ["a", "a"]


def test_shares_are_counted_to_the_last() -> None:
    shares = Shares(open_requests=2, open_prompt_tokens=100, total_prompt_tokens=150)
    shares.open_request("a", 1)
    shares.open_request("a", 1)
    with pytest.raises(OverloadedError, match=r"2 open requests, the limit is 2"):
        shares.open_request("a", 1)
    shares.open_request("b", 1)
    shares.add_prompt("a", 100)
    with pytest.raises(OverloadedError, match=r"101 prompt tokens, the limit is 100"):
        shares.add_prompt("a", 1)
    with pytest.raises(OverloadedError, match=r"more than 150"):
        shares.add_prompt("b", 51)
    shares.add_prompt("b", 50)
    shares.close_request("a", 1, 100)
    shares.open_request("a", 1)
    shares.add_prompt("a", 100)


def test_a_request_counts_as_often_as_it_has_samples() -> None:
    shares = Shares(open_requests=20, open_prompt_tokens=100, total_prompt_tokens=150)
    shares.open_request("a", 16)
    with pytest.raises(OverloadedError, match=r"16 open requests, the limit is 20, .*samples \(n\)"):
        shares.open_request("a", 5)
    shares.open_request("a", 4)
    shares.close_request("a", 16, 0)
    shares.open_request("a", 16)
    assert shares.num_open == 20
    with pytest.raises(InvalidRequestError, match=r"n is 21, .* 20 samples: lower n"):
        shares.open_request("b", 21)


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
