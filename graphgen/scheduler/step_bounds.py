"""How long a step with prompts may be, for the sake of those who decode in it.

Owns nothing but what steps took too long for a tenant. Called by `graphgen.scheduler.prompts`.

With one tenant the tightest ITL target of its decodes counts, and nothing else. Among n tenants a step computes the
prompts of the one whose turn it is, beside the decodes of all (of which some rest: `graphgen.scheduler.rests`):

- It takes at most n times what the decodes of another tenant would take alone (and a third more): a tenant's tokens
  come at the rate of its share, whatever prompts the others send. Where the smallest step with prompts takes longer,
  steps without prompts follow it until their mean is a quarter more, but no more than MOST_SKIPPED.
- It takes at most n times what the prompts of that tenant would take alone, while it has no decodes: a short prompt
  does not wait for the long ones of others to be computed beside it.
- A target of the tenant itself counts in full. One of another tenant counts as far as it leaves the prompts their n-th
  part of the time: else a target that nothing can meet would slow everybody's prompts.
"""

from typing import NamedTuple

from graphgen.scheduler.admission import Admission
from graphgen.scheduler.budget import StepBudget
from graphgen.scheduler.lone_steps import MOST_TENANTS, LoneSteps
from graphgen.scheduler.running import RunningSet
from graphgen.scheduler.tenants import Tenant, Tenants

TOLERANCE = 4 / 3
"""By how much a step may be longer than a share allows, so that a tenant gets its tokens at three quarters of the rate
of its share: larger steps compute more rows a second, and most of that is kept while two tenants share an engine."""

MEAN_TOLERANCE = 5 / 4
"""The same of the mean of steps where even the smallest step with prompts is longer than TOLERANCE allows."""

MOST_SKIPPED = 16
"""Steps in a row that have no prompts because those before took too long: prompts advance however slow they are. What
is not made up for by then is forgotten."""


class Gap(NamedTuple):
    """How far apart a tenant's tokens would come on its part of the engine."""

    tenant: Tenant
    share_ms: float


class Bounds(NamedTuple):
    """Of one step."""

    target_ms: float | None
    """What the step should keep, however slow prompts get by it; None: whatever is efficient."""
    most_ms: float | None
    """What it should not exceed for another reason; None: nothing."""
    gap: Gap | None
    """What the mean of steps should not exceed; None: nothing."""


class StepBounds:
    """Of one engine's steps."""

    def __init__(self, budget: StepBudget, running: RunningSet, tenants: Tenants, admission: Admission) -> None:
        self._budget = budget
        self._running = running
        self._tenants = tenants
        self._lone = LoneSteps(budget, running, admission)
        self._late: Tenant | None = None  # whose tokens come too late
        self._late_ms = 0.0  # by how much, all steps together
        self._num_skipped = 0  # in a row

    def of(self, tenant: Tenant) -> Bounds:
        """For a step in which this tenant's prompts are computed first."""
        decodes = self._running.decodes
        if len(self._tenants) == 1 or tenant.num_decodes == len(decodes) > 0:
            return Bounds(decodes.itl_target_ms, None, None)
        if len(self._tenants) > MOST_TENANTS:
            return Bounds(self._target_ms(tenant), None, None)
        gap = self._gap(tenant)
        most_ms = None if gap is None else TOLERANCE * gap.share_ms
        if not tenant.num_all_decodes:
            alone_ms = self._lone.prompt_ms(tenant)
            if alone_ms is not None:
                own_ms = len(self._tenants) * alone_ms
                most_ms = own_ms if most_ms is None else min(most_ms, own_ms)
        return Bounds(self._target_ms(tenant), most_ms, gap)

    def skips_prompts(self, gap: Gap, step_ms: float | None, decode_ms: float | None) -> bool:
        """Whether the step goes without prompts, since one before took too long.

        step_ms: what it would take with prompts; decode_ms: what it takes without.
        """
        if self._late is not gap.tenant:
            self._late, self._late_ms = gap.tenant, 0.0
        mean_ms = MEAN_TOLERANCE * gap.share_ms
        if self._late_ms > 0.0:
            if self._num_skipped < MOST_SKIPPED:
                self._num_skipped += 1
                self._late_ms -= mean_ms - (decode_ms or 0.0)
                return True
            self._late_ms = 0.0
        self._num_skipped = 0
        if step_ms is not None and step_ms > TOLERANCE * gap.share_ms:
            self._late_ms += step_ms - mean_ms
        return False

    def _gap(self, tenant: Tenant) -> Gap | None:
        """The tightest of the other tenants."""
        others = [other for other in self._tenants if other is not tenant and other.num_decodes]
        alone_ms = self._lone.decode_ms(others)
        known = {other: milliseconds for other, milliseconds in alone_ms.items() if milliseconds is not None}
        if not known:
            return None
        tightest = min(known, key=known.__getitem__)
        return Gap(tightest, len(self._tenants) * known[tightest])

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
        decode_ms = self._budget.decode_ms(len(decodes), decodes.num_positions) or 0.0
        num_tenants = len(self._tenants)
        return min(own, max(others, decode_ms * num_tenants / (num_tenants - 1)))
