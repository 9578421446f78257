"""What the steps of one tenant would take if no other tenant were there: what its share of the time is measured by.

Owns nothing but arithmetic. Called by `graphgen.scheduler.step_bounds` and `graphgen.scheduler.rests`.
"""

from collections.abc import Iterable
from itertools import chain

from graphgen.scheduler.budget import StepBudget
from graphgen.scheduler.running import RunningSet
from graphgen.scheduler.tenants import Tenant

MOST_TENANTS = 16
"""With more tenants their shares are so small that no step exceeds them."""


class LoneSteps:
    """Of one engine's tenants, in milliseconds; None where nobody can know yet."""

    def __init__(self, budget: StepBudget, running: RunningSet) -> None:
        self._budget = budget
        self._running = running

    def decode_ms(self, tenants: Iterable[Tenant]) -> dict[Tenant, float | None]:
        """For each of the tenants: a step of all its decodes, those that rest included, and of no prompts."""
        decodes = self._running.decodes
        positions = dict.fromkeys(tenants, 0)
        for running in chain(decodes, self._running.resting):
            tenant = running.request.tenant
            if tenant in positions:
                positions[tenant] += 1 + (
                    running.num_computed if running.decode_row is None else decodes.position(running)
                )
        return {
            tenant: self._budget.decode_ms(tenant.num_all_decodes, num_positions)
            for tenant, num_positions in positions.items()
        }

    def prompt_ms(self, tenant: Tenant) -> float | None:
        """A step of the tenant's prompts, as many of their tokens as such a step holds at the saturation point."""
        begun = (running.num_missing for running in self._running.begun if running.request.tenant is tenant)
        return self._budget.prompt_step_ms(sum(begun) + tenant.waiting.num_tokens)
