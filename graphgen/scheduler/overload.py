"""What is refused at once because it would wait too long, and when it may come back.

Owns estimates of how long the work ahead of a request takes. Never ends a request. Called by
`graphgen.scheduler.policy` when a request arrives.

The estimate for a request, in milliseconds:

    (steps of the prompts before it and of its own) * step with prompts  +  its output tokens * step while it decodes

- A step with prompts is as long as the budget makes it without a target while so many prompts wait, beside as many
  decodes as run by then.
- Steps of the prompts: their tokens over the prompt rows of such a step; or, if the slots do not suffice for all,
  the output tokens before it over the slots, where that is more.
- While it decodes, prompts that wait now are computed beside it, so a step is one with prompts for so long; after that
  it is a step of decodes.
- Output tokens: max_tokens times the share of it that the requests so far drew before they stopped.
- Each other tenant is served before the request as much as its own is until it starts, and none keeps it from a slot
  while its tenant holds less than its share of them.
"""

from graphgen.ipc.attended import Attended
from graphgen.ipc.errors import DeadlineError, OverloadedError
from graphgen.scheduler.buckets import BucketTable
from graphgen.scheduler.budget import StepBudget
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.request import Request
from graphgen.scheduler.running import RunningSet
from graphgen.scheduler.tenants import Tenants

_WEIGHT = 1.0 / 32
"""Of the newest value in a mean."""

_LEAST_RETRY_S, _MOST_RETRY_S = 0.1, 60.0
_DRAINED_SHARE = 0.25
"""`retry_after_s` is the time that serving this share of a full queue takes."""


