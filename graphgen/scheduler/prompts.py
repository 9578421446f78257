"""The prompt rows of a plan: chunks of prompts that have begun, then waiting requests that may start.

Owns the order in which they are asked, and who may pass whom; the budget says how many rows there are, the shares
divide them, admission says who fits. Called by `graphgen.scheduler.policy` for every plan, after its decodes.
"""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from graphgen.ipc.worker_messages import Bucket
from graphgen.scheduler.admission import Admission, Offer
from graphgen.scheduler.budget import StepBudget, StepLoad
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.counters import Counters
from graphgen.scheduler.in_flight import StepsInFlight
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.mean_gaps import MeanGaps
from graphgen.scheduler.objectives import OBJECTIVES
from graphgen.scheduler.page_groups import BlockTable
from graphgen.scheduler.plan import PlanDraft
from graphgen.scheduler.prefix_cache import PrefixCache
from graphgen.scheduler.request import Request, RunningRequest
from graphgen.scheduler.running import RunningSet
from graphgen.scheduler.shares import PromptShares
from graphgen.scheduler.step_bounds import Bounds, Gap, StepBounds
from graphgen.scheduler.tenants import Tenant, Tenants
from graphgen.scheduler.waiting import WaitingQueue

MAX_PASSED = 8
"""Waiting requests that do not fit and that a younger one may pass in one plan."""

MAX_TIMES_PASSED = 64
"""Plans in which a waiting request may be passed; after that nothing passes it until it is admitted."""


class _Turn(NamedTuple):
    """A tenant in one plan."""

    tenant: Tenant
    begun: list[RunningRequest]
    """Its prompts that have begun, in order of service."""
    may_admit: bool
    """Its waiting requests may start."""
    is_deferred: bool
    """They may when all others had their turn."""
    is_last: bool
    """No other tenant comes after it."""


