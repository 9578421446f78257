"""The waiting queue is always in the order of service, whoever comes back or leaves."""

from hypothesis import given
from hypothesis import strategies as st

from graphgen.scheduler.request import AGEING_S, Request
from graphgen.scheduler.tenants import Tenant
from graphgen.scheduler.waiting import WaitingQueue
from tests.scheduler.harness import make_submit

LONG = 3


def request(
    arrival: int, priority: int = 0, arrived_s: float = 0.0, prompt_len: int = 1, ttft_target_ms: float | None = None
) -> Request:
    submit = make_submit(arrival, [1] * prompt_len, priority=priority, ttft_target_ms=ttft_target_ms)
    return Request(submit, arrival, arrived_s, page_size=4, tenant=Tenant("", LONG))


@given(st.data())
def test_the_queue_is_a_list_sorted_by_rank(data: st.DataObject) -> None:
    queue, waiting, away = WaitingQueue(LONG), list[Request](), list[Request]()
    now_s = 0.0
    for arrival in range(data.draw(st.integers(1, 12))):
        match data.draw(st.sampled_from(["leave", "return", "stay"])):
            case "leave" if waiting:
                left = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
                queue.remove(left)
                away.append(left)
            case "return" if away:
                back = away.pop(data.draw(st.integers(0, len(away) - 1)))
                queue.add(back)
                waiting.append(back)
        now_s += data.draw(st.sampled_from([0.0, 1.0, AGEING_S]))
        newest = request(
            arrival,
            data.draw(st.integers(0, 3)),
            now_s,
            data.draw(st.integers(1, 5)),
            data.draw(st.sampled_from([None, 500.0, 1e6])),
        )
        queue.add(newest)
        waiting = sorted([*waiting, newest], key=lambda one: one.rank)
        lanes = [[one for one in waiting if one.priority == priority] for priority in range(4)]
        short = [one for lane in lanes for one in [one for one in lane if len(one.tokens) < LONG][:3]]
        long = [one for lane in lanes for one in [one for one in lane if len(one.tokens) >= LONG][:2]]
        assert list(queue.first(100, 100)) == waiting
        assert list(queue.first(3, 2)) == sorted([*short, *long], key=lambda one: one.rank)
        assert len(queue) == len(waiting)
        assert queue.num_tokens == sum(len(one.tokens) for one in waiting)
        assert queue.num_tokens_from(2) == sum(len(one.tokens) for one in waiting if one.priority >= 2)
        assert queue.num_from(1) == sum(one.priority >= 1 for one in waiting)
        assert all(one in queue for one in waiting)
        assert not any(one in queue for one in away)


def test_tokens_that_arrive_while_a_preempted_request_waits_do_not_disturb_the_count() -> None:
    queue, preempted = WaitingQueue(LONG), request(0)
    queue.add(preempted)
    preempted.output.append(7)
    queue.remove(preempted)
    assert queue.num_tokens == 0


def test_the_order_of_service_is_class_then_due_time_then_arrival_and_a_class_is_worth_its_seconds() -> None:
    plain, later = request(0), request(1, arrived_s=1.0)
    due_soon, due_late = request(2, arrived_s=2.0, ttft_target_ms=3000.0), request(3, arrived_s=2.0, ttft_target_ms=1e6)
    high = request(4, priority=1, arrived_s=AGEING_S - 0.1)
    too_late = request(5, priority=1, arrived_s=AGEING_S + 0.1)
    queue = WaitingQueue(LONG)
    for one in (too_late, high, due_late, due_soon, later, plain):
        queue.add(one)
    assert list(queue.first(10, 10)) == [due_soon, high, plain, too_late, later, due_late]
