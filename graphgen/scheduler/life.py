"""One life of a worker group, as the policy sees it: what dies with the group while the requests live on.

Owns pages, slots and plans in flight, and the parts of the policy that work on them. `graphgen.scheduler.policy` makes
one when it begins, and another when a group is lost.
"""

from collections.abc import Sequence

from graphgen.ipc.worker_messages import StepTimeTable
from graphgen.scheduler.admission import Admission
from graphgen.scheduler.bookkeeping import Bookkeeping
from graphgen.scheduler.buckets import BucketTable
from graphgen.scheduler.budget import StepBudget
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.counters import Counters
from graphgen.scheduler.in_flight import StepsInFlight
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.objectives import OBJECTIVES
from graphgen.scheduler.overload import OverloadGuard
from graphgen.scheduler.page_groups import PageGroups
from graphgen.scheduler.preemption import Preemption
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
    ) -> None:
        """epoch: number of this life, 0 the first. The others are the policy's, and outlive this."""
        self.epoch = epoch
        self._lasting = (limits, buckets, model, tenants, counters)
        self._model = model
        self.groups = groups = PageGroups(limits.windows, limits.page_size, buckets.chunk_room(0))
        self.cache = PrefixCache(limits.num_pages, limits.page_size, groups, limits.prefix_cache)
        self.running = RunningSet(limits.num_slots, limits.page_size)
        self.in_flight = StepsInFlight()
        self.budget = StepBudget(buckets, model, limits.steps_in_flight, OBJECTIVES[limits.objective])
        self.admission = Admission(limits, self.cache, groups, self.running, tenants, buckets.long_prompt_len)
        self.rests = Rests(self.budget, self.running, tenants, self.admission)
        self.guard = OverloadGuard(limits, buckets, self.budget, model, self.running, tenants)
        self.prompts = PromptPlanner(
            limits, self.budget, self.cache, tenants, self.running, self.admission, self.in_flight, counters, model
        )
        self.books = Bookkeeping(
            model, self.budget, self.cache, groups, tenants, self.running, self.admission, self.in_flight, counters
        )
        self.preemption = Preemption(
            self.cache.pool, groups, tenants, self.running, self.admission, self.in_flight, counters, self.books
        )

    def successor(self) -> "WorkerLife":
        """The life of the next group."""
        return WorkerLife(self.epoch + 1, *self._lasting)

    def serve(self, step_times: StepTimeTable | None) -> None:
        """The group of this life serves. step_times: its own; what was learned of the last group does not count."""
        self._model.renew(step_times)
        self.budget.renew()

    def suspects(self) -> Sequence[Request]:
        """The requests whose rows were in the steps that died with the group, without those that have ended."""
        found = {request: None for record in self.in_flight for request in record.requests if not request.ended}
        return list(found)
