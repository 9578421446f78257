"""How long the steps of one tenant would take if no other tenant were there. Its share of the time is measured by that.

Owns nothing but arithmetic. Called by `graphgen.scheduler.step_bounds` and `graphgen.scheduler.rests`.
"""

from collections.abc import Iterable
from itertools import chain

from graphgen.scheduler.admission import Admission
from graphgen.scheduler.budget import StepBudget
from graphgen.scheduler.running import RunningSet
from graphgen.scheduler.tenants import Tenant

MOST_TENANTS = 16
"""With more tenants their shares are so small that no step exceeds them."""


class LoneSteps:
    """Of one engine's tenants, in milliseconds; None where nobody can know yet."""

    def __init__(self, budget: StepBudget, running: RunningSet, admission: Admission) -> None:
        self._budget = budget
        self._running = running
        self._admission = admission

    def decode_ms(self, tenants: Iterable[Tenant]) -> dict[Tenant, float | None]:
        """For each of the tenants: a step of all its decodes, those that rest included, and of no prompts."""
        positions = dict.fromkeys(tenants, 0)
        for running in chain(self._running.decodes, self._running.resting):
            tenant = running.request.tenant
            if tenant in positions:
                positions[tenant] += 1 + self._running.num_computed(running)
        return {
            tenant: self._budget.decode_ms(tenant.num_all_decodes, num_positions)
            for tenant, num_positions in positions.items()
        }

    def num_prompt_tokens(self, tenant: Tenant) -> int:
        """Prompt tokens of the tenant that are still to be computed."""
        num_tokens = tenant.waiting.num_tokens
        num_tokens += sum(running.num_missing for running in self._running.begun if running.request.tenant is tenant)
        first = tenant.waiting.next_request
        return num_tokens if first is None else num_tokens - self._admission.offer(first).num_cached

    def prompt_ms(self, tenant: Tenant) -> float | None:
        """A step of the tenant's prompts, as many of their tokens as such a step holds at the saturation point."""
        return self._budget.prompt_step_ms(self.num_prompt_tokens(tenant))
