"""A worker group dies: what its requests keep, who is suspected, and who fails."""

import pytest

from graphgen.ipc.errors import OverloadedError
from graphgen.scheduler.trials import MAX_DEATHS
from tests.scheduler.harness import Harness, make_limits, make_submit

MANY_PAGES = 400


def crowd(num_requests: int, steps_in_flight: int = 2) -> Harness:
    harness = Harness(make_limits(num_pages=MANY_PAGES, steps_in_flight=steps_in_flight))
    for request_id in range(num_requests):
        prompt = [(7 * request_id + 3 * position) % 50 for position in range(3 + 5 * (request_id % 4))]
        harness.add(make_submit(request_id, prompt, max_tokens=4 + request_id % 5))
    return harness


def run_with_poison(harness: Harness, poison: int) -> tuple[int, list[int]]:
    """Runs until all have ended; every plan with rows of `poison` kills the group. (deaths, who failed)"""
    deaths, failed = 0, list[int]()
    for _ in range(5000):
        plan = harness.schedule()
        if plan is not None:
            ids = [entry[0] for entry in harness.descriptions[-1].chunks]
            if poison in (*ids, *harness.descriptions[-1].decode_request_ids):
                deaths += 1
                failed += harness.die(num_delivered=0)
                harness.renew()
            continue
        if not harness.results:
            break
        harness.deliver()
    return deaths, failed


@pytest.mark.parametrize("poison", [0, 5, 32])
@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_one_request_that_kills_fails_alone_at_its_third_death(poison: int, steps_in_flight: int) -> None:
    harness = crowd(33, steps_in_flight=steps_in_flight)
    deaths, failed = run_with_poison(harness, poison)
    assert (deaths, failed) == (MAX_DEATHS, [poison])
    assert harness.scheduler.counters.poisoned == 1
    harness.check_all_ended()


def test_suspects_run_alone_and_the_others_go_on_when_all_are_tried() -> None:
    harness = crowd(4)
    for _ in range(2):
        while harness.schedule() is not None:
            pass
        harness.die()
        harness.renew()
    suspects = {one.request_id for one in harness.scheduler._requests.values() if one.num_deaths == 2}
    assert len(suspects) > 1
    first_plan = len(harness.descriptions)
    harness.run()
    order: list[set[int]] = []
    for description in harness.descriptions[first_plan:]:
        order.append({entry[0] for entry in description.chunks} | set(description.decode_request_ids))
    alone = [ids for ids in order if len(ids) == 1]
    assert {request_id for ids in alone for request_id in ids} >= suspects
    assert order[: len(suspects)] == alone[: len(suspects)], "somebody ran beside a suspect"


@pytest.mark.parametrize("end", ["cancel", "expire"])
def test_a_suspect_that_ends_holds_nobody_back(end: str) -> None:
    harness = Harness(make_limits(num_pages=MANY_PAGES))
    harness.add(make_submit(0, [1, 2, 3], max_tokens=5, deadline_ms=60_000.0))
    harness.add(make_submit(1, [4, 5, 6], max_tokens=5))
    for _ in range(2):
        assert harness.schedule() is not None
        harness.die()
        harness.renew()
    assert harness.schedule() is not None
    if end == "cancel":
        harness.cancel(0)
    else:
        harness.now_s = 100.0
        assert harness.expire() == [0]
    harness.run()


def test_a_new_token_clears_a_request_of_suspicion() -> None:
    harness = Harness(make_limits(num_pages=MANY_PAGES))
    harness.add(make_submit(0, [1, 2, 3], max_tokens=40))
    client = harness.clients[0]
    for num_tokens in range(1, 11):  # far more deaths than a request without new tokens survives
        while len(client.received) < num_tokens:
            assert harness.schedule() is not None
            harness.deliver()
        assert harness.schedule() is not None
        assert harness.die() == []
        harness.renew()
    harness.run()


def test_a_death_is_no_preemption_and_keeps_what_was_emitted() -> None:
    harness = crowd(4)
    for _ in range(6):
        while harness.schedule() is not None:
            pass
        harness.deliver()
    received = {request_id: list(client.received) for request_id, client in harness.clients.items()}
    assert any(received.values())
    preemptions = harness.scheduler.counters.preemptions
    harness.die()
    harness.renew()
    assert harness.scheduler.counters.preemptions == preemptions
    assert all(one.num_preemptions == 0 for one in harness.scheduler._requests.values())
    harness.run()
    for request_id, client in harness.clients.items():
        assert client.received[: len(received[request_id])] == received[request_id]


def test_the_queue_limit_does_not_refuse_those_who_return() -> None:
    harness = Harness(make_limits(num_pages=MANY_PAGES, max_waiting=1))
    for request_id in range(4):
        assert harness.add(make_submit(request_id, [1 + request_id, 2, 3], max_tokens=6))
        assert harness.schedule() is not None
        harness.deliver()
    assert harness.scheduler.waiting == 0
    harness.die()
    assert harness.scheduler.waiting == 4
    with pytest.raises(OverloadedError):
        harness.scheduler.add(make_submit(9, [1], max_tokens=2))
    harness.renew()
    harness.run()


def test_requests_come_and_go_while_no_worker_serves() -> None:
    harness = crowd(3)
    assert harness.schedule() is not None
    harness.die()
    assert harness.add(make_submit(10, [1, 2, 3], max_tokens=4))
    assert harness.add(make_submit(11, [1, 2, 3], max_tokens=4, deadline_ms=1000.0))
    harness.cancel(0)
    harness.now_s = 2.0
    assert harness.expire() == [11]
    harness.renew()
    harness.run()


def test_nothing_of_the_old_cache_is_found_by_the_new_life() -> None:
    harness = Harness(make_limits(num_pages=MANY_PAGES))
    prompt = list(range(12))
    harness.add(make_submit(0, prompt, max_tokens=3))
    harness.run()
    harness.die()
    harness.renew()
    harness.add(make_submit(1, prompt, max_tokens=3))
    harness.run()
    assert harness.scheduler.counters.prefix_hits == 0


def test_results_of_an_earlier_life_do_not_fit() -> None:
    harness = crowd(2)
    plan = harness.schedule()
    assert plan is not None
    harness.die()
    harness.renew()
    with pytest.raises(ValueError, match="arrived"):
        harness.scheduler.update(plan.step_id, [1, 2])


def test_the_epoch_counts_lives_and_step_ids_go_on() -> None:
    harness = crowd(2)
    first = harness.schedule()
    assert first is not None
    assert harness.scheduler.epoch == 0
    harness.die()
    assert harness.scheduler.epoch == 1
    harness.scheduler.renew(None)
    harness.is_dead = False
    again = harness.schedule()
    assert again is not None
    assert again.step_id > first.step_id
    harness.run()
