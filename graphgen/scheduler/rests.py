"""Whose decodes rest, so that a tenant gets its tokens at the rate of its share however many others decode.

Owns no request and no row: moves decodes of `graphgen.scheduler.running` to its `resting` and back. Called by
`graphgen.scheduler.policy` before the decodes of each plan, while there are several tenants or somebody rests.

Every decode makes a step longer for all that decode in it. So among n tenants the decodes of a step together

- take at most n times what the decodes of any one tenant would take alone: its tokens come at the rate of its share;
- leave prompts of a tenant that has no decodes yet so much of each step that these are computed in at most n times what
  they would take alone.

Where all that could decode would take longer, the tenants with most decodes let some rest: of each tenant as many
decode as of any other, and those of one tenant take turns of TURN_STEPS plans. One at least of each tenant decodes.
Rows that one tenant does not want are the others', and nobody rests beside a tenant that computes nothing. With more
than MOST_TENANTS nobody rests at all.

A request that rests keeps its slot and its pages, and the device keeps its newest token.
"""

from bisect import bisect_right
from operator import attrgetter

from graphgen.scheduler.admission import Admission
from graphgen.scheduler.budget import StepBudget
from graphgen.scheduler.lone_steps import MOST_TENANTS, LoneSteps
from graphgen.scheduler.request import RunningRequest
from graphgen.scheduler.running import RunningSet
from graphgen.scheduler.tenants import Tenant, Tenants

TURN_STEPS = 4
"""Plans from one change of those that rest to the next: each costs the scheduler a little for every row that changes.
"""

_rank = attrgetter("request.rank")


class Rests:
    """Of one engine's decodes."""

    def __init__(self, budget: StepBudget, running: RunningSet, tenants: Tenants, admission: Admission) -> None:
        self._budget = budget
        self._running = running
        self._tenants = tenants
        self._admission = admission
        self._lone = LoneSteps(budget, running, admission)
        self._num_plans = 0

    def review(self, newest_step: int) -> None:
        """Lets decodes rest, and others wake, for the next plan. newest_step: the newest plan that was made."""
        if not 1 < len(self._tenants) <= MOST_TENANTS:
            for one in list(self._running.resting):
                self._running.wake(one)
            return
        self._num_plans += 1
        turn_ends = self._num_plans % TURN_STEPS == 0
        for tenant, num_rows in self._shares().items():
            if tenant.num_decodes != num_rows or (tenant.num_resting and turn_ends):
                self._take_turns(tenant, num_rows, newest_step)

    def _take_turns(self, tenant: Tenant, num_rows: int, newest_step: int) -> None:
        """So many of the tenant's decodes have rows: those after the last that had its turn, in order of service."""
        running = self._running
        own = [one for one in running if one.request.tenant is tenant and running.is_decode(one)]
        chosen: dict[RunningRequest, None] = dict.fromkeys(own)
        if num_rows < len(own):
            first = bisect_right(own, tenant.newest_rank, key=_rank)
            chosen = dict.fromkeys((own[first:] + own[:first])[:num_rows])
            tenant.newest_rank = next(reversed(chosen)).request.rank
        for one in own:
            if one in running.resting:
                if one in chosen:
                    running.wake(one)
            elif one not in chosen:
                running.rest(one, newest_step)

    # --- how many rows -------------------------------------------------------------------------------------------

    def _shares(self) -> dict[Tenant, int]:
        """Decode rows of each tenant that has decodes."""
        decoding = [tenant for tenant in self._tenants if tenant.num_all_decodes]
        num_wanted = sum(tenant.num_all_decodes for tenant in decoding)
        num_rows = min(num_wanted, self._num_rows(decoding, num_wanted))
        shares: dict[Tenant, int] = {}
        decoding.sort(key=attrgetter("num_all_decodes"))
        for index, tenant in enumerate(decoding):
            fair = max(1, num_rows // (len(decoding) - index))
            shares[tenant] = min(fair, tenant.num_all_decodes)
            num_rows -= shares[tenant]
        return shares

    def _num_rows(self, decoding: list[Tenant], num_wanted: int) -> int:
        """Decode rows that the next plan may have, at most `num_wanted`."""
        num_tenants = len(self._tenants)
        num_rows = num_wanted
        if len(decoding) > 1:
            alone_ms = self._lone.decode_ms(decoding).values()
            known_ms = [milliseconds for milliseconds in alone_ms if milliseconds is not None]
            # That many never take longer than so many times the fewest: a step of none takes its time too.
            num_rows = num_tenants * min(tenant.num_all_decodes for tenant in decoding)
            if num_rows < num_wanted and len(known_ms) == len(decoding):
                most_ms = num_tenants * min(known_ms)
                within = self._budget.decodes_within(most_ms, num_wanted, self._positions_each)
                num_rows = max(num_rows, within)
        for tenant in self._with_first_prompts():
            prompt_ms = self._lone.prompt_ms(tenant)
            if prompt_ms is not None:
                most_ms, num_tokens = num_tenants * prompt_ms, self._lone.num_prompt_tokens(tenant)
                beside = self._budget.decodes_beside(num_tokens, most_ms, num_wanted, self._positions_each)
                num_rows = min(num_rows, beside)
        return num_rows

    def _with_first_prompts(self) -> set[Tenant]:
        """Tenants without decodes whose prompts have begun, or may begin in the next plan."""
        found = {running.request.tenant for running in self._running.begun}
        if self._running.num_free_slots:
            for tenant in self._tenants:
                first = None if tenant.num_running else tenant.waiting.next_request
                if first is not None and self._admission.has_pages(first, self._admission.offer(first)):
                    found.add(tenant)
        return {tenant for tenant in found if not tenant.num_all_decodes}

    @property
    def _positions_each(self) -> int:
        """That the decodes attend to, on average."""
        decodes = self._running.decodes
        return decodes.num_positions // len(decodes) if len(decodes) else 0