class OverloadGuard:
    """Bounds the queue, and refuses what could not meet its deadline."""

    def __init__(
        self,
        limits: SchedulerLimits,
        buckets: BucketTable,
        budget: StepBudget,
        model: CostModel,
        running: RunningSet,
        tenants: Tenants,
    ) -> None:
        self._limits = limits
        self._buckets = buckets
        self._budget = budget
        self._model = model
        self._running = running
        self._tenants = tenants
        self._step_ms: float | None = None
        self._output_share = 1.0

    def step_measured(self, milliseconds: float) -> None:
        previous = milliseconds if self._step_ms is None else self._step_ms
        self._step_ms = previous + _WEIGHT * (milliseconds - previous)

    def request_finished(self, request: Request) -> None:
        share = len(request.output) / request.max_tokens
        self._output_share += _WEIGHT * (share - self._output_share)

    def expected_outputs(self) -> float:
        """Output tokens that all open requests are likely to draw yet. Those that wait are taken to want as many as
        those that run."""
        return self._outputs_left(self._tenants.num_waiting, 0.0)

    def expected_outputs_of(self, sender: int) -> float:
        """The part of them that a sender's requests draw."""
        running = [one.request for one in self._running]
        if not running:
            return 0.0
        own = [len(request.output) for request in running if request.sender == sender]
        num_waiting = self._tenants.of_sender[sender].num_waiting
        mean = self._output_share * sum(request.max_tokens for request in running) / len(running)
        return max(0.0, mean * (len(own) + num_waiting) - sum(own))

    def check_room(self, request: Request) -> None:
        """Raises OverloadedError when the queue is full. A tenant with less than its share of a full queue may still
        add to it."""
        limits, tenants, own = self._limits, self._tenants, request.tenant.waiting
        num_tenants = tenants.num_with(request.tenant)
        if tenants.num_waiting >= limits.max_waiting and len(own) >= limits.max_waiting // num_tenants:
            raise OverloadedError(
                f"{tenants.num_waiting} requests wait, max_waiting is {limits.max_waiting}: retry later or raise"
                " max_waiting",
                self._drain_s(),
            )
        # An empty queue takes any prompt that can be served at all.
        is_full = tenants.num_waiting_tokens + request.prompt_len > limits.max_waiting_tokens
        if own and is_full and own.num_tokens + request.prompt_len > limits.max_waiting_tokens // num_tenants:
            raise OverloadedError(
                f"{tenants.num_waiting_tokens} prompt tokens wait and the prompt has {request.prompt_len},"
                f" max_waiting_tokens is {limits.max_waiting_tokens}: retry later or raise max_waiting_tokens",
                self._drain_s(),
            )

    def check_deadline(self, request: Request, deadline_ms: float, num_cached: int) -> None:
        """Raises OverloadedError for a request whose output would not be complete `deadline_ms` after its arrival, and
        DeadlineError where it would not even if nothing else ran: trying again does not help it.

        num_cached: tokens of its prompt in the prefix cache. Where no step was ever timed, nothing is refused.
        """
        needed_ms = self._needed_ms(request, num_cached)
        if needed_ms is None or needed_ms <= deadline_ms:
            return
        alone_ms = self._alone_ms(request, num_cached)
        if alone_ms is not None and alone_ms > deadline_ms:
            raise DeadlineError(
                f"the output takes about {alone_ms:.0f} ms even if nothing else runs, deadline_ms is {deadline_ms:g}:"
                " raise deadline_ms or lower max_tokens"
            )
        raise OverloadedError(
            f"the output would be complete after about {needed_ms:.0f} ms, deadline_ms is {deadline_ms:g}:"
            f" {len(self._running)} requests run and {self._tenants.num_waiting} wait; retry later, raise deadline_ms"
            " or lower max_tokens",
            _bounded((needed_ms - deadline_ms) / 1000.0),
        )

    def _alone_ms(self, request: Request, num_cached: int) -> float | None:
        """As if it were the only request."""
        room, prompt_step_ms = self._prompt_step(0, request.prompt_len, request.prompt_len)
        decode_step_ms = self._decode_step_ms(0, request.prompt_len)
        if prompt_step_ms is None or decode_step_ms is None:
            return None
        prompt_ms = (request.prompt_len - num_cached) / room * prompt_step_ms
        return prompt_ms + request.max_tokens * self._output_share * decode_step_ms

    def _needed_ms(self, request: Request, num_cached: int) -> float | None:
        num_others = len(self._running) + self._tenants.num_waiting
        num_decodes = min(num_others, self._limits.num_slots - 1)
        begun_tokens = sum(begun.num_missing for begun in self._running.begun)
        pending_tokens = self._tenants.num_waiting_tokens + begun_tokens + request.prompt_len
        room, prompt_step_ms = self._prompt_step(num_decodes, request.prompt_len, pending_tokens)
        if prompt_step_ms is None:
            return None
        steps_before = (self._tokens_before(request) + begun_tokens) / room
        num_tokens = request.max_tokens * self._output_share
        if num_others >= self._limits.num_slots and not self._has_slot(request):
            steps_before = max(steps_before, self._outputs_before(request, num_tokens) / (num_decodes + 1))
        steps_before += (request.prompt_len - num_cached) / room
        all_prompt_steps = (self._tenants.num_waiting_tokens + begun_tokens) / room
        prompt_steps_beside = min(num_tokens, max(0.0, all_prompt_steps - steps_before)) if num_others else 0.0
        if num_others >= self._limits.num_slots:
            prompt_steps_beside = num_tokens  # a slot that becomes free brings the next prompt
        decode_step_ms = self._decode_step_ms(num_decodes, request.prompt_len) or prompt_step_ms
        return (steps_before + prompt_steps_beside) * prompt_step_ms + (
            num_tokens - prompt_steps_beside
        ) * decode_step_ms

    def _tokens_before(self, request: Request) -> int:
        """Prompt tokens that wait and are computed before it."""
        own = request.tenant.waiting
        before = own.num_tokens_from(request.priority)
        others = self._tenants.num_waiting_tokens - own.num_tokens
        num_others = self._tenants.num_with(request.tenant) - 1
        return before + min(others, num_others * (before + request.prompt_len))

    def _has_slot(self, request: Request) -> bool:
        """Whether a slot of another tenant is its tenant's to take."""
        tenant = request.tenant
        num_wanted = tenant.num_running + tenant.waiting.num_from(request.priority)
        num_tenants = self._tenants.num_with(tenant)
        return num_tenants > 1 and num_wanted < self._limits.num_slots // num_tenants

    def _outputs_before(self, request: Request, own_tokens: float) -> float:
        """Output tokens that are likely drawn before the request starts: of those that run, and of those that wait in
        its class or above, who are taken to want as many as those that run, or as itself if none runs."""
        return self._outputs_left(request.tenant.waiting.num_from(request.priority), own_tokens)

    def _outputs_left(self, num_waiting: int, own_tokens: float) -> float:
        """Of those that run and of so many that wait. own_tokens: of one that waits while nobody runs."""
        running = [one.request.max_tokens for one in self._running]
        drawn = sum(len(one.request.output) for one in self._running)
        mean = self._output_share * sum(running) / len(running) if running else own_tokens
        return max(0.0, mean * (len(running) + num_waiting) - drawn)

    def _positions(self, num_decodes: int, prompt_len: int) -> int:
        """That so many decodes attend to: as those that decode now do on average, or as a prompt of this length."""
        decodes = self._running.decodes
        return num_decodes * (decodes.num_positions // len(decodes) if len(decodes) else prompt_len)

    def _prompt_step(self, num_decodes: int, prompt_len: int, pending_tokens: int) -> tuple[int, float | None]:
        """Prompt rows of a step beside so many decodes while so many prompt tokens are left, and its milliseconds."""
        positions = self._positions(num_decodes, prompt_len)
        bucket = self._budget.usual(num_decodes, positions, pending_tokens) or self._buckets.all_mixed[0]
        attended = Attended(positions).with_chunk(0, bucket.prefill_rows)
        milliseconds = self._model.predict_ms(bucket, attended)
        return bucket.prefill_rows, milliseconds or self._step_ms

    def _decode_step_ms(self, num_decodes: int, prompt_len: int) -> float | None:
        """A step of these decodes and the request itself."""
        bucket = self._buckets.smallest(0, num_decodes + 1)
        return self._model.predict_ms(bucket, Attended(self._positions(num_decodes + 1, prompt_len))) or self._step_ms

    def _drain_s(self) -> float:
        num_decodes = min(len(self._running), self._limits.num_slots - 1)
        waiting_tokens = self._tenants.num_waiting_tokens
        room, step_ms = self._prompt_step(num_decodes, 0, waiting_tokens)
        if step_ms is None:
            return 1.0
        return _bounded(_DRAINED_SHARE * waiting_tokens / room * step_ms / 1000.0)


def _bounded(seconds: float) -> float:
    return min(max(seconds, _LEAST_RETRY_S), _MOST_RETRY_S)