class PromptPlanner:
    """Works on the policy's state; has none of its own."""

    def __init__(
        self,
        limits: SchedulerLimits,
        budget: StepBudget,
        cache: PrefixCache,
        tenants: Tenants,
        running: RunningSet,
        admission: Admission,
        in_flight: StepsInFlight,
        counters: Counters,
        model: CostModel,
    ) -> None:
        self._limits = limits
        self._budget = budget
        self._cache = cache
        self._tenants = tenants
        self._running = running
        self._admission = admission
        self._in_flight = in_flight
        self._counters = counters
        self._hurry_share = OBJECTIVES[limits.objective].hurry_share
        self._bounds = StepBounds(budget, running, tenants, admission)
        self._mean_gaps = MeanGaps(budget, model, running, tenants, in_flight)

    def plan(self, draft: PlanDraft, now_s: float, may_admit: bool, helped: Sequence[Tenant]) -> None:
        """Adds the chunks of one plan, whose decodes are in the draft already.

        helped: tenants for which slots or pages were freed; their requests are the first to be admitted.
        """
        begun = list(self._running.begun)
        may_admit = may_admit and self._running.num_free_slots > 0
        waiting = self._tenants.first(self._limits.max_chunks + MAX_PASSED) if may_admit else []
        if not begun and not waiting:
            if not self._tenants.num_waiting:
                self._budget.forget_queue()
            return
        turns = self._turns(begun, waiting, helped)
        bounds = self._bounds.of(turns[0].tenant)
        load = self._load(turns[0], bounds, begun, draft.num_decodes, now_s)
        bucket = self._budget.choose(load)
        if bucket is None or (bounds.gap is not None and self._waits_for(bounds.gap, bucket, load)):
            return
        slack_ms = load.slack_ms
        if slack_ms is not None and self._mean_gaps.skips_prompts(slack_ms, self._budget.step_ms(bucket, load)):
            return
        shares = PromptShares(bucket.prefill_rows, self._limits, draft.num_decodes, self._budget)
        if len(turns) == 1:
            self._serve(turns[0], draft, shares, now_s)
        else:
            self._serve_all(turns, draft, shares, now_s)
        shares.give_rest()
        for running, length in shares.items():
            draft.add_chunk(running, length)

    def _turns(self, begun: list[RunningRequest], waiting: list[Tenant], helped: Sequence[Tenant]) -> "list[_Turn]":
        """The tenants in the order in which they are served.

        Where slots are scarce, one that has its share of them waits for those that have less.
        """
        if not self._tenants.is_counting:
            return [_Turn(waiting[0] if waiting else begun[0].request.tenant, begun, bool(waiting), False, True)]
        order = self._tenants.in_turn(waiting, begun)
        order.sort(key=lambda tenant: tenant not in helped)
        own: dict[Tenant, list[RunningRequest]] = {}
        for running in begun:
            own.setdefault(running.request.tenant, []).append(running)
        share = self._admission.share_slots
        num_below = sum(tenant.num_running < share for tenant in waiting)
        is_scarce = self._running.num_free_slots <= num_below
        turns = []
        for tenant in order:
            waits = bool(waiting) and bool(tenant.waiting)
            is_deferred = waits and is_scarce and tenant.num_running >= share
            is_last = tenant is order[-1]
            turns.append(_Turn(tenant, own.get(tenant, []), waits and not is_deferred, is_deferred, is_last))
        return turns

    def _serve_all(self, turns: "list[_Turn]", draft: PlanDraft, shares: PromptShares, now_s: float) -> None:
        """All tenants in turn, then those that had to wait for it.

        One that runs nothing and whose first request does not fit may be passed by other tenants as by its own
        requests: within MAX_PASSED and MAX_TIMES_PASSED.
        """
        unfit: list[Request] = []
        may_pass = True
        deferred = [turn._replace(begun=[], may_admit=True) for turn in turns if turn.is_deferred]
        for turn in (*turns, *deferred):
            if shares.is_full:
                return
            if not may_pass and turn.may_admit:
                turn = turn._replace(may_admit=False)
            if not (turn.begun or turn.may_admit):
                continue
            num_running = len(self._running)
            first_unfit = self._serve(turn, draft, shares, now_s)
            if len(self._running) > num_running:
                for request in unfit:
                    request.times_passed += 1
            if first_unfit is not None and not turn.tenant.num_running:
                unfit.append(first_unfit)
                may_pass = len(unfit) < MAX_PASSED and first_unfit.times_passed < MAX_TIMES_PASSED

    def _serve(self, turn: "_Turn", draft: PlanDraft, shares: PromptShares, now_s: float) -> Request | None:
        """One tenant's prompts: those that have begun and, before those that they outrank, those that wait. Returns the
        first of these that does not fit."""
        begun, waiting = turn.begun, turn.tenant.waiting
        outranked = _outranked(begun, waiting) if turn.may_admit and begun else []
        others_wait = self._tenants.num_waiting > 0 or not turn.is_last
        shares.give_begun(begun[: len(begun) - len(outranked)], others_wait)
        if outranked:
            self._admit(turn, draft, shares, now_s, before=outranked[0].request)
            shares.give_begun(outranked, others_wait)
        return self._admit(turn, draft, shares, now_s, before=None) if turn.may_admit else None

    def _waits_for(self, gap: Gap, bucket: Bucket, load: StepLoad) -> bool:
        """Whether all prompts wait for the next step."""
        decode_ms = self._budget.decode_ms(load.num_decodes, load.decode_positions)
        return self._bounds.skips_prompts(gap, self._budget.step_ms(bucket, load), decode_ms)

    def _load(
        self, turn: "_Turn", bounds: Bounds, begun: list[RunningRequest], num_decodes: int, now_s: float
    ) -> StepLoad:
        decodes = self._running.decodes
        return StepLoad(
            num_decodes=num_decodes,
            decode_positions=decodes.num_positions,
            itl_target_ms=bounds.target_ms,
            first_gap_ms=_first_gap_ms(decodes.first_gap_target_ms, bounds.target_ms),
            slack_ms=self._mean_gaps.most_ms(now_s),
            most_ms=bounds.most_ms,
            prompts=[(running.num_prefilled, running.num_missing) for running in begun],
            pending_tokens=sum(running.num_missing for running in begun) + self._tenants.num_waiting_tokens,
            is_late=self._tenants.num_with_ttft_target > 0 and self._is_late(turn, num_decodes, now_s),
        )

    def _is_late(self, turn: "_Turn", num_decodes: int, now_s: float) -> bool:
        """Whether a begun prompt of the tenant, or its waiting one to serve next, would get its first token too late at
        the present rate: see `_due_s`."""
        candidates = [(running.request, running.num_missing) for running in turn.begun]
        candidates += [(request, len(request.tokens)) for request in islice(turn.tenant.waiting.first(1, 1), 1)]
        num_tokens = 0
        for request, missing in candidates:
            num_tokens += missing
            due_s = self._due_s(request, now_s)
            if due_s is None:
                continue
            needed_ms = self._budget.prompt_ms(num_decodes, self._running.decodes.num_positions, num_tokens)
            if needed_ms is not None and now_s + needed_ms / 1000.0 > due_s:
                return True
        return False

    def _due_s(self, request: Request, now_s: float) -> float | None:
        """When the request should have its first token; None: there is no hurry.

        One that asks nothing of its gaps should have it early, as far as the objective says so. For any other, a target
        that was missed already asks for no hurry.
        """
        due_s, target_ms = request.ttft_by_s, request.ttft_target_ms
        if due_s is None or target_ms is None:
            return None
        if self._hurry_share is None or request.asks_for_gaps:
            return due_s if now_s < due_s else None
        return None if request.output else due_s - (1.0 - self._hurry_share) * target_ms / 1000.0

    def _admit(
        self, turn: "_Turn", draft: PlanDraft, shares: PromptShares, now_s: float, before: Request | None
    ) -> Request | None:
        """Starts waiting requests of a tenant in the order of service, while there are rows, slots and pages for their
        chunks: those that are served before `before`, or all. Returns the first that does not fit.

        One that does not fit into the free pages may be passed by younger ones, within MAX_PASSED and
        MAX_TIMES_PASSED. Nothing passes a preempted one whose tokens are in flight: it is about to return. One that is
        held back waits for a request that is served before it, and may be passed without limit.
        """
        unfit: Request | None = None
        passed: list[Request] = []
        num_passed = 0  # those of `passed` that come before the last one admitted
        for request in turn.tenant.waiting.first(self._limits.max_chunks + MAX_PASSED, MAX_PASSED):
            if shares.is_full or not self._running.num_free_slots or self._in_flight.draw_for(request):
                break
            if before is not None and request.rank > before.rank:
                break
            offer = self._admission.offer(request)
            if self._admission.is_held_back(request, offer):
                continue
            if self._admission.has_pages(request, offer):
                offer = self._admission.with_copy(request, offer)
                is_last = turn.is_last and self._tenants.num_waiting == 1
                length = shares.fit(
                    offer.num_cached, len(request.tokens) - offer.num_cached, is_last, request.is_scored
                )
                if length:
                    shares.give(self._start(request, offer, draft, now_s), length)
                    num_passed = len(passed)
                continue
            unfit = unfit or request
            if request.times_passed >= MAX_TIMES_PASSED or len(passed) == MAX_PASSED:
                break
            passed.append(request)
        for request in passed[:num_passed]:
            request.times_passed += 1
        return unfit

    def _start(self, request: Request, offer: Offer, draft: PlanDraft, now_s: float) -> RunningRequest:
        """Admits a request: slot, and the pages it starts with, shared ones first."""
        self._tenants.remove(request)
        tables = self._take_pages(offer, draft)
        running = self._running.start(request, tables, offer.num_cached, offer.reserve, offer.is_long)
        self._admission.started(running)
        request.times_passed = 0
        if request.num_admissions == 0:
            request.started_s = now_s
            request.cached_tokens = min(offer.num_cached, request.prompt_len)  # a moved one has its output besides
            self._counters.prefix_queries += request.prompt_len
            self._counters.prefix_hits += request.cached_tokens
        request.num_admissions += 1
        return running

    def _take_pages(self, offer: Offer, draft: PlanDraft) -> list[BlockTable]:
        """The block tables it starts with, and what is copied into them."""
        pool, shared = self._cache.pool, offer.shared
        for pages in shared.tables:
            pool.share(pages)  # first, so that none of them is handed out as a new one
        new = pool.take(offer.num_new)
        # What is copied from one of its own new pages stays there: it is still what it was when the step copies.
        heads = self._copy(offer.copy_from, new, draft) if offer.copy_from else []
        tables, start = [], 0
        for group, (pages, end) in enumerate(zip(shared.tables, offer.ends, strict=True)):
            own = heads[group : group + 1]
            count = end - shared.num_pages - len(own)
            own += new[start : start + count]
            start += count
            tables.append(BlockTable(shared.num_pages - len(pages), pages, own))
        return tables

    def _copy(self, sources: Sequence[int], new: list[int], draft: PlanDraft) -> list[int]:
        """Of each page group the page that its source is copied to, taken out of the new ones."""
        kept = {source for source in sources if source in new}
        for source in kept:
            new.remove(source)
        targets = [source if source in kept else new.pop() for source in sources]
        for source, target in zip(sources, targets, strict=True):
            draft.copy_page(source, target)
        others = [source for source in sources if source not in kept]
        self._cache.pool.share(others)
        draft.held += others
        return targets


def _first_gap_ms(tightest_ms: float | None, target_ms: float | None) -> float | None:
    """What first gaps ask of a step of which this is the target: of several tenants no more than that."""
    return None if tightest_ms is None or target_ms is None else max(tightest_ms, target_ms)


def _outranked(begun: list[RunningRequest], waiting: WaitingQueue) -> list[RunningRequest]:
    """Those of `begun` that a waiting request is served before, as one of a higher class is."""
    first = next(waiting.first(1, 1), None)
    return [] if first is None else [running for running in begun if running.request.rank > first.rank]
