"""What planning costs, and what the policy drags into its process."""

import subprocess
import sys
import time
from statistics import median

import pytest

from graphgen.ipc.worker_messages import Bucket
from graphgen.scheduler.policy import Scheduler
from tests.scheduler.harness import make_limits, make_submit

LADDER = tuple(Bucket(p, d) for p in (0, 128, 256, 512) for d in (16, 64, 256))


def crowded(num_waiting: int, each_a_tenant: bool = False) -> Scheduler:
    """64 requests that decode, and a queue whose head does not fit: every plan looks at the queue in vain."""
    scheduler = Scheduler(
        make_limits(
            buckets=LADDER,
            num_pages=64 * 8,
            page_size=16,
            num_slots=65,
            max_chunks=64,
            token_budget=768,
            max_model_len=8192,
        )
    )
    for request_id in range(64):
        scheduler.add(make_submit(request_id, [request_id] * 8, 1000, tenant=str(request_id) if each_a_tenant else ""))
    for request_id in range(64, 64 + num_waiting):
        scheduler.add(make_submit(request_id, [1] * 7800, 1, tenant=str(request_id) if each_a_tenant else ""))
    step(scheduler)
    assert scheduler.waiting == num_waiting
    return scheduler


def step(scheduler: Scheduler) -> float:
    """Seconds for one plan and its result."""
    start = time.perf_counter()
    plan = scheduler.schedule(0.0)
    assert plan is not None
    scheduler.update(plan.step_id, [1] * plan.num_drawing_rows)
    scheduler.prepare()
    return time.perf_counter() - start


@pytest.mark.alone
def test_a_plan_costs_the_same_however_many_requests_wait() -> None:
    few, many = crowded(20), crowded(4000)
    pairs = [(step(few), step(many)) for _ in range(80)]
    assert median(cost for _, cost in pairs) < 2 * median(cost for cost, _ in pairs)


@pytest.mark.alone
def test_a_plan_costs_the_same_however_many_tenants_wait() -> None:
    few, many = crowded(100, each_a_tenant=True), crowded(4000, each_a_tenant=True)
    pairs = [(step(few), step(many)) for _ in range(80)]
    assert median(cost for _, cost in pairs) < 2 * median(cost for cost, _ in pairs)


@pytest.mark.alone
def test_cancelling_costs_the_same_wherever_the_request_waits() -> None:
    scheduler = crowded(4000)
    start = time.perf_counter()
    for request_id in range(4063, 63, -1):
        scheduler.cancel(request_id)
    assert scheduler.waiting == 0
    # Searching the queue would take millions of steps, some seconds.
    assert time.perf_counter() - start < 0.5


def test_the_policy_loads_neither_torch_nor_sockets_nor_models() -> None:
    program = (
        "import sys, graphgen.scheduler.policy;"
        "print([name for name in ('torch', 'zmq', 'transformers', 'graphgen.models', 'random') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
