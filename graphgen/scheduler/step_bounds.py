"""How long a step with prompts may be, for the sake of those who decode in it.

Owns nothing but arithmetic: reads who runs and what a step takes. Called by `graphgen.scheduler.prompts`.

With one tenant the tightest ITL target of its decodes counts, and nothing else. Among n tenants a step computes the
prompts of the one whose turn it is, beside the decodes of all:

- It takes at most n times what the decodes of another tenant would take alone (and a third more): a tenant's tokens
  come at the rate of its share, whatever prompts the others send.
- A target of the tenant itself counts in full. One of another tenant counts as far as it leaves the prompts their n-th
  part of the time: else a target that nothing can meet would slow everybody's prompts.
"""

from typing import NamedTuple

from graphgen.scheduler.budget import StepBudget
from graphgen.scheduler.running import RunningSet
from graphgen.scheduler.tenants import Tenant, Tenants

TOLERANCE = 4 / 3
"""By how much a step may be longer than a share allows, so that a tenant gets its tokens at three quarters of the rate
of its share: larger steps compute more rows a second, and most of that is kept while two tenants share an engine."""

MOST_TENANTS = 16
"""With more tenants their shares are so small that no step exceeds them."""


class Bounds(NamedTuple):
    """Milliseconds; None bounds nothing."""

    target_ms: float | None
    """What the step should keep, however slow prompts get by it."""
    most_ms: float | None
    """What it should not exceed for another reason."""


class StepBounds:
    """Of one engine's steps."""

    def __init__(self, budget: StepBudget, running: RunningSet, tenants: Tenants) -> None:
        self._budget = budget
        self._running = running
        self._tenants = tenants

    def of(self, tenant: Tenant) -> Bounds:
        """For a step in which this tenant's prompts are computed first."""
        decodes = self._running.decodes
        if len(self._tenants) == 1 or tenant.num_decodes == len(decodes):
            return Bounds(decodes.itl_target_ms, None)
        return Bounds(self._target_ms(tenant), self._most_ms(tenant))

    def _most_ms(self, tenant: Tenant) -> float | None:
        if len(self._tenants) > MOST_TENANTS:
            return None
        fewest = min(other.num_decodes for other in self._tenants if other is not tenant and other.num_decodes)
        alone_ms = self._decode_ms(fewest)
        return None if alone_ms is None else TOLERANCE * len(self._tenants) * alone_ms

    def _target_ms(self, tenant: Tenant) -> float | None:
        decodes = self._running.decodes
        if decodes.itl_target_ms is None:
            return None
        own, others = float("inf"), float("inf")
        for running in decodes:
            target_ms = running.request.itl_target_ms
            if target_ms is not None:
                if running.request.tenant is tenant:
                    own = min(own, target_ms)
                else:
                    others = min(others, target_ms)
        decode_ms = self._decode_ms(len(decodes)) or 0.0
        num_tenants = len(self._tenants)
        return min(own, max(others, decode_ms * num_tenants / (num_tenants - 1)))

    def _decode_ms(self, num_decodes: int) -> float | None:
        """A step of so many decodes, of the length that they have on average, and no prompts."""
        decodes = self._running.decodes
        return self._budget.decode_ms(num_decodes, decodes.num_positions * num_decodes // len(decodes))
