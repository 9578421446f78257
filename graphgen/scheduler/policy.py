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

The parts:

    request, tokens                             what a request is, and the order of service
    tenants, waiting, deadlines                 whose turn it is, who waits, who has to be complete when
    overload, limits                            who is refused
    running, decodes, rests, in_flight          who holds a slot, decodes, rests, or has tokens on their way
    pages, prefix_cache, page_chain             what the KV cache holds (and page_groups, page_branches)
    admission, preemption                       who may start, and who gives up slot and pages for others
    prompts, shares                             whose prompts get rows, and how many each
    budget, buckets, cost_model                 how many rows a step may have (and objectives, large_steps, lone_steps,
                                                step_bounds, mean_gaps)
    plan                                        the message, and the record of it
    bookkeeping, counters                       what a plan changes, and when; what is counted
    logprobs                                    whose the log-probabilities of a step are
    reports                                     what routers are told
    life, trials                                what dies with a worker group, and whom it died of
"""

from collections.abc import Sequence
from typing import TypeVar

from graphgen.ipc.engine_messages import Outputs, Rejected, Submit, TokenOutput
from graphgen.ipc.errors import ConfigError, DeadlineError, InvalidRequestError, OverloadedError
from graphgen.ipc.reports import EngineReport
from graphgen.ipc.senders import sender_of
from graphgen.ipc.worker_messages import Bucket, StepPlan, StepTimeTable
from graphgen.scheduler.buckets import BucketTable
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.counters import Counters
from graphgen.scheduler.deadlines import Deadlines
from graphgen.scheduler.life import WorkerLife
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.logprobs import of_prompts, of_tokens
from graphgen.scheduler.page_chain import PAGES_AHEAD
from graphgen.scheduler.plan import PlanDraft, StepDescription, StepRecord
from graphgen.scheduler.reports import report_of
from graphgen.scheduler.request import Request
from graphgen.scheduler.tenants import Tenants
from graphgen.scheduler.trials import Trials

FULL_SHARE = 0.75
"""On a device that does not pad, a step with less than this of its bucket's rows says too little of a full one."""


