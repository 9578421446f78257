"""Plans that the policy made before there were objectives, and how to record such plans.

`recorded_plans.json` holds a digest of every plan of each workload below, taken when steps up to one saturation point
were all that the policy knew. objective="latency" is held to them by `test_objectives.py`. They are recorded again only
when what is asked of that objective changes, or where steps that vary are foretold better. They are of the step times
in `recorded_step_times.json`, whatever is measured later:

    python -m tests.scheduler.recorded > tests/scheduler/recorded_plans.json
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from benchmarks.scenarios import parse_load, requests_of
from benchmarks.simulated_machine import Machine, Policy
from benchmarks.virtual_engine import VirtualEngine
from graphgen.ipc.engine_messages import ObjectiveName, Submit
from graphgen.ipc.worker_messages import StepPlan
from graphgen.launch.step_times_store import StepTimesFile
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.policy import Scheduler

FILE = Path(__file__).with_name("recorded_plans.json")
STEP_TIMES = Path(__file__).with_name("recorded_step_times.json")
PLANS_EACH = 64
"""Of one digest: a difference is found to so many plans."""


class Workload(msgspec.Struct, frozen=True):
    load: str
    policy: Policy = Policy()
    num_tenants: int = 1
    num_pages: int = 12_800
    device_pace: float = 1.0
    token_budget: int = 1024


WORKLOADS = {
    "nothing asked, few clients": Workload("2600/60:16x80"),
    "nothing asked, a long queue": Workload("2600/60:64x160", device_pace=1.05),
    "nothing asked, long outputs": Workload("1200/128:64x160"),
    "nothing asked, a larger budget": Workload("2600/60:32x96", token_budget=2048),
    "too few pages": Workload("256/256:128x300", num_pages=500),
    "gaps": Workload("mix@14x150", Policy(itl_target_ms=18.0)),
    "classes": Workload("bursts@20x200", Policy(itl_target_ms=18.0, priorities={"chat": 1, "steady": 1})),
    "gaps and first tokens": Workload("2600/60:32x96", Policy(itl_target_ms=20.0, ttft_prompt_rate=512.0)),
    "first tokens": Workload("2600/60:64x120", Policy(ttft_prompt_rate=2600.0)),
    "tenants": Workload("mix@14x150", num_tenants=3),
    "tenants with targets": Workload("bursts@20x200", Policy(itl_target_ms=16.0), num_tenants=3),
}


class Recorder(Scheduler):
    """Keeps digests of the plans that it makes; requests are those of so many tenants in turn."""

    num_tenants = 1

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]  # those of a Scheduler
        self.digests: list[str] = []
        self._hash = hashlib.sha256()
        self._num_plans = 0

    def add(self, submit: Submit) -> None:
        super().add(msgspec.structs.replace(submit, tenant=f"tenant {submit.request_id % self.num_tenants}"))

    def schedule(self, now_s: float) -> StepPlan | None:
        plan = super().schedule(now_s)
        if plan is not None:
            chunks = [(chunk.slot, chunk.start, chunk.length, chunk.draws) for chunk in plan.chunks]
            said = (round(plan.planned_s, 6), str(plan.bucket), chunks)
            self._hash.update(repr(said).encode())
            self._hash.update(plan.decode_slots + plan.decode_positions + plan.new_pages + plan.page_copies)
            self._num_plans += 1
            if self._num_plans % PLANS_EACH == 0:
                self.close()
        return plan

    def close(self) -> None:
        self.digests.append(self._hash.hexdigest()[:16])


def record(workload: Workload, scheduler_of: Callable[[Machine, Policy], Recorder]) -> list[str]:
    """A digest of every PLANS_EACH plans and all before them, and one of all."""
    on = Machine(
        table=StepTimesFile.read(STEP_TIMES),
        token_budget=workload.token_budget,
        num_pages=workload.num_pages,
        max_num_seqs=256,
        max_model_len=40_960,
        host_delay_s=0.001,
        device_pace=workload.device_pace,
    )
    load = parse_load(workload.load, None)
    requests = [workload.policy.asks(request) for request in requests_of(load, 0, on.max_model_len)]
    scheduler = scheduler_of(on, workload.policy)
    scheduler.num_tenants = workload.num_tenants
    device = CostModel(on.table.table)
    VirtualEngine(
        scheduler,
        device,
        requests,
        load.clients,
        on.host_delay_s,
        on.step_noise,
        on.device_pace,
        time.monotonic_ns,
    ).run()
    scheduler.close()
    return scheduler.digests


def recorder(on: Machine, policy: Policy) -> Recorder:
    return Recorder(*on.scheduler_parts(policy))


def plans_of(workload: Workload, objective: ObjectiveName) -> list[str]:
    """Its digests when the engine is to be good at that."""
    policy = msgspec.structs.replace(workload.policy, objective=objective)
    return record(msgspec.structs.replace(workload, policy=policy), recorder)


if __name__ == "__main__":
    print(json.dumps({name: plans_of(workload, "latency") for name, workload in WORKLOADS.items()}, indent=1))
