"""What a plan changes beyond itself, and when: the only place where that is done and told.

A device waits for a plan, so a plan leaves first and most of what follows from it is done while the device computes.
There are four moments:

    the plan is made    `plan_made`, within `Scheduler.schedule`. From here on its rows count as computed, chunks and
                        decodes alike (`RunningSet.num_computed`); it is in flight; it is counted, and its prompts are
                        charged to their tenants; what it copies from may be handed out again.
    it is settled       `settle`, before anything else happens to a request: before the next plan, before one ends or is
                        preempted, at the latest in `prepare`. What its prompts computed may be shared; a request whose
                        prompt is computed decodes; one whose last row is planned gives its slot and pages back; one
                        that follows a grammar and does not run ahead has no row until its token of this plan is known.
    it has left         `prepare`, called by the process when plans and outputs are sent. Settles, and does ahead of
                        time what later plans would have to wait for. Nothing goes wrong if it is never called.
    its result comes    `Scheduler.update`: its tokens are added to their requests, and those end that have all.

Owns the plan that is not settled, and how a request gives up what it holds (`release`). Chooses nothing. Called by
`graphgen.scheduler.policy` and `graphgen.scheduler.preemption`; dies with its worker group.
"""

from collections.abc import Collection

from graphgen.scheduler.admission import Admission
from graphgen.scheduler.budget import StepBudget
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.counters import Counters
from graphgen.scheduler.in_flight import StepsInFlight
from graphgen.scheduler.page_groups import PageGroups
from graphgen.scheduler.plan import PlanDraft, StepRecord
from graphgen.scheduler.prefix_cache import PrefixCache
from graphgen.scheduler.request import Request, RunningRequest
from graphgen.scheduler.running import RunningSet
from graphgen.scheduler.tenants import Tenants

PAGES_READY = 64
"""Pages that are made empty ahead of need: more than one plan takes, as a rule."""

REVIEW_STEPS = 16
"""Plans from one look at the saturation point to the next."""

DECODE_REVIEW_STEPS = 4
"""Plans from one count of what the tenants' decodes cost to the next."""


class Bookkeeping:
    """Of the plans of one worker group."""

    def __init__(
        self,
        model: CostModel,
        budget: StepBudget,
        cache: PrefixCache,
        groups: PageGroups,
        tenants: Tenants,
        running: RunningSet,
        admission: Admission,
        in_flight: StepsInFlight,
        counters: Counters,
    ) -> None:
        self._model = model
        self._budget = budget
        self._cache = cache
        self._groups = groups
        self._tenants = tenants
        self._running = running
        self._admission = admission
        self._in_flight = in_flight
        self._counters = counters
        self._unsettled: PlanDraft | None = None
        self._grown: list[RunningRequest] = []  # those that got a page in the newest plan

    def plan_made(self, draft: PlanDraft, record: StepRecord) -> None:
        """The plan before it is settled."""
        self._cache.pool.give_back(draft.held)  # whoever takes one writes to it in a later step
        self._counters.plan_made(record)
        self._admission.plan_made()
        if self._tenants.is_counting:
            step_ms = self._model.predict_ms(record.bucket, record.attended)
            self._tenants.charge_step(record, step_ms or 0.0)
        self._in_flight.append(record)
        draft.ending = self._running.decodes.advance()
        self._unsettled, self._grown = draft, draft.grown

    def settle(self) -> None:
        """Once for each plan; does nothing when the newest is settled."""
        draft, self._unsettled = self._unsettled, None
        if draft is None:
            return
        for running in draft.prompts:
            self._cache.enter(running, running.num_prefilled)
        newest_step = self._counters.steps - 1
        for running in draft.ending:
            if running.request.is_constrained:  # it may have to draw its last token again
                self._running.await_token(running, newest_step)
            else:
                self.release(running)
        for running in [one for one in self._running.constrained if not self._runs_ahead(one)]:
            self._running.await_token(running, newest_step)
        for running in draft.drawing:
            is_last = running.prefill_end == running.request.end_position
            if running.request.is_constrained and (is_last or not self._runs_ahead(running)):
                self._running.await_token(running, newest_step)
            elif is_last:
                self.release(running)
            else:
                self._running.finish_prompt(running)
                if self._groups.has_windows:
                    self.leave_behind(running, running.prefill_end)

    def prepare(self) -> None:
        """The device is busy: what the next plans would have to wait for."""
        self.settle()
        pool = self._cache.pool
        pool.make_empty(min(PAGES_READY, pool.num_pages // 64))
        if self._counters.steps % REVIEW_STEPS == 0:
            decodes = self._running.decodes
            self._budget.review(len(decodes), decodes.num_positions)
        if self._counters.steps % DECODE_REVIEW_STEPS == 0:
            self._tenants.charge_decodes(self._running.decodes)
        for running in self._grown:
            # Its newest page is empty; of the one before, with two steps in flight, all tokens have just arrived.
            running.request.chain.prepare(running.tables[0].end - 1)
        self._grown = []

    def tokens_known(self, record: StepRecord, refused: Collection[Request]) -> None:
        """The tokens of a step have arrived: those of its requests that follow a grammar go on, and those whose token
        was refused draw it again. Nothing is done for one that was preempted or has ended meanwhile."""
        self.settle()
        for request in record.constrained:
            running = request.running
            if request not in refused:
                request.draw_allowed()
                if running in self._running.awaiting:
                    self._running.take_token(running)
            elif request.num_stale:
                request.num_stale -= 1
            else:
                request.draw_refused()
                if running is not None:
                    # Rows that were planned since have begun with the refused token.
                    request.num_stale = sum(request in later.constrained for later in self._in_flight)
                    self._running.redraw(running)

    def _runs_ahead(self, running: RunningRequest) -> bool:
        """Not where a draw that is repeated might read behind a window that has moved on."""
        return running.request.runs_ahead and not self._groups.has_windows

    def release(self, running: RunningRequest) -> None:
        """Frees slot and pages, for the next plan. What is computed of known tokens stays in the prefix cache."""
        num_computed = self._running.remove(running)
        self._admission.stopped(running)
        self._cache.enter(running, min(num_computed, len(running.request.tokens)))
        for table in running.tables:
            # The last pages first: a page is of no use without the ones before it, so it goes before them.
            self._cache.pool.give_back(table.pages[::-1])

    def leave_behind(self, running: RunningRequest, position: int) -> None:
        """Frees the pages that no row of the request at this position or later reads. What is known stays in the prefix
        cache: a prompt that ends there may share it as long as nobody else takes the page."""
        for group, table in enumerate(running.tables):
            first = self._groups.first_page(group, position)
            if first > table.first:
                self._cache.enter_table(running, group, first)
                self._cache.pool.give_back(table.drop_before(first))
