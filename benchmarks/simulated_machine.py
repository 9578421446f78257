"""The engine that simulations are of: its sizes, the times of its device, and how its scheduler is set up.

Pure. Called by `benchmarks.simulate` and the scripts that use it.
"""

from pathlib import Path

import msgspec
from msgspec import Struct

from benchmarks.virtual_engine import STEP_NOISE, VirtualRequest
from graphgen.capture.buckets import slots_for
from graphgen.ipc.engine_messages import ObjectiveName
from graphgen.launch.step_times_store import StepTimesFile
from graphgen.scheduler.buckets import BucketTable
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.policy import Scheduler

H200_STEP_TIMES = Path(__file__).parent / "shapes" / "llama-3.1-8b" / "h200-step-times.json"

NUM_PAGES = 12_800
"""What 8B weights leave on an H200."""
MAX_MODEL_LEN = 40_960

MAX_CHUNKS = 32
"""Of a step, as the worker has it; its module would import torch."""


class Policy(Struct, frozen=True):
    """How a scheduler is set up. One policy differs from another by these settings alone."""

    token_budget: int | None = None  # None: --token-budget
    objective: ObjectiveName = "balanced"
    itl_target_ms: float | None = None  # of every request
    tpot_target_ms: float | None = None
    ttft_target_ms: float | None = None
    ttft_prompt_rate: float | None = None  # every request wants its first token after prompt tokens / this seconds
    priorities: dict[str, int] = {}  # of each kind; 0 is that of any other
    does: str = ""  # in words, for the picture

    def asks(self, request: VirtualRequest) -> VirtualRequest:
        """The request as its client sends it under this policy."""
        rate = self.ttft_prompt_rate
        return msgspec.structs.replace(
            request,
            priority=self.priorities.get(request.kind, 0),
            itl_target_ms=self.itl_target_ms,
            tpot_target_ms=self.tpot_target_ms,
            ttft_target_ms=self.ttft_target_ms if rate is None else request.shape.prompt_len / rate * 1000.0,
        )


class Machine(Struct, frozen=True):
    """The engine's sizes, and the device's times."""

    table: StepTimesFile
    token_budget: int
    num_pages: int
    max_num_seqs: int
    max_model_len: int
    host_delay_s: float
    step_noise: float = STEP_NOISE
    device_pace: float = 1.0

    def scheduler(self, policy: Policy) -> Scheduler:
        """A fresh one. Raises ConfigError for a budget that the table's buckets do not serve."""
        return Scheduler(*self.scheduler_parts(policy))

    def scheduler_parts(self, policy: Policy) -> tuple[SchedulerLimits, CostModel]:
        """What a scheduler is made of."""
        token_budget = policy.token_budget or self.token_budget
        times = self.table.table.times
        buckets = tuple(time.bucket for time in times if time.bucket.num_rows <= token_budget)
        running = min(slots_for(self.max_num_seqs, token_budget), BucketTable(buckets, token_budget).most_slots)
        limits = SchedulerLimits(
            buckets=buckets,
            num_pages=self.num_pages,
            page_size=self.table.key.page_size,
            num_slots=running,
            max_chunks=min(MAX_CHUNKS, max(bucket.prefill_rows for bucket in buckets)),
            token_budget=token_budget,
            objective=policy.objective,
            max_model_len=self.max_model_len,
        )
        return limits, CostModel(self.table.table)
