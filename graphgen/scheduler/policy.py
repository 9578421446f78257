"""The scheduling policy: Dynamic SplitFuse as a function from requests and results to step plans.

Owns every request, its tokens, its slot and its pages. Never reads a clock, a socket or a random number, and
never sees a tensor: `graphgen.scheduler.loop` feeds it messages and sends what it returns.

One plan is made in this order, and nothing that was put into a plan is taken out again:

1. A waiting request that lacks a slot or pages takes them: from tenants that hold more than their share if its own
   holds less, else from the lowest class of its tenant that runs if its own class is higher.
2. Every request whose prompt is computed gets one decode row; of several tenants those with most decodes let some rest
   if the step would be too long for another. One that needs a page when none is free takes it from the running request
   that is to be served last.
3. The budget decides how many prompt tokens the step may hold. Prompts that have begun share them in the order of
   service, then waiting requests are admitted in that order; what they share with others is not computed again.
4. The smallest bucket that holds the rows is chosen.

A plan may be made before the tokens of the plan before it are known: a decode row reads its token on the
device. All steps run in order on one stream of the device, so a slot or page whose last use is planned may be
given to another request in the next plan. Tokens that arrive are matched through the record of their plan,
never through a slot.

The parts: `life` (what dies with a worker group) and `trials` (whom it died of); `request` (what a request is, the
order of service); `tenants` (whose turn it is); `waiting`, `running`, `decodes`, `in_flight` and `deadlines` (who is
where); `pages`, `page_chain` and `prefix_cache` (what the KV cache holds); `admission` (who may start); `rests` (whose
decodes have no row); `budget`, `lone_steps`, `step_bounds`, `shares` and `prompts` (how many prompt rows, and whose);
`overload` (who is refused); `plan` (the message).
"""

from collections.abc import Iterable, Sequence

from graphgen.ipc.errors import ConfigError, DeadlineError, InvalidRequestError, OverloadedError
from graphgen.ipc.messages import Outputs, Rejected, StepPlan, Submit, TokenOutput
from graphgen.scheduler.admission import Offer
from graphgen.scheduler.buckets import BucketTable
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.counters import Counters
from graphgen.scheduler.deadlines import Deadlines
from graphgen.scheduler.life import WorkerLife
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.page_chain import PAGES_AHEAD
from graphgen.scheduler.plan import PlanDraft, StepDescription
from graphgen.scheduler.prompts import MAX_PASSED
from graphgen.scheduler.request import Request, RunningRequest
from graphgen.scheduler.tenants import Tenant, Tenants
from graphgen.scheduler.trials import MAX_DEATHS, Trials

PAGES_READY = 64
"""Pages that are made empty ahead of need: more than one plan takes, as a rule."""

REVIEW_STEPS = 16
"""Plans from one look at the saturation point to the next."""

FULL_SHARE = 0.75
"""On a device that does not pad, a step with less than this of its bucket's rows says too little of a full one."""

DECODE_REVIEW_STEPS = 4
"""Plans from one count of what the tenants' decodes cost to the next."""

