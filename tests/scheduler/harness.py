"""Runs a Scheduler against a FakeWorker, and checks every plan and every output against brute force."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from graphgen.ipc.codec import pack_int32, unpack_int32
from graphgen.ipc.engine_messages import FinishReason, Outputs, Submit
from graphgen.ipc.errors import DeadlineError, OverloadedError
from graphgen.ipc.step_schema import live_entries, logprob_words
from graphgen.ipc.worker_messages import Bucket, SamplerParams, StepPlan
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.mean_gaps import MOST_SKIPPED
from graphgen.scheduler.plan import StepDescription
from graphgen.scheduler.policy import Scheduler
from graphgen.scheduler.request import AGEING_S, RunningRequest
from tests.scheduler.fake_worker import FakeWorker, Row, Windows, generate, visible
from tests.scheduler.page_model import PageModel

BUCKETS = (Bucket(0, 1), Bucket(0, 2), Bucket(0, 4), Bucket(4, 2), Bucket(8, 2), Bucket(4, 4), Bucket(8, 4))

ESSENTIAL_BUCKETS = (Bucket(0, 4), Bucket(8, 2), Bucket(4, 4), Bucket(8, 4))
"""Of these, ones that hold every step, within any token budget from 8 to 12."""
RARE_BUCKETS = tuple(bucket for bucket in BUCKETS if bucket not in ESSENTIAL_BUCKETS)


def make_limits(
    *,
    buckets: tuple[Bucket, ...] = BUCKETS,
    num_pages: int = 12,
    page_size: int = 4,
    windows: Windows = (None,),
    num_slots: int = 4,
    max_chunks: int = 3,
    token_budget: int = 12,
    max_model_len: int = 64,
    steps_in_flight: int = 2,
    prefix_cache: bool = True,
    max_waiting: int = 100_000,
    max_waiting_tokens: int = 10**9,
    max_long_prompts: int = 1,
    max_scored_rows: int = 5,
    max_chunk_pages: int | None = None,
    pads: bool = True,
    num_senders: int = 1,
) -> SchedulerLimits:
    return SchedulerLimits(
        buckets=buckets,
        num_pages=num_pages,
        page_size=page_size,
        windows=windows,
        num_slots=num_slots,
        max_chunks=max_chunks,
        token_budget=token_budget,
        max_model_len=max_model_len,
        steps_in_flight=steps_in_flight,
        prefix_cache=prefix_cache,
        max_waiting=max_waiting,
        max_waiting_tokens=max_waiting_tokens,
        max_long_prompts=max_long_prompts,
        max_scored_rows=max_scored_rows,
        max_chunk_pages=max_chunk_pages,
        pads=pads,
        num_senders=num_senders,
    )


def make_submit(
    request_id: int,
    prompt: Sequence[int],
    max_tokens: int = 4,
    *,
    min_tokens: int = 0,
    stop: Sequence[int] = (),
    sampler: SamplerParams | None = None,
    arrived_s: float = 0.0,
    priority: int = 0,
    deadline_ms: float | None = None,
    itl_target_ms: float | None = None,
    ttft_target_ms: float | None = None,
    tpot_target_ms: float | None = None,
    cache_salt: str = "",
    tenant: str = "",
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> Submit:
    return Submit(
        request_id=request_id,
        prompt_token_ids=pack_int32(prompt),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=tuple(stop),
        sampler=sampler or SamplerParams(seed=request_id),
        arrived_s=arrived_s,
        priority=priority,
        deadline_ms=deadline_ms,
        itl_target_ms=itl_target_ms,
        ttft_target_ms=ttft_target_ms,
        tpot_target_ms=tpot_target_ms,
        cache_salt=cache_salt,
        tenant=tenant,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def most_windowed(limits: SchedulerLimits, window: int) -> int:
    """Pages that the window before a position and the longest chunk behind it can touch, and one more for a copy."""
    longest = max(bucket.prefill_rows for bucket in limits.buckets if bucket.num_rows <= limits.token_budget)
    return -(-(window - 1) // limits.page_size) + -(-longest // limits.page_size) + 1


def most_positions(limits: SchedulerLimits) -> int:
    """Positions of the longest request that fits into the pages."""
    positions = 0
    while positions + 1 < limits.max_model_len:
        num_pages = positions // limits.page_size + 1
        most = [num_pages if one is None else min(num_pages, most_windowed(limits, one)) for one in limits.windows]
        if sum(most) > limits.num_pages:
            break
        positions += 1
    return positions


Rows = Literal["any", "chunks", "decodes"]
"""Of a request."""


@dataclass
class Sender:
    """What the sender of one request knows: what it asked for, what it must get, what it got."""

    submit: Submit
    prompt: list[int]
    drawn: list[int]  # what the device draws, past any stop token
    expected: list[int]
    expected_reason: FinishReason
    received: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)  # positions of its prompt whose log-probabilities have come
    reason: FinishReason | None = None
    cancelled: bool = False
    kills_in: Rows | None = None  # rows with which it ends the worker that computes them
    draws_planned: int = 0
    started_s: float | None = None

    @property
    def is_live(self) -> bool:
        return self.reason is None and not self.cancelled

    @property
    def deadline_s(self) -> float:
        deadline_ms = self.submit.deadline_ms
        return float("inf") if deadline_ms is None else self.submit.arrived_s + deadline_ms / 1000.0

    @property
    def rank(self) -> tuple[float, int]:
        """The order of service, if requests are numbered as they arrive."""
        ttft_ms = self.submit.ttft_target_ms
        patience_s = AGEING_S if ttft_ms is None else min(ttft_ms / 1000.0, AGEING_S)
        return self.submit.arrived_s + patience_s - AGEING_S * self.submit.priority, self.submit.request_id


def make_sender(submit: Submit, windows: Windows = (None,)) -> Sender:
    prompt = list(unpack_int32(submit.prompt_token_ids))
    drawn = generate(prompt, submit.max_tokens, submit.stop_token_ids, submit.min_tokens, windows)
    stops = [i + 1 for i, token in enumerate(drawn) if token in submit.stop_token_ids and i >= submit.min_tokens]
    if stops:
        return Sender(submit, prompt, drawn, drawn[: stops[0]], "stop")
    return Sender(submit, prompt, drawn, drawn, "length")


def tokens_of(outputs: Outputs) -> dict[int, tuple[int, FinishReason | None]]:
    """By request: the token it gets from one step, and how it ended if it has."""
    tokens: dict[int, tuple[int, FinishReason | None]] = {}
    for output in outputs.outputs:
        if output.token_ids:
            (token_id,) = output.token_ids
            tokens[output.request_id] = token_id, output.finish_reason
        else:
            assert output.prompt_logprobs, "an output of nothing"
            assert output.finish_reason is None
    for request_id, token_id in zip(outputs.request_ids, outputs.token_ids, strict=True):
        tokens[request_id] = token_id, None
    ids = [output.request_id for output in outputs.outputs] + list(outputs.request_ids)
    assert len(set(ids)) == len(outputs), "two outputs of a request in one step"
    return tokens


def packed_logprobs(num_top: int, *words: int) -> bytes:
    """A row as a worker packs it, with these words in the place of numbers."""
    return pack_int32([*words, *[0] * (logprob_words(num_top) - len(words))])


LIGHT_ROW_MS, HEAVY_ROW_MS = 0.5, 20.0
"""What a row adds to a step, as on a GPU and as on a CPU: there several tenants let decodes rest."""


def step_ms(bucket: Bucket, row_ms: float = LIGHT_ROW_MS) -> float:
    """How long a step takes in these tests."""
    return 4.0 + row_ms * bucket.num_rows


class Harness:
    """One Scheduler, one FakeWorker, the senders, and a clock that a test may move."""

    def __init__(
        self,
        limits: SchedulerLimits,
        model: CostModel | None = None,
        *,
        prepares_at_once: bool = True,
        row_ms: float = LIGHT_ROW_MS,
    ) -> None:
        """prepares_at_once: after each plan; else only before the next one, when much may have happened since.
        row_ms: what a row adds to a step."""
        self.limits = limits
        self._row_ms = row_ms
        self.num_rests = 0  # decodes that had no row in a plan, of all plans
        self._prepares_at_once = prepares_at_once
        self.scheduler = Scheduler(limits, model)
        self.worker = FakeWorker(limits.num_pages, limits.page_size, limits.windows)
        self.pages = PageModel(limits.page_size, limits.windows, limits.prefix_cache)
        self.now_s = 0.0
        self._num_skipped = 0  # plans in a row without rows of the first in the order of service
        self.is_dead = False  # no worker group serves
        self.captured = set(limits.buckets)
        self._owners: dict[int, Submit] = {}  # by slot
        self._computed: dict[int, int] = {}  # by request: positions that the plans compute for the slot it has
        self.senders: dict[int, Sender] = {}
        self.results: deque[tuple[int, list[int], bytes, bytes]] = deque()
        self.descriptions: list[StepDescription] = []
        self.plans: list[StepPlan] = []

    # --- what the outside does -----------------------------------------------------------------------------

    def add(self, submit: Submit) -> bool:
        """Whether it was accepted; False if the scheduler refused it because of overload or for its deadline."""
        before = (self.scheduler.running, self.scheduler.waiting)
        try:
            self.scheduler.add(submit)
        except (OverloadedError, DeadlineError):
            assert before == (self.scheduler.running, self.scheduler.waiting), "something of it was kept"
            return False
        self.senders[submit.request_id] = make_sender(submit, self.limits.windows)
        return True

    def add_moved(self, submit: Submit, num_had: int, num_deaths: int = 0) -> None:
        """A request that had so many tokens of its output, not all, when its engine ended."""
        sender = make_sender(submit, self.limits.windows)
        sender.received = sender.expected[: min(num_had, len(sender.expected) - 1)]
        sender.draws_planned = len(sender.received)
        sender.scored = list(range(len(sender.prompt) - 1)) if sender.received else []
        moved = msgspec.structs.replace(
            submit, num_moves=1, output_token_ids=pack_int32(sender.received), num_deaths=num_deaths
        )
        self.scheduler.add(moved)
        self.senders[submit.request_id] = sender

    def cancel(self, request_id: int) -> None:
        self.scheduler.cancel(request_id)
        sender = self.senders.get(request_id)
        if sender is not None and sender.is_live:
            sender.cancelled = True

    def expire(self) -> list[int]:
        """Moves the scheduler's clock to `now_s`; the ids of the requests whose deadline has passed."""
        rejected = self.scheduler.expire(self.now_s)
        for one in rejected:
            sender = self.senders[one.request_id]
            assert one.error == "DeadlineError"
            assert sender.is_live, f"request {one.request_id} had ended"
            sender.cancelled = True
        late = [sender for sender in self.senders.values() if sender.is_live and sender.deadline_s <= self.now_s]
        assert not late, "a request outlived its deadline"
        return [one.request_id for one in rejected]

    def schedule(self) -> StepPlan | None:
        """Makes one plan, checks it, and executes it; its result waits in `results`."""
        if not self._prepares_at_once:
            self.scheduler.prepare()
        running, must_decode = self._running_ids(), self._decoding_ids()
        preemptions = self.scheduler.counters.preemptions
        plan = self.scheduler.schedule(self.now_s)
        if plan is None:
            return None
        description = self.scheduler.describe_step(plan.step_id)
        self._count_computed(plan, description)
        self.check_computed()
        if self._prepares_at_once:
            self.scheduler.prepare()
            self.check_computed()
        self._check_shape(plan, description)
        self._check_decodes(must_decode, description, self.scheduler.counters.preemptions - preemptions)
        self._check_first_advances(running, description)
        tokens, rows = self.worker.execute(plan)
        self._check_rows(rows, description)
        for chunk, (request_id, _, _) in zip(plan.chunks, description.chunks, strict=True):
            self._owners[chunk.slot] = self.senders[request_id].submit
        self.pages.lose(self._unsent_pages())
        senders = {slot: self.senders[owner.request_id] for slot, owner in self._owners.items()}
        contents = {slot: sender.prompt + sender.drawn for slot, sender in senders.items()}
        self.pages.take_plan(plan, self.worker, rows, self._owners, contents)
        self._count_draws(plan, description)
        for request_id, _, _ in description.chunks:
            sender = self.senders[request_id]
            sender.started_s = plan.planned_s if sender.started_s is None else sender.started_s
        of_prompts = self._score(plan, rows, description)
        self.results.append((plan.step_id, tokens, self._tell(plan, tokens, description), of_prompts))
        self.plans.append(plan)
        self.descriptions.append(description)
        return plan

    def deliver(self) -> Outputs:
        """Gives the scheduler the oldest result, and its outputs to the senders."""
        step_id, token_ids, of_tokens, of_prompts = self.results.popleft()
        self.scheduler.step_took(
            step_id, step_ms(self.scheduler.describe_step(step_id).bucket, self._row_ms), self.now_s
        )
        outputs = self.scheduler.update(step_id, token_ids, of_tokens, of_prompts)
        self.check_computed()
        self._check_logprobs(outputs)
        tokens = tokens_of(outputs)
        for request_id, (token_id, reason) in tokens.items():
            sender = self.senders[request_id]
            assert sender.is_live, f"request {request_id} had ended"
            sender.received.append(token_id)
            sender.reason = reason
            assert sender.received == sender.expected[: len(sender.received)]
            assert (sender.reason is not None) == (sender.received == sender.expected)
        for output in outputs.outputs:
            sender = self.senders[output.request_id]
            assert output.started_s == sender.started_s, "the time of the first chunk, also after a preemption"
        with_news = {output.request_id for output in outputs.outputs}
        firsts = {request_id for request_id in tokens if len(self.senders[request_id].received) == 1}
        assert firsts <= with_news, "a first token came without what is to be said of its request"
        return outputs

    def die(self, num_delivered: int = 0) -> list[int]:
        """The worker group dies; of its results that are on their way so many still arrive. Returns who fails of it.

        Nothing is planned until `renew`.
        """
        for _ in range(min(num_delivered, len(self.results))):
            self.deliver()
        order = self._order_of_service()
        self.is_dead = True
        computed = self._ids_in_flight()
        failed = self.scheduler.worker_lost()
        assert not failed or computed == {request.request_id for request in failed}, (
            "a request failed of another's rows"
        )
        self.results.clear()
        self.worker = FakeWorker(self.limits.num_pages, self.limits.page_size, self.limits.windows)
        self.pages.forget()
        self._owners.clear()
        for sender in self.senders.values():
            sender.draws_planned = len(sender.received)
        for request in failed:
            rejected = self.scheduler.fail_poisoned(request, "a last word")
            assert rejected.error == "PoisonedRequestError"
            assert "a last word" in rejected.message
            self.senders[rejected.request_id].cancelled = True
        scheduler = self.scheduler
        assert (scheduler.running, scheduler.steps_in_flight) == (0, 0)
        assert scheduler.pages_free == scheduler.pages_total
        lost = {request.request_id for request in failed}
        assert self._order_of_service() == [request_id for request_id in order if request_id not in lost]
        assert self.schedule() is None, "a plan was made while no worker serves"
        return sorted(lost)

    @property
    def _steps_in_flight(self) -> list[StepDescription]:
        return self.descriptions[len(self.descriptions) - len(self.results) :]

    def _ids_in_flight(self) -> set[int]:
        """Of the requests that live: those that have rows in steps whose results were not delivered."""
        ids = {entry[0] for step in self._steps_in_flight for entry in step.chunks}
        ids |= {request_id for step in self._steps_in_flight for request_id in step.decode_request_ids}
        return {request_id for request_id in ids if self.senders[request_id].is_live}

    def fatal_steps(self) -> list[bool]:
        """Of each step in flight, the oldest first: whether the worker ends of it, because of some `kills_in`."""
        fatal = []
        for step in self._steps_in_flight:
            in_chunks = (self.senders[entry[0]].kills_in in ("any", "chunks") for entry in step.chunks)
            in_decodes = (self.senders[one].kills_in in ("any", "decodes") for one in step.decode_request_ids)
            fatal.append(any(in_chunks) or any(in_decodes))
        return fatal

    def capture(self, bucket: Bucket) -> None:
        """The worker has captured one more."""
        self.captured.add(bucket)
        self.scheduler.bucket_captured(bucket, step_ms(bucket, self._row_ms))

    def renew(self) -> None:
        """Another group serves, with what it captures before it does."""
        self.is_dead = False
        self.captured = set(self.limits.buckets)
        self.scheduler.renew(None)

    def _order_of_service(self) -> list[int]:
        live = [sender for sender in self.senders.values() if sender.is_live]
        assert set(self.scheduler.request_ids) == {sender.submit.request_id for sender in live}
        waiting = [one for tenant in self.scheduler._tenants for one in tenant.waiting.first(10**6, 10**6)]
        ids = {one.request_id: one.rank for one in waiting}
        ids |= {one.request.request_id: one.request.rank for one in self.scheduler._life.running}
        ids |= {one.request_id: one.rank for one in self.scheduler._requests.values()}
        return sorted(ids, key=lambda request_id: ids[request_id])

    def run(self) -> None:
        """Until nothing is left to do; fails when that takes more steps than one request at a time would."""
        live = [sender for sender in self.senders.values() if sender.is_live]
        bound = 20 + 4 * sum(len(sender.prompt) + len(sender.drawn) for sender in live)
        for _ in range(bound):
            while self.schedule() is not None:
                pass
            if not self.results:
                break
            self.deliver()
        self.check_all_ended()

    # --- log-probabilities -------------------------------------------------------------------------------------

    def _score(self, plan: StepPlan, rows: list[Row], description: StepDescription) -> bytes:
        """What a worker says of the scored rows: whose they are, and where they stand in their prompts."""
        entries = live_entries(plan, "scored_rows")
        assert len(entries) <= self.limits.max_scored_rows
        ids = [request_id for request_id, _, length in description.chunks for _ in range(length)]
        packed = b""
        for row, token_id, asked in entries:
            sender, position = self.senders[ids[row]], rows[row].position
            assert sender.submit.prompt_logprobs == asked - 1
            assert token_id == sender.prompt[position + 1], "a row is asked for another token than its prompt's next"
            packed += packed_logprobs(asked - 1, position, sender.submit.request_id)
        return packed

    def _tell(self, plan: StepPlan, tokens: list[int], description: StepDescription) -> bytes:
        """What a worker says of the drawn tokens: which they are, and whose."""
        drawing = [entry[0] for entry, chunk in zip(description.chunks, plan.chunks, strict=True) if chunk.draws]
        packed = b""
        for request_id, token_id in zip((*drawing, *description.decode_request_ids), tokens, strict=True):
            num_top = self.senders[request_id].submit.logprobs
            packed += b"" if num_top is None else packed_logprobs(num_top, token_id, request_id)
        return packed

    def _check_logprobs(self, outputs: Outputs) -> None:
        """Each token brings its own, and each prompt its own, once, in order, at the latest with the first token."""
        for output in outputs.outputs:
            sender, request_id = self.senders[output.request_id], output.request_id
            num_top, of_prompt = sender.submit.logprobs, sender.submit.prompt_logprobs
            assert sender.is_live, f"request {request_id} had ended"
            expected = b"".join(packed_logprobs(num_top or 0, one, request_id) for one in output.token_ids)
            assert output.logprobs == (b"" if num_top is None else expected)
            if of_prompt is None:
                assert not output.prompt_logprobs
                continue
            width = len(packed_logprobs(of_prompt))
            for start in range(0, len(output.prompt_logprobs), width):
                part = output.prompt_logprobs[start : start + width]
                assert part == packed_logprobs(of_prompt, len(sender.scored), request_id)
                sender.scored.append(len(sender.scored))
            assert not output.token_ids or len(sender.scored) == len(sender.prompt) - 1
        for request_id in outputs.request_ids:
            assert self.senders[request_id].submit.logprobs is None, "a token came without its log-probability"

    # --- what must hold ------------------------------------------------------------------------------------

    def check_all_ended(self) -> None:
        scheduler = self.scheduler
        for request_id, sender in self.senders.items():
            if sender.cancelled:
                continue
            assert sender.received == sender.expected, f"request {request_id}"
            assert sender.reason == sender.expected_reason, f"request {request_id}"
        assert (scheduler.running, scheduler.waiting, scheduler.steps_in_flight) == (0, 0, 0)
        assert scheduler.pages_free == scheduler.pages_total == self.limits.num_pages
        assert scheduler.counters.finished == sum(sender.reason is not None for sender in self.senders.values())

    def check_page_owners(self) -> None:
        """Every page is free or has holders. The policy's own tables are read here: no plan shows them whole."""
        pool = self.scheduler._life.cache.pool
        held = Counter(page for running in self.scheduler._life.running for page in running.all_pages())
        assert {page: pool.num_holders(page) for page in range(pool.num_pages) if pool.num_holders(page)} == held
        assert len(held) + self.scheduler.pages_free == self.limits.num_pages
        assert not set(held) & {*pool._empty, *pool._idle}
        for running in self.scheduler._life.running:
            self._check_windows(running)
        slots = [running.slot for running in self.scheduler._life.running]
        assert len(set(slots)) == len(slots)
        assert len(slots) + self.scheduler._life.running.num_free_slots == self.limits.num_slots

    def _check_windows(self, running: RunningRequest) -> None:
        """It holds what its next row reads, and behind a window no more than the longest chunk may need."""
        size, position = self.limits.page_size, self.scheduler._life.running.num_computed(running)
        for table, window in zip(running.tables, self.limits.windows, strict=True):
            assert table.first * size <= max(0, position - (position if window is None else window - 1))
            assert table.end * size >= min(position, running.request.end_position)
            assert window is None or len(table.pages) <= most_windowed(self.limits, window)

    def check_computed(self) -> None:
        """How far the policy says that a request is computed, the plans say too: at every moment."""
        running = self.scheduler._life.running
        found = {one.request.request_id: running.num_computed(one) for one in running}
        assert found == {request_id: self._computed[request_id] for request_id in found}

    def check_tenants(self) -> None:
        """What is counted of each tenant is what there is of it. Read from the policy's own tables, as pages are."""
        scheduler, tenants = self.scheduler, list(self.scheduler._tenants)
        live = Counter(sender.submit.tenant for sender in self.senders.values() if sender.is_live)
        assert {tenant.name: tenant.num_open for tenant in tenants} == live
        running = [one.request for one in scheduler._life.running]
        assert {tenant.name: tenant.num_running for tenant in tenants if tenant.num_running} == Counter(
            request.tenant.name for request in running
        )
        for tenant in tenants:
            own = [one for one in scheduler._life.running if one.request.tenant is tenant]
            assert tenant.num_decodes == sum(one.decode_row is not None for one in own)
            assert tenant.num_resting == sum(one in scheduler._life.running.resting for one in own)
            assert tenant.lowest_class == min((one.request.priority for one in own), default=None)
        assert scheduler.waiting == sum(len(tenant.waiting) for tenant in tenants)
        assert scheduler._tenants.num_waiting_tokens == sum(tenant.waiting.num_tokens for tenant in tenants)
        turns = scheduler._tenants._turns
        assert {*turns} == {tenant for tenant in tenants if tenant.waiting}
        assert [tenant.turn for tenant in turns] == sorted(tenant.turn for tenant in turns)

    def _unsent_pages(self) -> set[int]:
        """Those of prompts that have no chunk in the newest plan: the next one's entries of their block tables."""
        tables = [table for running in self.scheduler._life.running for table in running.tables]
        return {page for table in tables for page in table.part(table.num_sent, table.end)}

    def _running_ids(self) -> list[int]:
        """Requests that hold a slot and still need rows, in the order of service."""
        return [running.request.request_id for running in self.scheduler._life.running]

    def _decoding_ids(self) -> list[int]:
        """Requests that must decode in the next plan, unless it preempts them or they rest; oldest first."""
        running = self.scheduler._life.running
        return [one.request.request_id for one in running if one.decode_row is not None or one in running.resting]

    def _check_shape(self, plan: StepPlan, description: StepDescription) -> None:
        limits, bucket = self.limits, plan.bucket
        num_chunk_tokens = sum(chunk.length for chunk in plan.chunks)
        num_decodes = plan.num_decodes
        assert bucket in self.captured, "a step without a graph"
        holds = [one for one in self.captured if one.num_rows <= limits.token_budget]
        holds = [one for one in holds if one.prefill_rows >= num_chunk_tokens and one.decode_rows >= num_decodes]
        assert bucket.num_rows == min(one.num_rows for one in holds), "a captured bucket would pad less"
        assert bucket.num_rows <= limits.token_budget
        assert num_chunk_tokens <= bucket.prefill_rows
        assert num_decodes <= bucket.decode_rows
        assert num_chunk_tokens + num_decodes > 0
        assert len(plan.chunks) <= limits.max_chunks
        seen_pages = sum(-(-(chunk.start + chunk.length) // limits.page_size) for chunk in plan.chunks)
        assert limits.max_chunk_pages is None or seen_pages <= limits.max_chunk_pages
        assert all(chunk.length > 0 for chunk in plan.chunks)
        assert description.padding_rows == bucket.num_rows - num_chunk_tokens - num_decodes
        ids = [chunk[0] for chunk in description.chunks] + list(description.decode_request_ids)
        assert len(set(ids)) == len(ids), "a request has two entries in one step"
        assert all(self.senders[request_id].is_live for request_id in ids), "an ended request was planned"

    def _check_decodes(self, must_decode: list[int], description: StepDescription, preempted: int) -> None:
        """All decode, except those that this plan preempted: requests that are served after those who stay; and those
        that rest."""
        planned = set(description.decode_request_ids)
        assert planned <= set(must_decode)
        resting = {one.request.request_id for one in self.scheduler._life.running.resting} & set(must_decode)
        assert not resting & planned
        missing = set(must_decode) - planned - resting
        assert len(missing) <= preempted
        assert not missing & set(self._running_ids()) - {chunk[0] for chunk in description.chunks}
        if resting and not preempted:
            self._check_rests(resting, planned)
        self.num_rests += len(resting)

    def _check_rests(self, resting: set[int], planned: set[int]) -> None:
        """Only decodes of tenants that have as many others as any tenant rest, and never all of a tenant's."""
        open_tenants = {self.senders[request_id].submit.tenant for request_id in self.scheduler.request_ids}
        assert len(open_tenants) > 1, "a lone tenant's decode rests"
        num_rows = Counter(self.senders[request_id].submit.tenant for request_id in planned)
        for request_id in resting:
            own = num_rows[self.senders[request_id].submit.tenant]
            assert own >= 1, "all decodes of a tenant rest"
            assert own >= max(num_rows.values()) - 1, "a decode rests although its tenant has less than another"

    def _check_first_advances(self, running: list[int], description: StepDescription) -> None:
        """The first in the order of service has rows in every plan, unless one that is served before it takes over;
        where a decode has a target for its mean gap, in one of some plans. Of several tenants each has its turn."""
        if len({self.senders[request_id].submit.tenant for request_id in self.scheduler.request_ids}) > 1:
            return
        planned = {chunk[0] for chunk in description.chunks} | set(description.decode_request_ids)
        self._num_skipped += 1
        if not running or running[0] in planned:
            self._num_skipped = 0
        elif self._num_skipped > MOST_SKIPPED or not any(
            self.senders[request_id].submit.tpot_target_ms for request_id in description.decode_request_ids
        ):
            first = min(self.senders[request_id].rank for request_id in planned)
            assert first < self.senders[running[0]].rank, "the first in the order of service did not advance"

    def _check_rows(self, rows: list[Row], description: StepDescription) -> None:
        """Every row read exactly the tokens of its request, also where the request has ended meanwhile."""
        places = [
            (request_id, position)
            for request_id, start, length in description.chunks
            for position in range(start, start + length)
        ]
        for row, (request_id, position) in zip(rows, places, strict=False):
            assert row.position == position, f"request {request_id}"
        owners = [request_id for request_id, _ in places] + list(description.decode_request_ids)
        for row, request_id in zip(rows, owners, strict=True):
            sender = self.senders[request_id]
            right = (sender.prompt + sender.drawn)[: row.position + 1]
            for context, window in zip(row.contexts, self.limits.windows, strict=True):
                assert context == visible(right, window), f"request {request_id} at position {row.position}"

    def _count_computed(self, plan: StepPlan, description: StepDescription) -> None:
        for request_id, start, length in description.chunks:
            self._computed[request_id] = start + length
        positions = unpack_int32(plan.decode_positions)
        for request_id, position in zip(description.decode_request_ids, positions, strict=True):
            self._computed[request_id] = position + 1

    def _count_draws(self, plan: StepPlan, description: StepDescription) -> None:
        """No request draws more than max_tokens, not even by a step made before its last token was known."""
        drawing = [entry[0] for entry, chunk in zip(description.chunks, plan.chunks, strict=True) if chunk.draws]
        for request_id in (*drawing, *description.decode_request_ids):
            sender = self.senders[request_id]
            sender.draws_planned += 1
            assert sender.draws_planned <= sender.submit.max_tokens, f"request {request_id}"