class Scheduler:
    """Requests in, step plans out, tokens in, outputs out.

    The process calls `schedule` until it returns None, and `update` for each step result in the plans' order.
    """

    def __init__(self, limits: SchedulerLimits, model: CostModel | None = None) -> None:
        """model: how long steps take; None knows nothing yet."""
        self._limits = limits
        self._buckets = BucketTable(limits.buckets, limits.token_budget)
        if limits.num_slots > self._buckets.most_slots:
            raise ConfigError(
                f"num_slots is {limits.num_slots}, the buckets within token_budget {limits.token_budget}"
                f" serve at most {self._buckets.most_slots} without skipping a decode or starving a prompt:"
                " lower num_slots, or give a bucket with prefill rows more decode rows"
            )
        self.counters = Counters()
        self._requests: dict[int, Request] = {}
        self._tenants = Tenants(self._buckets.long_prompt_len, limits.num_senders)
        self._deadlines = Deadlines()
        self._trials = Trials()
        self._is_served = True  # a worker group serves
        self._ended_s = 0.0  # when the newest step that was measured ended
        self._model = model or CostModel()
        self._life = WorkerLife(0, limits, self._buckets, self._model, self._tenants, self.counters)
        self._num_added = 0
        self._newest_arrival_s = float("-inf")

    # --- requests ------------------------------------------------------------------------------------------

    def add(self, submit: Submit) -> None:
        """Queues a request.

        Raises, keeping nothing: InvalidRequestError for one that can never be served; OverloadedError when the queue is
        full or the request would not meet its deadline; DeadlineError when it could not meet it even alone. One that
        another engine had before is neither turned away nor put behind those that came after it.
        """
        if submit.request_id in self._requests:
            raise InvalidRequestError(
                f"request id {submit.request_id} is in use by a request that has not ended: choose another id"
            )
        arrived_s = submit.arrived_s if submit.num_moves else max(submit.arrived_s, self._newest_arrival_s)
        tenant = self._tenants.of(submit.tenant)
        sender = sender_of(submit.request_id, self._limits.num_senders)
        request = Request(submit, self._num_added, arrived_s, self._limits.page_size, tenant, sender)
        life = self._life
        self._limits.check_servable(request.prompt_len, submit.max_tokens, life.groups)
        if not request.has_output_to_come:
            raise InvalidRequestError(
                f"request {request.request_id} comes with {len(request.output)} tokens of output, max_tokens is"
                f" {request.max_tokens} and the last of them is {request.output[-1]}: it has ended, send it no more"
            )
        if not submit.num_moves:
            self._check_overload(request, submit.deadline_ms)
        if life.cache.enabled:
            request.chain.prepare(PAGES_AHEAD)
        self._num_added += 1
        self._newest_arrival_s = max(arrived_s, self._newest_arrival_s)
        self._requests[request.request_id] = request
        self._tenants.opened(request)
        self._tenants.add(request)
        self._deadlines.add(request)

    def _check_overload(self, request: Request, deadline_ms: float | None) -> None:
        guard = self._life.guard
        try:
            guard.check_room(request)
            if deadline_ms is not None:
                guard.check_deadline(request, deadline_ms, self._life.admission.offer(request).num_cached)
        except (OverloadedError, DeadlineError):
            self.counters.refused += 1
            raise

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
        drawing = self._life.in_flight.find(step_id).drawing
        return [self._fail(drawing[place]) for place in places if not drawing[place].ended]

    def fail_grammars(self, step_id: int, failures: Sequence[tuple[int, str]]) -> list[Rejected]:
        """Ends the requests whose grammars cannot go on; to be called before the step's `update`.

        failures: the places of their rows in the step result, and why. Raises KeyError for a step that is not in
        flight.
        """
        drawing = self._life.in_flight.find(step_id).drawing
        rejected = []
        for place, reason in failures:
            if not (request := drawing[place]).ended:
                self._end(request)
                message = f"after {len(request.output)} tokens of output its grammar cannot go on: {reason}"
                rejected.append(Rejected(request.request_id, "InvalidRequestError", message))
        return rejected

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
        life = self._life
        if len(life.in_flight) >= self._limits.steps_in_flight or not self._is_served:
            return None
        if self._trials.are_held and not self._hold_trials():
            return None
        life.books.settle()
        draft = PlanDraft()
        is_shared = len(self._tenants) > 1
        helped = life.preemption.make_way(others_give=is_shared)
        if is_shared or life.running.resting:
            life.rests.review(self.counters.steps - 1)
        preemptions_before = self.counters.preemptions
        life.preemption.grow(draft)
        draft.set_decodes(life.running.decodes, life.running.constrained, life.running.take_redrawn())
        # Pages that a preemption freed are for the growth of those that still run, not for new requests.
        may_admit = self.counters.preemptions == preemptions_before
        life.prompts.plan(draft, now_s, may_admit, helped)
        if not draft.num_decodes and not draft.num_chunks:
            return None
        bucket = self._buckets.smallest(draft.num_chunk_tokens, draft.num_decodes)
        plan, record = draft.build(self.counters.steps, bucket, self._limits.pads, now_s)
        life.books.plan_made(draft, record)
        return plan

    def prepare(self) -> None:
        """Called when plans and outputs are sent: does what later plans would have to wait for, see `bookkeeping`."""
        self._life.books.prepare()

    def update(
        self,
        step_id: int,
        token_ids: Sequence[int],
        logprobs: bytes = b"",
        prompt_logprobs: bytes = b"",
        refused: Sequence[int] = (),
    ) -> Outputs:
        """Takes the tokens of the oldest unanswered plan; returns what its requests get.

        logprobs, prompt_logprobs: see StepResult. refused: places of tokens that their requests' grammars do not allow:
        these are drawn again. Raises ValueError, and changes nothing, for another step or another number of tokens.
        """
        record = self._life.in_flight.pop(step_id, len(token_ids))
        asked = of_tokens(record.drawing, logprobs) if logprobs else {}
        scores = of_prompts(record.scored, prompt_logprobs) if prompt_logprobs else {}
        drawing: Sequence[Request] = record.drawing
        if refused:
            drawing, token_ids = _without(refused, drawing), _without(refused, token_ids)
        news, request_ids, others = [], [], []
        for request, token_id in zip(drawing, token_ids, strict=True):  # the hottest loop of a step
            if request.ended:
                continue
            output = request.output
            output.append(token_id)
            if (
                1 < len(output) < request.max_tokens
                and token_id not in request.stop_token_ids
                and not (asked and request in asked)
            ):
                request_ids.append(request.request_id)
                others.append(token_id)
                continue
            if len(output) == 1:
                self._begin_output(request)
            reason = request.finish_reason
            if reason is not None:
                self._finish(request)
            news.append(
                TokenOutput(
                    request.request_id,
                    (token_id,),
                    reason,
                    request.started_s,
                    request.cached_tokens,
                    asked.get(request, b""),
                    scores.pop(request, b""),
                )
            )
        for request, packed in scores.items():
            if not request.ended:
                times = request.started_s, request.cached_tokens
                news.append(TokenOutput(request.request_id, (), None, *times, prompt_logprobs=packed))
        if record.constrained:
            self._life.books.tokens_known(record, [record.drawing[place] for place in refused])
        if self._trials.are_held:
            self._end_trial()
        return Outputs(tuple(news), tuple(request_ids), tuple(others))

    def step_took(self, step_id: int, milliseconds: float, ended_s: float) -> None:
        """What a step took on the device, and when it ended; called before its `update`. Raises KeyError if it is not
        in flight."""
        self._ended_s = ended_s
        record = self._life.in_flight.find(step_id)
        # What scored rows take comes on top, and says nothing of the bucket.
        if not record.scored and record.rows.num_rows >= FULL_SHARE * record.bucket.num_rows:
            self._model.correct(record.bucket, record.attended, milliseconds)
        else:
            self._model.pass_over(record.bucket)
        self._life.guard.step_measured(milliseconds)
        self.counters.step_took(record.bucket, milliseconds)

    def predict_ms(self, step_id: int) -> float | None:
        """How long a step in flight should take; None where nobody can know. Raises KeyError for any other step."""
        record = self._life.in_flight.find(step_id)
        return self._model.predict_ms(record.bucket, record.attended)

    def describe_step(self, step_id: int) -> StepDescription:
        """A plan in flight in terms of requests. `update` forgets it. Raises KeyError for any other step."""
        return StepDescription.of(self.find_step(step_id))

    def find_step(self, step_id: int) -> StepRecord:
        """The record of a plan in flight. Raises KeyError for any other step."""
        return self._life.in_flight.find(step_id)

    # --- the life of a worker group --------------------------------------------------------------------------

    def suspects(self) -> Sequence[Request]:
        """The requests whose rows are in the steps in flight, without those that have ended."""
        return self._life.suspects()

    def worker_lost(self) -> list[Request]:
        """The worker group has ended, and with it all pages and all steps in flight.

        Every request waits again, in its place of the order of service, with the tokens that it has emitted; this is no
        preemption. Nothing is planned until `renew`. Requests are added, cancelled and expire meanwhile as always.
        Returns those it has died of too often (see `trials`): the caller calls `fail_poisoned` with what it knows.
        """
        poisoned = self._trials.blame(self._life.suspects())
        self._is_served = False
        self._tenants.lose_slots()
        for request in self._requests.values():
            request.running = None
            request.num_stale = 0
            if request not in request.tenant.waiting:
                self._tenants.add(request)
        self._tenants.serve_only(None)
        self._life = self._life.successor()
        return poisoned

    def fail_poisoned(self, request: Request, last_words: str) -> Rejected:
        """Ends a request that ended worker groups."""
        self._end(request)
        self.counters.poisoned += 1
        message = (
            f"the worker ended {request.num_deaths} times while it computed this request, the last two times alone, so"
            f" the request is not tried again. The worker's last words: {last_words or 'none'}"
        )
        return Rejected(request.request_id, "PoisonedRequestError", message)

    def renew(self, step_times: StepTimeTable | None) -> None:
        """A new worker group serves, with the pages of the one before and the buckets that it began with. step_times:
        its own."""
        self._buckets.restart()
        self._life.serve(step_times)
        self._is_served = True

    def bucket_captured(self, bucket: Bucket, milliseconds: float | None) -> None:
        """Plans may use one more bucket. milliseconds: of a step that fills it, see `StepTimeTable`; None: the table
        has it, or there is none."""
        self._buckets.add(bucket)
        if milliseconds is not None:
            self._model.learn(bucket, milliseconds)
        self._life.budget.renew()

    @property
    def is_idle(self) -> bool:
        """Whether a group serves that has nothing to compute and will have nothing before a request arrives."""
        return self._is_served and not self._requests and not self._life.in_flight

    def _hold_trials(self) -> bool:
        """Whether a plan may be made: while suspects are tried, one of them runs and nobody beside it."""
        self._end_trial()
        if self._trials.tried is None:
            if self._life.in_flight:
                return False  # what is in flight is the one before
            self._tenants.serve_only(self._trials.next())
        return True

    def _end_trial(self) -> None:
        """One that has shown that it harms nobody waits until the others are tried too."""
        self._life.books.settle()  # one whose last row is planned holds nothing any more
        passed = self._trials.take_passed()
        if passed is not None and passed.running is not None:
            self._life.preemption.set_aside(passed.running)

    @property
    def epoch(self) -> int:
        """Number of the worker group's life."""
        return self._life.epoch

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
    def waiting_by_class(self) -> tuple[int, ...]:
        """The same, by service class."""
        return self._tenants.num_waiting_by_class()

    @property
    def pages_free(self) -> int:
        """Pages that no request holds, those the prefix cache keeps included."""
        return self._life.cache.pool.num_free

    @property
    def pages_cached(self) -> int:
        """Of the free pages: those that the prefix cache keeps."""
        return self._life.cache.pool.num_idle

    @property
    def pages_total(self) -> int:
        return self._life.cache.pool.num_pages

    @property
    def steps_in_flight(self) -> int:
        """Plans whose result has not arrived."""
        return len(self._life.in_flight)

    def report(self, sender: int = 0) -> EngineReport:
        """What those that route requests here have to know of it; sender: the one who asks."""
        return report_of(self._life, self._limits, self._tenants, self.counters.steps, self._is_served, sender)

    # --- requests leave --------------------------------------------------------------------------------------

    def _end(self, request: Request) -> None:
        """Forgets a request, wherever it is: waiting, running, or with nothing left but tokens in flight."""
        self._life.books.settle()
        request.ended = True
        del self._requests[request.request_id]
        self._deadlines.remove(request)
        if request.running is not None:
            self._life.books.release(request.running)
        elif request in request.tenant.waiting:
            self._tenants.remove(request)
        self._tenants.closed(request)

    def _begin_output(self, request: Request) -> None:
        """Its first token came with the newest step."""
        request.first_token_s = self._ended_s
        self.counters.first_token_came(request, self._ended_s)
        if request.running is not None:
            self._life.running.decodes.begin_output(request.running)

    def _finish(self, request: Request) -> None:
        self.counters.finished += 1
        self.counters.last_token_came(request, self._ended_s)
        self._life.guard.request_finished(request)
        self._end(request)

    def _fail(self, request: Request) -> Rejected:
        """Ends a request whose logits are not numbers."""
        self._end(request)
        self._life.cache.distrust(request.chain)
        self.counters.numerical_errors += 1
        message = (
            f"after {len(request.output)} of at most {request.max_tokens} tokens of output the model's logits were all"
            " NaN or -inf: look for NaN in the checkpoint's weights, or set dtype to 'float32' if its numbers overflow"
        )
        return Rejected(request.request_id, "NumericalError", message)


_Entry = TypeVar("_Entry")


def _without(places: Sequence[int], entries: Sequence[_Entry]) -> Sequence[_Entry]:
    if not places:
        return entries
    left_out = set(places)
    return [entry for place, entry in enumerate(entries) if place not in left_out]
