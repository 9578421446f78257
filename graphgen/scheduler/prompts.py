"""The prompt rows of a plan: chunks of prompts that have begun, then waiting requests that may start.

Owns the order in which they are asked, and who may pass whom; the budget says how many rows there are, the shares
divide them, admission says who fits. Called by `graphgen.scheduler.policy` for every plan, after its decodes.
"""

from itertools import islice

from graphgen.scheduler.admission import Admission, Offer
from graphgen.scheduler.budget import StepBudget, StepLoad
from graphgen.scheduler.counters import Counters
from graphgen.scheduler.in_flight import StepsInFlight
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.plan import PlanDraft
from graphgen.scheduler.prefix_cache import PrefixCache
from graphgen.scheduler.request import Request, RunningRequest
from graphgen.scheduler.running import RunningSet
from graphgen.scheduler.shares import PromptShares
from graphgen.scheduler.waiting import WaitingQueue

MAX_PASSED = 8
"""Waiting requests that do not fit and that a younger one may pass in one plan."""

MAX_TIMES_PASSED = 64
"""Plans in which a waiting request may be passed; after that nothing passes it until it is admitted."""


class PromptPlanner:
    """Works on the policy's state; has none of its own but the number of requests with a TTFT target."""

    def __init__(
        self,
        limits: SchedulerLimits,
        budget: StepBudget,
        cache: PrefixCache,
        waiting: WaitingQueue,
        running: RunningSet,
        admission: Admission,
        in_flight: StepsInFlight,
        counters: Counters,
    ) -> None:
        self._limits = limits
        self._budget = budget
        self._cache = cache
        self._waiting = waiting
        self._running = running
        self._admission = admission
        self._in_flight = in_flight
        self._counters = counters
        self.num_with_ttft_target = 0
        """Requests, waiting or running; while there is none, no plan looks for one that is late."""

    def plan(self, draft: PlanDraft, now_s: float, may_admit: bool) -> None:
        """Adds the chunks of one plan, whose decodes are in the draft already."""
        begun = list(self._running.begun)
        may_admit = may_admit and len(self._waiting) > 0 and self._running.num_free_slots > 0
        if not begun and not may_admit:
            return
        bucket = self._budget.choose(self._load(draft.num_decodes, now_s))
        if bucket is None:
            return
        shares = PromptShares(bucket.prefill_rows, self._limits.max_chunks, draft.num_decodes, self._budget)
        outranked = self._outranked(begun) if may_admit and begun else []
        others_wait = len(self._waiting) > 0
        shares.give_begun(begun[: len(begun) - len(outranked)], others_wait)
        if outranked:
            self._admit(draft, shares, now_s, before=outranked[0].request)
            shares.give_begun(outranked, others_wait)
        if may_admit:
            self._admit(draft, shares, now_s, before=None)
        shares.give_rest()
        for running, length in shares.items():
            draft.add_chunk(running, length)

    def _load(self, num_decodes: int, now_s: float) -> StepLoad:
        decodes, begun = self._running.decodes, self._running.begun
        return StepLoad(
            num_decodes=num_decodes,
            decode_positions=decodes.num_positions,
            itl_target_ms=decodes.itl_target_ms,
            prompts=[(running.num_computed, running.num_missing) for running in begun],
            pending_tokens=sum(running.num_missing for running in begun) + self._waiting.num_tokens,
            is_late=self.num_with_ttft_target > 0 and self._is_late(num_decodes, now_s),
        )

    def _is_late(self, num_decodes: int, now_s: float) -> bool:
        """Whether a begun prompt, or the waiting one to serve next, would miss its TTFT target at the present rate.

        A target that was missed already asks for no hurry.
        """
        candidates = [(running.request, running.num_missing) for running in self._running.begun]
        candidates += [(request, len(request.tokens)) for request in islice(self._waiting.first(1, 1), 1)]
        num_tokens = 0
        for request, missing in candidates:
            num_tokens += missing
            if request.ttft_by_s is None or now_s >= request.ttft_by_s:
                continue
            needed_ms = self._budget.prompt_ms(num_decodes, self._running.decodes.num_positions, num_tokens)
            if needed_ms is not None and now_s + needed_ms / 1000.0 > request.ttft_by_s:
                return True
        return False

    def _outranked(self, begun: list[RunningRequest]) -> list[RunningRequest]:
        """Those of `begun` that a waiting request is served before, as one of a higher class is."""
        first = next(self._waiting.first(1, 1), None)
        return [] if first is None else [running for running in begun if running.request.rank > first.rank]

    def _admit(self, draft: PlanDraft, shares: PromptShares, now_s: float, before: Request | None) -> None:
        """Starts waiting requests in the order of service, while there are rows, slots and pages for their chunks:
        those that are served before `before`, or all.

        One that does not fit into the free pages may be passed by younger ones, within MAX_PASSED and
        MAX_TIMES_PASSED. Nothing passes a preempted one whose tokens are in flight: it is about to return. One that is
        held back waits for a request that is served before it, and may be passed without limit.
        """
        passed: list[Request] = []
        num_passed = 0  # those of `passed` that come before the last one admitted
        for request in self._waiting.first(self._limits.max_chunks + MAX_PASSED, MAX_PASSED):
            if shares.is_full or not self._running.num_free_slots or self._in_flight.draw_for(request):
                break
            if before is not None and request.rank > before.rank:
                break
            offer = self._admission.offer(request)
            if self._admission.is_held_back(request, offer):
                continue
            if self._admission.has_pages(request, offer):
                offer = self._admission.with_copy(request, offer)
                length = shares.fit(len(request.tokens) - offer.num_cached, is_last=len(self._waiting) == 1)
                if length:
                    shares.give(self._start(request, offer, draft, now_s), length)
                    num_passed = len(passed)
                continue
            if request.times_passed >= MAX_TIMES_PASSED or len(passed) == MAX_PASSED:
                break
            passed.append(request)
        for request in passed[:num_passed]:
            request.times_passed += 1

    def _start(self, request: Request, offer: Offer, draft: PlanDraft, now_s: float) -> RunningRequest:
        """Admits a request: slot, all pages of its known tokens, shared ones first."""
        self._waiting.remove(request)
        pool = self._cache.pool
        pool.share(offer.shared)  # first, so that none of them is handed out as a new one
        new = pool.take(offer.num_new)
        pages = offer.shared + new
        if offer.copy_from is not None:
            draft.copy_page(offer.copy_from, new[0])
            # As one of its own new pages the source is still what it was when the step copies, before it writes.
            if offer.copy_from not in new:
                pool.share((offer.copy_from,))
                draft.held.append(offer.copy_from)
        running = self._running.start(request, pages, len(offer.shared), offer.num_cached, offer.reserve, offer.is_long)
        self._admission.started(running)
        request.times_passed = 0
        if request.num_admissions == 0:
            request.started_s = now_s
            request.cached_tokens = offer.num_cached
            self._counters.prefix_queries += request.prompt_len
            self._counters.prefix_hits += offer.num_cached
        request.num_admissions += 1
        draft.add_pages(running.slot, 0, pages)
        return running
