"""The scheduling policy: Dynamic SplitFuse as a function from requests and results to step plans.

Owns every request, its tokens, its slot and its pages. Never reads a clock, a socket or a random number, and
never sees a tensor: `graphgen.scheduler.process` feeds it messages and sends what it returns.

One plan is made in this order, and nothing that was put into a plan is taken out again:

1. A waiting request of a higher class that lacks a slot or pages takes them from the lowest class that runs.
2. Every request whose prompt is computed gets one decode row. One that needs a page when none is free takes it from
   the running request that is to be served last.
3. The budget decides how many prompt tokens the step may hold. Prompts that have begun share them in the order of
   service, then waiting requests are admitted in that order; what they share with others is not computed again.
4. The smallest bucket that holds the rows is chosen.

A plan may be made before the tokens of the plan before it are known: a decode row reads its token on the
device. All steps run in order on one stream of the device, so a slot or page whose last use is planned may be
given to another request in the next plan. Tokens that arrive are matched through the record of their plan,
never through a slot.

The parts: `request` (what a request is, the order of service), `waiting`, `running` and `decodes` (who is where),
`pages` and `prefix_cache` (what the KV cache holds), `admission` (who may start), `budget` and `prompts` (how many
rows, and whose), `overload` (who is refused), `plan` (the message).
"""

from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush

from graphgen.ipc.errors import ConfigError, InvalidRequestError, OverloadedError
from graphgen.ipc.messages import Rejected, StepPlan, Submit, TokenOutput
from graphgen.scheduler.admission import Admission, Offer
from graphgen.scheduler.buckets import BucketTable
from graphgen.scheduler.budget import StepBudget, StepLoad
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.counters import Counters
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.overload import OverloadGuard
from graphgen.scheduler.plan import PlanDraft, StepDescription, StepRecord
from graphgen.scheduler.prefix_cache import PrefixCache
from graphgen.scheduler.prompts import PromptShares
from graphgen.scheduler.request import Request, RunningRequest
from graphgen.scheduler.running import RunningSet
from graphgen.scheduler.waiting import WaitingQueue

MAX_PASSED = 8
"""Waiting requests that do not fit and that a younger one may pass in one plan."""

MAX_TIMES_PASSED = 64
"""Plans in which a waiting request may be passed; after that nothing passes it until it is admitted."""

LONG_PROMPT_STEPS = 8
"""A prompt that misses more tokens than this many steps of the full budget compute is long."""


