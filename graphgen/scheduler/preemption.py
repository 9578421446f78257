"""Who gives up slot and pages, and for whom: requests that need a page to go on, waiting requests that come first.

Owns nothing. Who may be taken from is `graphgen.scheduler.admission`'s to say. Called by `graphgen.scheduler.policy`
for every plan, before its prompts.

A preempted request waits again, in its place of the order of service, with its tokens and those that are in flight.
"""

from collections.abc import Iterable

from graphgen.scheduler.admission import Admission, Offer
from graphgen.scheduler.bookkeeping import Bookkeeping
from graphgen.scheduler.counters import Counters
from graphgen.scheduler.in_flight import StepsInFlight
from graphgen.scheduler.page_groups import PageGroups
from graphgen.scheduler.pages import PagePool
from graphgen.scheduler.plan import PlanDraft
from graphgen.scheduler.prompts import MAX_PASSED
from graphgen.scheduler.request import Request, RunningRequest
from graphgen.scheduler.running import RunningSet
from graphgen.scheduler.tenants import Tenant, Tenants

MAX_TENANTS_HELPED = 4
"""Tenants that wait and are looked at in one plan, whether they are to get slots and pages of others."""


class Preemption:
    """Of the requests that one worker group runs."""

    def __init__(
        self,
        pages: PagePool,
        groups: PageGroups,
        tenants: Tenants,
        running: RunningSet,
        admission: Admission,
        in_flight: StepsInFlight,
        counters: Counters,
        books: Bookkeeping,
    ) -> None:
        self._pages = pages
        self._groups = groups
        self._tenants = tenants
        self._running = running
        self._admission = admission
        self._in_flight = in_flight
        self._counters = counters
        self._books = books

    # --- for waiting requests ------------------------------------------------------------------------------------

    def make_way(self, others_give: bool) -> list[Tenant]:
        """Preempts requests for the waiting requests that are next, if that lets them start; returns the tenants that
        took slots or pages from others. others_give: there are other tenants that might have to."""
        if not self._tenants.num_waiting or not len(self._running):
            return []
        helped = []
        for tenant in self._tenants.first(MAX_TENANTS_HELPED):
            found = self._next_to_start(tenant) if others_give else None
            if found is not None and self._admission.may_take(*found):
                victims = self._admission.givers_for(*found)
                if victims:
                    helped.append(tenant)
                    self._preempt_all(victims)
                    continue
                others_give = False  # nobody has more than its share, or nothing of use
            self._make_way_within(tenant)
        return helped

    def _make_way_within(self, tenant: Tenant) -> None:
        """Preempts requests of lower classes of the tenant for its waiting request that is next."""
        lowest, highest = tenant.lowest_class, tenant.waiting.highest_class
        if lowest is None or highest is None or highest <= lowest:
            return
        found = self._next_to_start(tenant)  # whoever comes after it could not be sure to start
        if found is not None and found[0].priority > lowest:
            self._preempt_all(self._admission.victims_for(*found))

    def _next_to_start(self, tenant: Tenant) -> tuple[Request, Offer] | None:
        """The first waiting request that waits for nothing but a slot and pages, and what it would start with."""
        for request in tenant.waiting.first(MAX_PASSED, MAX_PASSED):
            if self._in_flight.draw_for(request):
                return None
            offer = self._admission.offer(request)
            if not self._admission.is_held_back(request, offer):
                return request, offer
        return None

    # --- for requests that grow ----------------------------------------------------------------------------------

    def grow(self, draft: PlanDraft) -> None:
        """Pages for every decode whose next row is the first of one, and for prompts whose windows move on. Where too
        few are free, others are preempted for them, or they are themselves."""
        decodes = self._running.decodes
        ends = {one: self._groups.pages_for(decodes.position(one) + 1) for one in decodes.at_border()}
        draft.grown += ends
        if self._groups.has_windows:
            self._move_windows(ends)
        num_missing = _num_missing(ends)
        if num_missing > self._pages.num_free:
            num_missing = self._make_room(ends)
        new = self._pages.take(num_missing)
        for running, end in ends.items():
            for table in running.tables:
                while table.end < end:
                    table.append(new.pop())
            if running.decode_row is not None:  # a prompt's chunk sends them
                draft.send_pages(running)

    def _move_windows(self, ends: dict[RunningRequest, int]) -> None:
        """Frees what lies behind the windows of decodes at a page border and of prompts, and adds the prompts."""
        for one in ends:
            self._books.leave_behind(one, self._running.decodes.position(one))
        for one in self._running.begun:
            self._books.leave_behind(one, one.num_prefilled)
            ends[one] = self._groups.chunk_end(one.num_prefilled, one.prefill_end)

    def _make_room(self, ends: dict[RunningRequest, int]) -> int:
        """Preempts until there are pages for those that are left of `ends`; returns how many these are.

        The first in the order of service always gets its pages: see `graphgen.scheduler.admission`.
        """
        while (num_missing := _num_missing(ends)) > self._pages.num_free:
            victim = self._admission.victim_of_growth()
            self._admission.preempted(victim)
            self.preempt(victim)
            ends.pop(victim, None)
        return num_missing

    # --- how -----------------------------------------------------------------------------------------------------

    def _preempt_all(self, victims: Iterable[RunningRequest]) -> None:
        for victim in victims:
            self.preempt(victim)

    def preempt(self, running: RunningRequest) -> None:
        """Takes slot and pages away, which counts against MAX_PREEMPTIONS."""
        self._counters.preemptions += 1
        running.request.num_preemptions += 1
        self.set_aside(running)

    def set_aside(self, running: RunningRequest) -> None:
        """It waits again, with the tokens it has and those that are in flight."""
        self._books.settle()
        request = running.request
        if running.decode_row is not None:
            request.last_step = self._counters.steps - 1
        self._books.release(running)
        self._tenants.add(request)


def _num_missing(ends: dict[RunningRequest, int]) -> int:
    """Pages that are needed for all tables of each request to reach its end."""
    num_missing = 0
    for running, end in ends.items():
        for table in running.tables:
            if table.end < end:
                num_missing += end - table.end
    return num_missing