MAX_TENANTS_HELPED = 4
"""Tenants that wait and are looked at in one plan, whether they are to get slots and pages of others."""

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
        long_prompt_len = LONG_PROMPT_STEPS * self._buckets.chunk_room(0) + 1
        self.counters = Counters()
        self._long_prompt_len = long_prompt_len
        self._requests: dict[int, Request] = {}
        self._tenants = Tenants(long_prompt_len)
        self._deadlines = Deadlines()
        self._trials = Trials()
        self._is_served = True  # a worker group serves
        self._begin_life(0, model or CostModel())
        self._num_added = 0
        self._newest_arrival_s = float("-inf")

    def _begin_life(self, epoch: int, model: CostModel) -> None:
        """Pages, slots and plans in flight are those of this life from here on."""
        life = WorkerLife(
            epoch, self._limits, self._buckets, model, self._tenants, self.counters, self._long_prompt_len
        )
        self.epoch = epoch
        """Number of the worker group's life."""
        self._life = life
        self._model, self._cache, self._pages = model, life.cache, life.cache.pool
        self._running, self._in_flight = life.running, life.in_flight
        self._budget, self._admission, self._guard, self._prompts = (
            life.budget,
            life.admission,
            life.guard,
            life.prompts,
        )
        self._prompts.num_with_ttft_target = sum(one.ttft_by_s is not None for one in self._requests.values())
        self._unbooked: PlanDraft | None = None  # the newest plan, while `_book` has not run for it
        self._grown: list[RunningRequest] = []  # those who got a page for the newest plan

    # --- requests ------------------------------------------------------------------------------------------

    def add(self, submit: Submit) -> None:
        """Queues a request.

        Raises, keeping nothing: InvalidRequestError for one that can never be served; OverloadedError when the queue is
        full or the request would not meet its deadline; DeadlineError when it could not meet it even alone.
        """
        if submit.request_id in self._requests:
            raise InvalidRequestError(
                f"request id {submit.request_id} is in use by a request that has not ended: choose another id"
            )
        arrived_s = max(submit.arrived_s, self._newest_arrival_s)
        tenant = self._tenants.of(submit.tenant)
        request = Request(submit, self._num_added, arrived_s, self._limits.page_size, tenant)
        self._limits.check_servable(request.prompt_len, submit.max_tokens)
        try:
            self._guard.check_room(request)
            if submit.deadline_ms is not None:
                self._guard.check_deadline(request, submit.deadline_ms, self._admission.offer(request).num_cached)
        except (OverloadedError, DeadlineError):
            self.counters.refused += 1
            raise
        if self._cache.enabled:
            request.chain.prepare(PAGES_AHEAD)
        self._num_added += 1
        self._newest_arrival_s = arrived_s
        self._requests[request.request_id] = request
        self._tenants.opened(request)
        self._tenants.add(request)
        self._prompts.num_with_ttft_target += request.ttft_by_s is not None
        self._deadlines.add(request)

    def cancel(self, request_id: int) -> None:
        """Ends a request without output. The next plan may use its slot and pages. Ignores unknown ids."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request)

    def expire(self, now_s: float) -> list[Rejected]:
        """Ends the requests whose deadline has passed, wherever they are, and says so to their senders."""
        expired = []
        for request in self._deadlines.passed(now_s):
            self._end(request)
            self.counters.deadline_misses += 1
            message = (
                f"the deadline passed with {len(request.output)} of at most {request.max_tokens} tokens of output:"
                " raise deadline_ms or the priority, or lower max_tokens"
            )
            expired.append(Rejected(request.request_id, "DeadlineError", message))
        return expired

    def fail_draws(self, step_id: int, places: Sequence[int]) -> list[Rejected]:
        """Ends the requests for which a step could not draw a token; to be called before its `update`.

        places: of their rows in the step result. No page that they computed or shared is shared again, as its keys and
        values may be what is wrong. Raises KeyError for a step that is not in flight.
        """
        drawing = self._in_flight.find(step_id).drawing
        return [self._fail(drawing[place]) for place in places if not drawing[place].ended]

    @property
    def next_deadline_s(self) -> float | None:
        """When `expire` is to be called at the latest; None: no request has a deadline."""
        return self._deadlines.next_s

    @property
    def request_ids(self) -> tuple[int, ...]:
        """Those of all requests that have not ended."""
        return tuple(self._requests)

    # --- one step ------------------------------------------------------------------------------------------

    def schedule(self, now_s: float) -> StepPlan | None:
        """The next plan, or None when there is nothing to compute before a result or a request arrives.

        `now_s` is copied into `planned_s` and `started_s`, and tells whether a TTFT target is near.
        """
        if len(self._in_flight) >= self._limits.steps_in_flight or not self._is_served:
            return None
        if self._trials.are_held and not self._hold_trials():
            return None
        self._book()
        draft = PlanDraft()
        is_shared = len(self._tenants) > 1
        helped = self._make_way(others_give=is_shared)
        if is_shared or self._running.resting:
            self._life.rests.review(self.counters.steps - 1)
        preemptions_before = self.counters.preemptions
        self._plan_decodes(draft)
        # Pages that a preemption freed are for the growth of those that still run, not for new requests.
        may_admit = self.counters.preemptions == preemptions_before
        self._prompts.plan(draft, now_s, may_admit, helped)
        if not draft.num_decodes and not draft.num_chunks:
            return None
        return self._send_off(draft, now_s)

    def prepare(self) -> None:
        """Does, while the device computes, what the newest plan need not wait for and the next one would have to do.

        Called when plans and outputs are sent. Without it `schedule`, and whatever ends a request, do first what they
        cannot do without.
        """
        self._book()
        self._pages.make_empty(min(PAGES_READY, self._pages.num_pages // 64))
        if self.counters.steps % REVIEW_STEPS == 0:
            self._budget.review()
        if self.counters.steps % DECODE_REVIEW_STEPS == 0:
            self._tenants.charge_decodes(self._running.decodes)
        for running in self._grown:
            # Its newest page is empty; of the one before, with two steps in flight, all tokens have just arrived.
            running.request.chain.prepare(len(running.pages) - 1)
        self._grown = []

    def update(self, step_id: int, token_ids: Sequence[int]) -> Outputs:
        """Takes the tokens of the oldest unanswered plan; returns what its requests get.

        Raises ValueError, and changes nothing, for another step or another number of tokens.
        """
        record = self._in_flight.pop(step_id, len(token_ids))
        news, request_ids, others = [], [], []
        for request, token_id in zip(record.drawing, token_ids, strict=True):  # the hottest loop of a step
            if request.ended:
                continue
            output = request.output
            output.append(token_id)
            if 1 < len(output) < request.max_tokens and token_id not in request.stop_token_ids:
                request_ids.append(request.request_id)
                others.append(token_id)
                continue
            reason = request.finish_reason
            if reason is not None:
                self._finish(request)
            news.append(TokenOutput(request.request_id, (token_id,), reason, request.started_s, request.cached_tokens))
        if self._trials.are_held:
            self._end_trial()
        return Outputs(tuple(news), tuple(request_ids), tuple(others))

    def step_took(self, step_id: int, milliseconds: float) -> None:
        """What a step took on the device; called before its `update`. Raises KeyError if it is not in flight."""
        record = self._in_flight.find(step_id)
        if record.rows.num_rows >= FULL_SHARE * record.bucket.num_rows:
            self._model.correct(record.bucket, record.decode_positions, record.prompt_pairs, milliseconds)
        self._guard.step_measured(milliseconds)

    def predict_ms(self, step_id: int) -> float | None:
        """How long a step in flight should take; None where nobody can know. Raises KeyError for any other step."""
        record = self._in_flight.find(step_id)
        return self._model.predict_ms(record.bucket, record.decode_positions, record.prompt_pairs)

    def describe_step(self, step_id: int) -> StepDescription:
        """A plan in flight in terms of requests. `update` forgets it. Raises KeyError for any other step."""
        return StepDescription.of(self._in_flight.find(step_id))

    # --- the life of a worker group --------------------------------------------------------------------------

    def worker_lost(self) -> list[Request]:
        """The worker group has ended, and with it all pages and all steps in flight.

        Every request waits again, in its place of the order of service, with the tokens that it has emitted; this is no
        preemption. Nothing is planned until `renew`. Requests are added, cancelled and expire meanwhile as always.
        Returns those that were in the steps that were lost for the MAX_DEATHS-th time since their newest token: the
        caller says so to their senders and calls `fail_poisoned` with what it knows.
        """
        lost = self._life.suspects()
        self._is_served = False
        for request in lost:
            request.count_death()
        self._tenants.lose_slots()
        for request in self._requests.values():
            request.running = None
            if request not in request.tenant.waiting:
                self._tenants.add(request)
        self._trials.suspect(lost)
        self._tenants.serve_only(None)
        self._begin_life(self.epoch + 1, self._model)
        return [request for request in lost if request.num_deaths >= MAX_DEATHS]

    def fail_poisoned(self, request: Request, last_words: str) -> Rejected:
        """Ends a request that ended worker groups."""
        self._end(request)
        self.counters.poisoned += 1
        message = (
            f"the worker ended {request.num_deaths} times while it computed this request, the last time alone, so the"
            f" request is not tried again. The worker's last words: {last_words or 'none'}"
        )
        return Rejected(request.request_id, "PoisonedRequestError", message)

    def renew(self, model: CostModel) -> None:
        """A new worker group serves, with the buckets and pages of the one before. model: its step times."""
        self._begin_life(self.epoch, model)
        self._is_served = True

    def _hold_trials(self) -> bool:
        """Whether a plan may be made: while suspects are tried, one of them runs and nobody beside it."""
        self._end_trial()
        if self._trials.tried is None:
            if self._in_flight:
                return False  # what is in flight is the one before
            self._tenants.serve_only(self._trials.next())
        return True

    def _end_trial(self) -> None:
        """One that has shown that it harms nobody waits until the others are tried too."""
        passed = self._trials.take_passed()
        if passed is not None and passed.running is not None:
            self._set_aside(passed.running)

    # --- what there is ---------------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Requests that were admitted and wait for nothing but their tokens."""
        return len(self._requests) - self._tenants.num_waiting

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot and pages, preempted ones included."""
        return self._tenants.num_waiting

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

    def _make_way(self, others_give: bool) -> list[Tenant]:
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

    def _plan_decodes(self, draft: PlanDraft) -> None:
        """A row for every request whose prompt is computed and that does not rest."""
        growing = self._running.decodes.need_page()
        if len(growing) > self._pages.num_free:
            growing = self._make_room(growing)
        for running, page in zip(growing, self._pages.take(len(growing)), strict=True):
            draft.add_page(running.slot, len(running.pages), page)
            running.pages.append(page)
        self._grown = growing
        draft.set_decodes(self._running.decodes)

    def _make_room(self, growing: list[RunningRequest]) -> list[RunningRequest]:
        """Preempts until there is a page for each of the others; returns those.

        The first in the order of service always gets its page: see `graphgen.scheduler.admission`.
        """
        while len(growing) > self._pages.num_free:
            victim = self._admission.victim_of_growth()
            self._admission.preempted(victim)
            self._preempt(victim)
            if victim in growing:
                growing.remove(victim)
        return growing

    def _preempt_all(self, victims: Iterable[RunningRequest]) -> None:
        for victim in victims:
            self._preempt(victim)

    def _preempt(self, running: RunningRequest) -> None:
        """Takes slot and pages away; the tokens stay, those in flight included."""
        self.counters.preemptions += 1
        running.request.num_preemptions += 1
        self._set_aside(running)

    def _set_aside(self, running: RunningRequest) -> None:
        """It waits again, with the tokens it has and those that are in flight."""
        self._book()
        request = running.request
        if running.decode_row is not None:
            request.last_step = self.counters.steps - 1
        self._release(running)
        self._tenants.add(request)

    # --- a plan leaves, requests leave -----------------------------------------------------------------------

    def _send_off(self, draft: PlanDraft, now_s: float) -> StepPlan:
        """Turns the draft into a plan in flight."""
        bucket = self._buckets.smallest(draft.num_chunk_tokens, draft.num_decodes)
        plan, record = draft.build(self.counters.steps, bucket, self._limits.pads, now_s)
        self._pages.give_back(draft.held)  # whoever takes one writes to it in a later step
        self.counters.plan_made(record)
        self._admission.plan_made()
        if self._tenants.is_counting:
            step_ms = self._model.predict_ms(bucket, record.decode_positions, record.prompt_pairs)
            self._tenants.charge_step(record, step_ms or 0.0)
        self._in_flight.append(record)
        self._unbooked = draft
        return plan

    def _book(self) -> None:
        """What follows from the newest plan, once, before anything else happens to its requests: its prompts' pages may
        be shared, whose prompt is computed decodes, and who drew its last token leaves."""
        draft, self._unbooked = self._unbooked, None
        if draft is None:
            return
        for running in draft.prompts:
            self._cache.enter(running, running.num_computed)
        for running in self._running.decodes.advance():
            self._release(running)
        for running in draft.drawing:
            if running.num_computed == running.request.end_position:
                self._release(running)
            else:
                self._running.finish_prompt(running)

    def _end(self, request: Request) -> None:
        """Forgets a request, wherever it is: waiting, running, or with nothing left but tokens in flight."""
        self._book()
        request.ended = True
        del self._requests[request.request_id]
        self._prompts.num_with_ttft_target -= request.ttft_by_s is not None
        self._deadlines.remove(request)
        if request.running is not None:
            self._release(request.running)
        elif request in request.tenant.waiting:
            self._tenants.remove(request)
        self._tenants.closed(request)

    def _finish(self, request: Request) -> None:
        self.counters.finished += 1
        self._guard.request_finished(request)
        self._end(request)

    def _fail(self, request: Request) -> Rejected:
        """Ends a request whose logits are not numbers."""
        self._end(request)
        self._cache.distrust(request.chain)
        self.counters.numerical_errors += 1
        message = (
            f"after {len(request.output)} of at most {request.max_tokens} tokens of output the model's logits were all"
            " NaN or -inf: look for NaN in the checkpoint's weights, or set dtype to 'float32' if its numbers overflow"
        )
        return Rejected(request.request_id, "NumericalError", message)

    def _release(self, running: RunningRequest) -> None:
        """Frees slot and pages, for the next plan. What is computed of known tokens stays in the prefix cache."""
        self._running.remove(running)
        self._admission.stopped(running)
        self._cache.enter(running, min(running.num_computed, len(running.request.tokens)))
        # The last pages first: a page is of no use without the ones before it, so it goes before them.
        self._pages.give_back(running.pages[::-1])