class Scheduler:
    """Requests in, step plans out, tokens in, outputs out.

    The process calls `schedule` until it returns None, and `update` for each step result in the plans' order.
    """

    def __init__(self, limits: SchedulerLimits, model: CostModel | None = None) -> None:
        """model: how long steps take; None knows nothing yet."""
        self._limits = limits
        self._buckets = BucketTable(limits.buckets, limits.token_budget)
        if limits.max_running > self._buckets.max_running:
            raise ConfigError(
                f"max_running is {limits.max_running}, the buckets within token_budget {limits.token_budget}"
                f" serve at most {self._buckets.max_running} without skipping a decode or starving a prompt:"
                " lower max_running, or give a bucket with prefill rows more decode rows"
            )
        self._model = model or CostModel()
        self._budget = StepBudget(self._buckets, self._model, limits.steps_in_flight)
        self._cache = PrefixCache(limits.num_pages, limits.prefix_cache)
        self._pages = self._cache.pool
        self._long_prompt_len = LONG_PROMPT_STEPS * self._buckets.chunk_room(0) + 1
        self._requests: dict[int, Request] = {}
        self._waiting = WaitingQueue(self._long_prompt_len)
        self._running = RunningSet(limits.max_running, limits.page_size)
        self._admission = Admission(limits, self._cache, self._running)
        self._guard = OverloadGuard(limits, self._buckets, self._budget, self._model, self._running, self._waiting)
        self._in_flight: deque[StepRecord] = deque()
        # A heap of (deadline_s, arrival, request id). Requests that ended leave it when their time comes.
        self._deadlines: list[tuple[float, int, int]] = []
        self._num_added = 0
        self._newest_arrival_s = float("-inf")
        self.counters = Counters()

    # --- requests ------------------------------------------------------------------------------------------

    def add(self, submit: Submit) -> None:
        """Queues a request.

        Raises, keeping nothing: InvalidRequestError for one that can never be served; OverloadedError when the queue is
        full or the request would not meet its deadline.
        """
        if submit.request_id in self._requests:
            raise InvalidRequestError(
                f"request id {submit.request_id} is in use by a request that has not ended: choose another id"
            )
        arrived_s = max(submit.arrived_s, self._newest_arrival_s)
        request = Request(submit, self._num_added, arrived_s, self._limits.page_size)
        self._limits.check_servable(request.prompt_len, submit.max_tokens)
        try:
            self._guard.check_room(request)
            if submit.deadline_ms is not None:
                num_cached = len(self._admission.offer(request).shared) * self._limits.page_size
                self._guard.check_deadline(request, submit.deadline_ms, num_cached)
        except OverloadedError:
            self.counters.refused += 1
            raise
        self._num_added += 1
        self._newest_arrival_s = arrived_s
        self._requests[request.request_id] = request
        self._waiting.append(request)
        if request.deadline_s is not None:
            heappush(self._deadlines, (request.deadline_s, request.arrival, request.request_id))

    def cancel(self, request_id: int) -> None:
        """Ends a request without output. The next plan may use its slot and pages. Ignores unknown ids."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request)

    def expire(self, now_s: float) -> list[Rejected]:
        """Ends the requests whose deadline has passed, wherever they are, and says so to their senders."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, arrival, request_id = heappop(self._deadlines)
            request = self._requests.get(request_id)
            if request is None or request.arrival != arrival:
                continue
            self._end(request)
            self.counters.deadline_misses += 1
            num_tokens = len(request.tokens) - request.prompt_len
            message = (
                f"the deadline passed with {num_tokens} of at most {request.end_len - request.prompt_len} tokens of"
                " output: raise deadline_ms or the priority, or lower max_tokens"
            )
            expired.append(Rejected(request.request_id, "DeadlineError", message))
        return expired

    @property
    def next_deadline_s(self) -> float | None:
        """When `expire` is to be called at the latest; None: no request has a deadline."""
        return self._deadlines[0][0] if self._deadlines else None

    # --- one step ------------------------------------------------------------------------------------------

    def schedule(self, now_s: float) -> StepPlan | None:
        """The next plan, or None when there is nothing to compute before a result or a request arrives.

        `now_s` is copied into `planned_s` and `started_s`, and tells whether a TTFT target is near.
        """
        if len(self._in_flight) >= self._limits.steps_in_flight:
            return None
        draft = PlanDraft()
        self._make_way()
        preemptions_before = self.counters.preemptions
        self._plan_decodes(draft)
        # Pages that a preemption freed are for the growth of those that still run, not for new requests.
        self._plan_prompts(draft, now_s, may_admit=self.counters.preemptions == preemptions_before)
        if not draft.num_decodes and not draft.num_chunks:
            return None
        return self._send_off(draft, now_s)

    def update(self, step_id: int, token_ids: Sequence[int]) -> tuple[TokenOutput, ...]:
        """Takes the tokens of the oldest unanswered plan; returns what its requests get, in the plan's order.

        Raises ValueError, and changes nothing, for another step or another number of tokens.
        """
        record = self._expect(step_id, len(token_ids))
        self._in_flight.popleft()
        outputs = []
        for request, token_id in zip(record.drawing, token_ids, strict=True):
            if request.ended:
                continue
            reason = request.receive(token_id)
            if reason is not None:
                self.counters.finished += 1
                self._guard.request_finished(request)
                self._end(request)
            outputs.append(
                TokenOutput(request.request_id, (token_id,), reason, request.started_s, request.cached_tokens)
            )
        return tuple(outputs)

    def step_took(self, step_id: int, milliseconds: float) -> None:
        """What a step took on the device; called before its `update`. Raises KeyError if it is not in flight."""
        record = self._record(step_id)
        self._model.correct(record.bucket, record.decode_positions, record.prompt_pairs, milliseconds)
        self._guard.step_measured(milliseconds)

    def describe_step(self, step_id: int) -> StepDescription:
        """A plan in flight in terms of requests. `update` forgets it. Raises KeyError for any other step."""
        return StepDescription.of(self._record(step_id))

    # --- what there is ---------------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Requests that were admitted and wait for nothing but their tokens."""
        return len(self._requests) - len(self._waiting)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot and pages, preempted ones included."""
        return len(self._waiting)

    @property
    def pages_free(self) -> int:
        """Pages that no request holds, those the prefix cache keeps included."""
        return self._pages.num_free

    @property
    def pages_cached(self) -> int:
        """Of the free pages: those that the prefix cache keeps."""
        return self._pages.num_idle

    @property
    def pages_total(self) -> int:
        return self._pages.num_pages

    @property
    def steps_in_flight(self) -> int:
        """Plans whose result has not arrived."""
        return len(self._in_flight)

    # --- making a plan: decodes ------------------------------------------------------------------------------

    def _make_way(self) -> None:
        """Preempts requests of lower classes for the waiting request that is next, if that lets it start."""
        lowest = self._running.lowest_class
        if lowest is None or not self._waiting:
            return
        for request in self._waiting.first(1, 1):
            if request.priority <= lowest or self._has_tokens_in_flight(request):
                continue
            offer = self._admission.offer(request)
            if not self._is_held_back(request, offer):
                for victim in self._victims_for(request, offer):
                    self._preempt(victim)
                return

    def _victims_for(self, request: Request, offer: Offer) -> list[RunningRequest]:
        """Whom to preempt so that it starts: requests of lower classes that are to be served after it, the last first.

        None at all if it has what it needs, or if it would not get it that way either.
        """
        victims: list[RunningRequest] = []
        candidates = self._running.victims()
        num_freed = 0
        while not (victims or self._running.num_free_slots) or not self._admission.has_pages(request, offer, num_freed):
            victim = next(candidates, None)
            if victim is None or victim.request.rank < request.rank:
                return []
            if victim.request.priority < request.priority:
                victims.append(victim)
                num_freed += sum(self._pages.num_holders(page) == 1 for page in victim.pages)
        return victims

    def _plan_decodes(self, draft: PlanDraft) -> None:
        """A row for every request whose prompt is computed."""
        decodes = self._running.decodes
        size = self._limits.page_size
        for running in sorted(decodes.at_border(), key=_rank):
            # Reserved requests hold all their pages; others may have been preempted by the one before.
            if running.decode_row is not None and decodes.position(running) == len(running.pages) * size:
                self._grow(running, draft)
        draft.set_decodes(decodes)

    def _grow(self, running: RunningRequest, draft: PlanDraft) -> None:
        """Gives a request one more page, preempting whoever is to be served last if it must, itself included.

        The first in the order of service always gets its page: see `graphgen.scheduler.admission`.
        """
        while not self._pages.num_free:
            victim = next(self._running.victims())
            self._admission.preempted(victim)
            self._preempt(victim)
            if victim is running:
                return
        pages = self._pages.take(1)
        draft.add_pages(running.slot, len(running.pages), pages)
        running.pages += pages

    def _preempt(self, running: RunningRequest) -> None:
        """Takes slot and pages away; the tokens stay, those in flight included."""
        request = running.request
        self.counters.preemptions += 1
        request.num_preemptions += 1
        if running.decode_row is not None:
            request.last_step = self.counters.steps - 1
        self._release(running)
        self._waiting.put_back(request)

    # --- making a plan: prompts ------------------------------------------------------------------------------

    def _plan_prompts(self, draft: PlanDraft, now_s: float, may_admit: bool) -> None:
        """Chunks for prompts that have begun, then for waiting requests."""
        begun = list(self._running.begun)
        may_admit = may_admit and len(self._waiting) > 0 and self._running.num_free_slots > 0
        if not begun and not may_admit:
            return
        bucket = self._budget.choose(self._load(draft.num_decodes, now_s))
        if bucket is None:
            return
        shares = PromptShares(bucket.prefill_rows, self._limits.max_chunks, draft.num_decodes, self._budget)
        shares.give_begun(begun, len(self._waiting) > 0, self._long_prompt_len)
        if may_admit:
            self._admit(draft, shares, now_s)
        shares.give_rest()
        for running, length in shares.items():
            self._compute(draft, running, length)

    def _load(self, num_decodes: int, now_s: float) -> StepLoad:
        decodes, begun = self._running.decodes, self._running.begun
        return StepLoad(
            num_decodes=num_decodes,
            decode_positions=decodes.num_positions,
            itl_target_ms=decodes.itl_target_ms,
            prompts=[(running.num_computed, running.num_missing) for running in begun],
            pending_tokens=sum(running.num_missing for running in begun) + self._waiting.num_tokens,
            is_late=self._is_late(num_decodes, now_s),
        )

    def _is_late(self, num_decodes: int, now_s: float) -> bool:
        """Whether a begun prompt, or the waiting one to serve next, would miss its TTFT target at the present rate.

        A target that was missed already asks for no hurry. The two steps in flight come before the next one.
        """
        num_tokens = 0
        for request, missing in self._next_prompts():
            num_tokens += missing
            if request.ttft_by_s is not None and now_s < request.ttft_by_s:
                needed_ms = self._budget.prompt_ms(num_decodes, self._running.decodes.num_positions, num_tokens)
                if needed_ms is not None and now_s + needed_ms / 1000.0 > request.ttft_by_s:
                    return True
        return False

    def _next_prompts(self) -> list[tuple[Request, int]]:
        begun = [(running.request, running.num_missing) for running in self._running.begun]
        return begun + [(request, len(request.tokens)) for request in self._waiting.first(1, 1)[:1]]

    def _admit(self, draft: PlanDraft, shares: PromptShares, now_s: float) -> None:
        """Starts waiting requests in the order of service, while there are rows, slots and pages for their chunks.

        One that does not fit into the free pages may be passed by younger ones, within MAX_PASSED and
        MAX_TIMES_PASSED. Nothing passes a preempted one whose tokens are in flight: it is about to return. One that is
        held back waits for a request that is served before it, and may be passed without limit.
        """
        passed: list[Request] = []
        num_passed = 0  # those of `passed` that come before the last one admitted
        for request in self._waiting.first(self._limits.max_chunks + MAX_PASSED, MAX_PASSED):
            if shares.is_full or not self._running.num_free_slots or self._has_tokens_in_flight(request):
                break
            offer = self._admission.offer(request)
            if self._is_held_back(request, offer):
                continue
            if self._admission.has_pages(request, offer):
                missing = len(request.tokens) - len(offer.shared) * self._limits.page_size
                length = shares.fit(missing, is_last=len(self._waiting) == 1)
                if length:
                    shares.give(self._start(request, offer, draft, now_s), length)
                    num_passed = len(passed)
                continue
            if request.times_passed >= MAX_TIMES_PASSED or len(passed) == MAX_PASSED:
                break
            passed.append(request)
        for request in passed[:num_passed]:
            request.times_passed += 1

    def _is_held_back(self, request: Request, offer: Offer) -> bool:
        """Whether it waits for another prompt: for a page that is being computed, or because enough are long."""
        if self._admission.awaits_page(request, offer):
            return True
        missing = len(request.tokens) - len(offer.shared) * self._limits.page_size
        if missing < self._long_prompt_len:
            return False
        num_long = sum(running.num_missing >= self._long_prompt_len for running in self._running.begun)
        return num_long >= self._limits.max_long_prompts

    def _start(self, request: Request, offer: Offer, draft: PlanDraft, now_s: float) -> RunningRequest:
        """Admits a request: slot, all pages of its known tokens, shared ones first."""
        self._waiting.remove(request)
        self._pages.share(offer.shared)  # first, so that none of them is handed out as a new one
        pages = offer.shared + self._pages.take(offer.num_new)
        num_cached = len(offer.shared) * self._limits.page_size
        running = self._running.start(request, pages, len(offer.shared), num_cached, offer.reserve)
        self._admission.started(running)
        request.times_passed = 0
        if request.num_admissions == 0:
            request.started_s = now_s
            request.cached_tokens = num_cached
            self.counters.prefix_queries += request.prompt_len
            self.counters.prefix_hits += num_cached
        request.num_admissions += 1
        draft.add_pages(running.slot, 0, pages)
        return running

    def _compute(self, draft: PlanDraft, running: RunningRequest, length: int) -> None:
        """Plans a chunk; the pages it fills may be shared from now on."""
        draft.add_chunk(running, length)
        self._enter_pages(running, running.num_computed)

    def _enter_pages(self, running: RunningRequest, num_computed: int) -> None:
        """Tells the prefix cache of the full pages among the first `num_computed` positions."""
        first, end = running.num_entered, num_computed // self._limits.page_size
        if end > first:
            self._cache.enter(running.request.chain, first, running.pages[first:end])
            running.num_entered = end

    def _send_off(self, draft: PlanDraft, now_s: float) -> StepPlan:
        """Turns the draft into a plan in flight."""
        bucket = self._buckets.smallest(draft.num_chunk_tokens, draft.num_decodes)
        plan, record = draft.build(self.counters.steps, bucket, now_s)
        self.counters.plan_made(bucket, record)
        self._admission.plan_made()
        self._in_flight.append(record)
        for running in self._running.decodes.advance():
            self._release(running)
        for running in draft.drawing:
            if running.num_computed == running.request.end_position:
                self._release(running)
            else:
                self._running.finish_prompt(running)
        return plan

    # --- taking a result -----------------------------------------------------------------------------------

    def _expect(self, step_id: int, num_tokens: int) -> StepRecord:
        if not self._in_flight or self._in_flight[0].step_id != step_id:
            expected = f"step {self._in_flight[0].step_id}" if self._in_flight else "none"
            raise ValueError(
                f"the result of step {step_id} arrived, {expected} is next: results must come in the order of the plans"
            )
        record = self._in_flight[0]
        if num_tokens != len(record.drawing):
            raise ValueError(
                f"step {step_id} returned {num_tokens} tokens, its plan draws {len(record.drawing)}:"
                " one for each sampling chunk and decode row"
            )
        return record

    def _record(self, step_id: int) -> StepRecord:
        for record in self._in_flight:
            if record.step_id == step_id:
                return record
        raise KeyError(f"step {step_id} is not in flight (in flight: {[record.step_id for record in self._in_flight]})")

    def _has_tokens_in_flight(self, request: Request) -> bool:
        """Of a waiting request: whether a plan made before its preemption still draws for it."""
        return bool(self._in_flight) and request.last_step >= self._in_flight[0].step_id

    # --- requests leave ------------------------------------------------------------------------------------

    def _end(self, request: Request) -> None:
        """Forgets a request, wherever it is: waiting, running, or with nothing left but tokens in flight."""
        request.ended = True
        del self._requests[request.request_id]
        if request.running is not None:
            self._release(request.running)
        elif request in self._waiting:
            self._waiting.remove(request)

    def _release(self, running: RunningRequest) -> None:
        """Frees slot and pages, for the next plan. What is computed of known tokens stays in the prefix cache."""
        self._running.remove(running)
        self._admission.stopped(running)
        self._enter_pages(running, min(running.num_computed, len(running.request.tokens)))
        # The last pages first: a page is of no use without the ones before it, so it goes before them.
        self._pages.give_back(running.pages[::-1])


def _rank(running: RunningRequest) -> tuple[float, int]:
    return running.request.rank
