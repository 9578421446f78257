"""A worker group dies: what its requests keep, who is suspected, and who fails."""

import random

import pytest

from graphgen.ipc.errors import OverloadedError
from graphgen.launch.starts import MAX_STARTS
from graphgen.scheduler.trials import CLEARING_TOKENS, MAX_DEATHS, MAX_FRUITLESS, MAX_SHARED_FRUITLESS
from tests.scheduler.harness import Harness, Rows, make_limits, make_submit

MANY_PAGES = 400


def crowd(num_requests: int, steps_in_flight: int = 2, least_tokens: int = 4) -> Harness:
    harness = Harness(make_limits(num_pages=MANY_PAGES, steps_in_flight=steps_in_flight))
    for request_id in range(num_requests):
        prompt = [(7 * request_id + 3 * position) % 50 for position in range(3 + 5 * (request_id % 4))]
        harness.add(make_submit(request_id, prompt, max_tokens=least_tokens + request_id % 5))
    return harness


def run_with_poison(harness: Harness, loses_results: bool) -> tuple[int, list[int]]:
    """Runs until all have ended. loses_results: those of the steps before one that ends the worker do not arrive.
    (deaths, who failed)"""
    deaths, failed = 0, list[int]()
    for _ in range(5000):
        if harness.schedule() is not None:
            continue
        fatal = harness.fatal_steps()
        if not fatal:
            break
        if fatal[0] or (loses_results and any(fatal)):
            deaths += 1
            failed += harness.die()
            harness.renew()
        else:
            harness.deliver()
    return deaths, failed


@pytest.mark.parametrize("rows", ["any", "chunks", "decodes"])
@pytest.mark.parametrize("poison", [0, 5, 32])
@pytest.mark.parametrize(("steps_in_flight", "loses_results"), [(1, False), (2, False), (2, True)])
def test_one_request_that_kills_fails_alone_among_many(
    rows: Rows, poison: int, steps_in_flight: int, loses_results: bool
) -> None:
    """One that kills in its decode rows alone gets a token in each life, of its prompt that is computed again."""
    harness = crowd(33, steps_in_flight, least_tokens=MAX_DEATHS + 2)
    harness.senders[poison].kills_in = rows
    deaths, failed = run_with_poison(harness, loses_results)
    assert failed == [poison]
    if rows == "decodes" and not loses_results:
        assert deaths == MAX_DEATHS
    else:
        assert MAX_FRUITLESS <= deaths <= (MAX_DEATHS if rows == "decodes" else MAX_FRUITLESS)
    assert deaths <= MAX_STARTS
    assert harness.scheduler.counters.poisoned == 1
    harness.check_all_ended()


@pytest.mark.parametrize("seed", range(2))
def test_kills_at_random_moments_fail_nobody(seed: int) -> None:
    """As `tests.worker_deaths` does: each kill waits until every request has a new token. Whoever is served last has
    often had but that one."""
    rng = random.Random(seed)
    harness, left, num_kills = crowd(0), 0, 0
    while num_kills < 60:
        if not harness.scheduler.request_ids:
            for number in range(len(harness.senders), len(harness.senders) + 6):
                prompt = [number % 50 for _ in range(rng.choice([1, 9, 30]))]
                assert harness.add(make_submit(number, prompt, max_tokens=rng.randint(10, 30)))
        counts = {number: len(harness.senders[number].received) for number in harness.scheduler.request_ids}
        left = rng.randrange(12)  # steps after that
        while left and harness.scheduler.request_ids:
            while harness.schedule() is not None:
                pass
            harness.deliver()
            senders = [(harness.senders[number], count) for number, count in counts.items()]
            left -= all(not sender.is_live or len(sender.received) > count for sender, count in senders)
        if harness.scheduler.request_ids:
            num_kills += 1
            assert harness.die(rng.randrange(3)) == []
            harness.renew()
    harness.run()


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


def test_one_death_while_it_runs_alone_fails_nobody() -> None:
    """Whatever ends workers strikes those that are tried, since nobody else runs then."""
    harness = crowd(4)
    for _ in range(MAX_SHARED_FRUITLESS):
        while harness.schedule() is not None:
            pass
        assert harness.die() == []
        harness.renew()
    struck = list[int]()
    while harness.schedule() is not None and (tried := harness.scheduler._trials.tried) is not None:
        struck.append(tried.request_id)
        sender = harness.senders[tried.request_id]
        had = len(sender.received)
        assert harness.die() == []
        harness.renew()
        while len(sender.received) < had + CLEARING_TOKENS:
            assert harness.schedule() is not None
            assert harness.scheduler._trials.tried is tried, "the one that was interrupted is tried first"
            harness.deliver()
        while harness.results:
            harness.deliver()
    assert len(struck) > 1
    harness.run()


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


@pytest.mark.parametrize(("num_tokens", "most_deaths"), [(0, MAX_FRUITLESS), (1, MAX_DEATHS), (CLEARING_TOKENS, None)])
def test_new_tokens_clear_a_request_of_suspicion(num_tokens: int, most_deaths: int | None) -> None:
    """So many in each life."""
    harness = Harness(make_limits(num_pages=MANY_PAGES))
    harness.add(make_submit(0, [1, 2, 3], max_tokens=40))
    sender = harness.senders[0]
    for num_deaths in range(1, 11):  # far more than a request without new tokens survives
        had = len(sender.received)
        while len(sender.received) < had + num_tokens:
            assert harness.schedule() is not None
            harness.deliver()
        assert harness.schedule() is not None
        failed = harness.die()
        harness.renew()
        assert failed == ([0] if num_deaths == most_deaths else [])
        if failed:
            break
    assert sender.cancelled == (most_deaths is not None)
    harness.run()


def test_a_death_is_no_preemption_and_keeps_what_was_emitted() -> None:
    harness = crowd(4)
    for _ in range(6):
        while harness.schedule() is not None:
            pass
        harness.deliver()
    received = {request_id: list(sender.received) for request_id, sender in harness.senders.items()}
    assert any(received.values())
    preemptions = harness.scheduler.counters.preemptions
    harness.die()
    harness.renew()
    assert harness.scheduler.counters.preemptions == preemptions
    assert all(one.num_preemptions == 0 for one in harness.scheduler._requests.values())
    harness.run()
    for request_id, sender in harness.senders.items():
        assert sender.received[: len(received[request_id])] == received[request_id]


@pytest.mark.parametrize("num_steps", [6, 9, 14])
def test_streams_that_were_served_go_on_after_as_few_steps_as_their_tokens_take(num_steps: int) -> None:
    """Nobody who still waited for a slot comes before them, and no step leaves prompt rows empty."""
    harness = crowd(12, least_tokens=12)
    for _ in range(num_steps):
        while harness.schedule() is not None:
            pass
        harness.deliver()
    served = [one.request.request_id for one in harness.scheduler._life.running if one.decode_row is not None]
    assert served
    assert harness.scheduler.waiting, "others wait for a slot"
    assert harness.die() == []
    harness.renew()
    had = {request_id: len(harness.senders[request_id].received) for request_id in served}
    num_tokens = sum(len(harness.senders[request_id].prompt) + count for request_id, count in had.items())
    most_rows = max(bucket.prefill_rows for bucket in harness.limits.buckets)
    steps = 0
    while any(len(harness.senders[request_id].received) == count for request_id, count in had.items()):
        while harness.schedule() is not None:
            pass
        harness.deliver()
        steps += 1
    assert steps <= -(-num_tokens // most_rows) + 1
    harness.run()


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
