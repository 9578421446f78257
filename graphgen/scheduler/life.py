"""One life of a worker group, as the policy sees it: what dies with the group while the requests live on.

Owns pages, slots, plans in flight and step times, and the parts of the policy that work on them. Made anew for each
group by `graphgen.scheduler.policy`; never changes a request.
"""

from collections.abc import Sequence

from graphgen.scheduler.admission import Admission
from graphgen.scheduler.buckets import BucketTable
from graphgen.scheduler.budget import StepBudget
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.counters import Counters
from graphgen.scheduler.in_flight import StepsInFlight
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.overload import OverloadGuard
from graphgen.scheduler.prefix_cache import PrefixCache
from graphgen.scheduler.prompts import PromptPlanner
from graphgen.scheduler.request import Request
from graphgen.scheduler.rests import Rests
from graphgen.scheduler.running import RunningSet
from graphgen.scheduler.tenants import Tenants


class WorkerLife:
    """Nothing is computed yet, no page is held and nothing is in flight: as the worker group itself begins."""

    def __init__(
        self,
        epoch: int,
        limits: SchedulerLimits,
        buckets: BucketTable,
        model: CostModel,
        tenants: Tenants,
        counters: Counters,
        long_prompt_len: int,
    ) -> None:
        """epoch: number of this life, 0 the first. tenants, counters: those of the policy, which outlive this."""
        self.epoch = epoch
        self.model = model
        self.cache = PrefixCache(limits.num_pages, limits.page_size, limits.prefix_cache)
        self.running = RunningSet(limits.max_running, limits.page_size)
        self.in_flight = StepsInFlight()
        self.budget = StepBudget(buckets, model, limits.steps_in_flight)
        self.admission = Admission(limits, self.cache, self.running, tenants, long_prompt_len)
        self.rests = Rests(self.budget, self.running, tenants, self.admission)
        self.guard = OverloadGuard(limits, buckets, self.budget, model, self.running, tenants)
        self.prompts = PromptPlanner(
            limits, self.budget, self.cache, tenants, self.running, self.admission, self.in_flight, counters
        )

    def suspects(self) -> Sequence[Request]:
        """The requests whose rows were in the steps that died with the group, without those that have ended."""
        found = {request: None for record in self.in_flight for request in record.requests if not request.ended}
        return list(found)
