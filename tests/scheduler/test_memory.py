"""Nothing of a request stays when it has ended, however it ended, in an engine that idles from then on."""

import gc
import sys
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

import pytest

from graphgen.scheduler.plan import StepRecord
from graphgen.scheduler.policy import Scheduler
from graphgen.scheduler.request import Request, RunningRequest
from tests.scheduler.harness import Harness, make_limits, make_sender, make_submit

NUM_REQUESTS = 24
LONG_OUTPUT = 40
FAR_MS = 1e8


@pytest.fixture(autouse=True)
def _no_collections() -> Iterator[None]:
    """What only a collection would find counts as kept: the scheduler's process makes none for a long time."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def num_kept() -> int:
    kinds = (Request, RunningRequest, StepRecord)
    return sum(isinstance(one, kinds) for one in gc.get_objects())


def prompt(request_id: int) -> list[int]:
    return [request_id % 5, 3, 1 + request_id % 7]


def stop_early(harness: Harness, request_id: int) -> None:
    second = make_sender(make_submit(request_id, prompt(request_id), 2)).drawn[1]
    harness.add(make_submit(request_id, prompt(request_id), LONG_OUTPUT, stop=[second], deadline_ms=FAR_MS))
    harness.run()


def end_at_length(harness: Harness, request_id: int) -> None:
    harness.add(make_submit(request_id, prompt(request_id), 6, ttft_target_ms=100.0))
    harness.run()


def cancel_it(harness: Harness, request_id: int) -> None:
    harness.add(make_submit(request_id, prompt(request_id), LONG_OUTPUT, deadline_ms=FAR_MS, itl_target_ms=50.0))
    for _ in range(request_id % 4):  # in its prompt, with tokens in flight, in its output
        harness.schedule()
    harness.cancel(request_id)
    harness.run()


def miss_its_deadline(harness: Harness, request_id: int) -> None:
    harness.add(make_submit(request_id, prompt(request_id), LONG_OUTPUT, arrived_s=harness.now_s, deadline_ms=500.0))
    for _ in range(request_id % 4):
        harness.schedule()
    harness.now_s += 1.0
    harness.expire()
    harness.run()


def preempt_each_other(harness: Harness, request_id: int) -> None:
    """The larger ones stop early: they are computed again and still end long before their last possible step."""
    last = make_sender(make_submit(request_id, prompt(request_id), 20)).drawn[19]
    harness.add(make_submit(request_id, prompt(request_id), LONG_OUTPUT, stop=[last]))
    if request_id % 4 == 3:
        harness.run()


ENDS: list[Callable[[Harness, int], None]] = [
    stop_early,
    end_at_length,
    cancel_it,
    miss_its_deadline,
    preempt_each_other,
]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: str(end.__name__))
def test_ended_requests_are_not_kept_in_an_idle_engine(end: Callable[[Harness, int], None]) -> None:
    before = num_kept()
    harness = Harness(make_limits())
    for request_id in range(NUM_REQUESTS):
        end(harness, request_id)
    if end is preempt_each_other:
        assert harness.scheduler.counters.preemptions > 0
    assert num_kept() == before
    assert harness.scheduler.next_deadline_s is None, "it wakes for a request that has ended"


def footprint(scheduler: Scheduler) -> int:
    """Bytes of all that a scheduler reaches."""
    seen: set[int] = set()
    todo: list[object] = [scheduler]
    num_bytes = 0
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)):
            continue
        seen.add(id(one))
        num_bytes += sys.getsizeof(one)
        todo.extend(gc.get_referents(one))
    return num_bytes


def test_no_container_of_the_scheduler_grows_with_ended_requests() -> None:
    harness = Harness(make_limits())
    sizes = []
    for rounds in range(3):
        for request_id in range(rounds * 200, (rounds + 1) * 200):
            ENDS[request_id % len(ENDS)](harness, request_id)
            harness.run()
        sizes.append(footprint(harness.scheduler))
    assert sizes[2] - sizes[1] < 200 * 8, f"{sizes} bytes after 200, 400 and 600 requests"
