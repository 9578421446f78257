"""The waiting queue is always in order of arrival, whoever comes back or leaves."""

from hypothesis import given
from hypothesis import strategies as st

from graphgen.scheduler.request import Request
from graphgen.scheduler.waiting import WaitingQueue
from tests.scheduler.harness import make_submit


def request(arrival: int) -> Request:
    return Request(make_submit(arrival, [1]), arrival)


@given(st.data())
def test_the_queue_is_a_list_sorted_by_arrival(data: st.DataObject) -> None:
    queue, waiting, away = WaitingQueue(), list[Request](), list[Request]()
    for arrival in range(data.draw(st.integers(1, 12))):
        match data.draw(st.sampled_from(["leave", "return", "stay"])):
            case "leave" if waiting:
                left = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
                queue.remove(left)
                away.append(left)
            case "return" if away:
                back = away.pop(data.draw(st.integers(0, len(away) - 1)))
                queue.put_back(back)
                waiting = sorted([*waiting, back], key=lambda one: one.arrival)
        newest = request(arrival)
        queue.append(newest)
        waiting.append(newest)
        assert queue.first(100) == waiting
        assert queue.first(3) == waiting[:3]
        assert len(queue) == len(waiting)
        assert all(one in queue for one in waiting)
        assert not any(one in queue for one in away)
