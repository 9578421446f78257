"""The scheduling policy: Dynamic SplitFuse as a function from requests and results to step plans.

Owns every request, its tokens, its slot and its pages. Never reads a clock, a socket or a random number, and
never sees a tensor: `graphgen.scheduler.process` feeds it messages and sends what it returns.

One plan is made in this order, and nothing that was put into a plan is taken out again:

1. Every request whose prompt is computed gets one decode row, oldest first. One that needs a page when none
   is free takes it from the youngest running request, which has no row in the plan yet: its turn comes later.
2. Prompts that have begun get chunks, oldest first, then waiting requests are admitted in order of arrival.
3. The smallest bucket that holds the rows is chosen.

A plan may be made before the tokens of the plan before it are known: a decode row reads its token on the
device. All steps run in order on one stream of the device, so a slot or page whose last use is planned may be
given to another request in the next plan. Tokens that arrive are matched through the record of their plan,
never through a slot.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

from graphgen.ipc.errors import ConfigError, InvalidRequestError
from graphgen.ipc.messages import StepPlan, Submit, TokenOutput
from graphgen.scheduler.buckets import BucketTable
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.pages import PagePool
from graphgen.scheduler.plan import PlanDraft, StepDescription, StepRecord
from graphgen.scheduler.request import Request, RunningRequest
from graphgen.scheduler.waiting import WaitingQueue

MAX_PASSED = 8
"""Waiting requests that do not fit and that a younger one may pass in one plan."""

MAX_TIMES_PASSED = 64
"""Plans in which a waiting request may be passed; after that nothing passes it until it is admitted."""

WATERMARK_DIVISOR = 16
"""Admission keeps one page free for each running request, at most this part of the pool (rounded up)."""


class Scheduler:
    """Requests in, step plans out, tokens in, outputs out.

    The process calls `schedule` until it returns None, and `update` for each step result in the plans' order.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self._buckets = BucketTable(limits.buckets, limits.token_budget)
        if limits.max_running > self._buckets.max_running:
            raise ConfigError(
                f"max_running is {limits.max_running}, the buckets within token_budget {limits.token_budget}"
                f" serve at most {self._buckets.max_running} without skipping a decode or starving a prompt:"
                " lower max_running, or give a bucket with prefill rows more decode rows"
            )
        self._pages = PagePool(limits.num_pages)
        self._free_slots = list(range(limits.max_running - 1, -1, -1))
        self._requests: dict[int, Request] = {}
        self._waiting = WaitingQueue()
        self._running: list[RunningRequest] = []  # those that still have rows to plan, by arrival
        self._in_flight: deque[StepRecord] = deque()
        self._num_added = 0
        self._watermark_limit = -(-limits.num_pages // WATERMARK_DIVISOR)
        self._steps = 0
        self._preemptions = 0
        self._finished = 0
        self._padding_rows = 0
        self._total_rows = 0

    # --- requests ------------------------------------------------------------------------------------------

    def add(self, submit: Submit) -> None:
        """Queues a request. Raises InvalidRequestError, keeping nothing, for one that can never be served."""
        if submit.request_id in self._requests:
            raise InvalidRequestError(
                f"request id {submit.request_id} is in use by a request that has not ended: choose another id"
            )
        request = Request(submit, arrival=self._num_added)
        self._limits.check_servable(request.prompt_len, submit.max_tokens)
        self._num_added += 1
        self._requests[request.request_id] = request
        self._waiting.append(request)

    def cancel(self, request_id: int) -> None:
        """Ends a request without output. The next plan may use its slot and pages. Ignores unknown ids."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request)

    @property
    def request_ids(self) -> tuple[int, ...]:
        """Those of all requests that have not ended."""
        return tuple(self._requests)

    # --- one step ------------------------------------------------------------------------------------------

    def schedule(self, now_s: float) -> StepPlan | None:
        """The next plan, or None when there is nothing to compute before a result or a request arrives.

        `now_s` is only copied, into `planned_s` and into the outputs' `started_s`.
        """
        if len(self._in_flight) >= self._limits.steps_in_flight:
            return None
        draft = PlanDraft()
        preemptions_before = self._preemptions
        begun = self._plan_decodes(draft)
        self._plan_begun_prompts(draft, begun)
        if self._preemptions == preemptions_before:
            # Pages that a preemption freed are for the growth of those that still run, not for new requests.
            self._admit(draft, now_s)
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
                self._finished += 1
                self._end(request)
            outputs.append(TokenOutput(request.request_id, (token_id,), reason, request.started_s))
        return tuple(outputs)

    def describe_step(self, step_id: int) -> StepDescription:
        """A plan in flight in terms of requests. `update` forgets it. Raises KeyError for any other step."""
        for record in self._in_flight:
            if record.step_id == step_id:
                return StepDescription.of(record)
        raise KeyError(f"step {step_id} is not in flight (in flight: {[record.step_id for record in self._in_flight]})")

    # --- counters ------------------------------------------------------------------------------------------

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
        return self._pages.num_free

    @property
    def pages_total(self) -> int:
        return self._pages.num_pages

    @property
    def steps_in_flight(self) -> int:
        """Plans whose result has not arrived."""
        return len(self._in_flight)

    @property
    def steps(self) -> int:
        """Plans made so far."""
        return self._steps

    @property
    def preemptions(self) -> int:
        return self._preemptions

    @property
    def finished(self) -> int:
        """Requests that ended with a finish reason; cancelled ones do not count."""
        return self._finished

    @property
    def padding_rows(self) -> int:
        """Rows of all plans that held no token."""
        return self._padding_rows

    @property
    def total_rows(self) -> int:
        """Rows of all plans."""
        return self._total_rows

    # --- making a plan -------------------------------------------------------------------------------------

    def _plan_decodes(self, draft: PlanDraft) -> list[RunningRequest]:
        """A row for every request whose prompt is computed; returns the others, oldest first."""
        begun, decodes = [], []
        page_size = self._limits.page_size
        for running in self._running:  # preemption shortens it at its end
            num_computed = running.num_computed
            if num_computed < running.prefill_end:
                begun.append(running)
                continue
            # Its pages hold what is computed and no whole page more, so the next one starts at a page's edge.
            if num_computed % page_size == 0 and not self._grow(running, draft):
                break  # it was the youngest itself
            decodes.append(running)
        draft.add_decodes(decodes)
        return begun

    def _grow(self, running: RunningRequest, draft: PlanDraft) -> bool:
        """Gives a request one more page, preempting the youngest if it must; False if it was one of those.

        The oldest always gets its page: alone, it fits into the pool, which `add` has checked.
        """
        while not self._pages.num_free:
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is running:
                return False
        pages = self._pages.take(1)
        draft.add_pages(running.slot, len(running.pages), pages)
        running.pages += pages
        return True

    def _preempt(self, running: RunningRequest) -> None:
        """Takes slot and pages away; the tokens stay, those in flight included."""
        self._preemptions += 1
        self._release(running)
        self._waiting.put_back(running.request)

    def _plan_begun_prompts(self, draft: PlanDraft, begun: list[RunningRequest]) -> None:
        for running in begun:
            length = min(running.prefill_end - running.num_computed, self._chunk_room(draft))
            if length == 0:
                return
            draft.add_chunk(running, length, init=None)

    def _admit(self, draft: PlanDraft, now_s: float) -> None:
        """Starts waiting requests in order, while there are rows, slots and pages for their first chunks.

        One whose prompt does not fit into the free pages may be passed by younger ones, within MAX_PASSED and
        MAX_TIMES_PASSED. Nothing passes a preempted one whose tokens are in flight: it is about to return.
        """
        if not self._free_slots or not self._chunk_room(draft):
            return
        passed: list[Request] = []
        num_passed = 0  # those of `passed` that are older than the last one admitted
        for request in self._waiting.first(self._limits.max_chunks - draft.num_chunks + MAX_PASSED):
            if request.num_in_flight or not self._free_slots or not self._chunk_room(draft):
                break
            if self._has_pages_for(request):
                self._start(request, draft, now_s)
                num_passed = len(passed)
                continue
            if request.times_passed >= MAX_TIMES_PASSED or len(passed) == MAX_PASSED:
                break
            passed.append(request)
        for request in passed[:num_passed]:
            request.times_passed += 1

    def _has_pages_for(self, request: Request) -> bool:
        """Whether pages for all its known tokens are free, and the watermark for those that run and grow.

        With nothing running the watermark is 0, so that a request that fits into the pool always runs.
        """
        watermark = min(len(self._running), self._watermark_limit)
        return self._limits.pages_for(len(request.tokens)) + watermark <= self._pages.num_free

    def _start(self, request: Request, draft: PlanDraft, now_s: float) -> None:
        """Admits a request: slot, all pages of its known tokens, first chunk."""
        self._waiting.remove(request)
        pages = self._pages.take(self._limits.pages_for(len(request.tokens)))
        running = RunningRequest(request, self._free_slots.pop(), pages)
        request.running = running
        request.times_passed = 0
        if request.num_admissions == 0:
            request.started_s = now_s
        request.num_admissions += 1
        insort(self._running, running, key=_arrival)
        draft.add_pages(running.slot, 0, pages)
        draft.add_chunk(running, min(running.prefill_end, self._chunk_room(draft)), request.slot_init)

    def _chunk_room(self, draft: PlanDraft) -> int:
        """Prompt tokens that may still be added as one more chunk."""
        if draft.num_chunks >= self._limits.max_chunks:
            return 0
        return self._buckets.chunk_room(draft.num_decodes) - draft.num_chunk_tokens

    def _send_off(self, draft: PlanDraft, now_s: float) -> StepPlan:
        """Turns the draft into a plan in flight."""
        bucket = self._buckets.smallest(draft.num_chunk_tokens, draft.num_decodes)
        plan, record = draft.build(self._steps, bucket, now_s)
        self._steps += 1
        self._total_rows += bucket.num_rows
        self._padding_rows += bucket.num_rows - draft.num_chunk_tokens - draft.num_decodes
        self._in_flight.append(record)
        for running in draft.last_rows:
            self._release(running)
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
        """Frees slot and pages, for the next plan."""
        index = bisect_left(self._running, running.request.arrival, key=_arrival)
        del self._running[index]
        self._free_slots.append(running.slot)
        self._pages.give_back(running.pages)
        running.request.running = None


def _arrival(running: RunningRequest) -> int:
    return running.request.arrival
