"""What the scheduler knows of one request.

`Request` lives from submission to the finish reason. `RunningRequest` is what it holds while it runs: a slot and
pages. It ends with the request, its preemption or the worker group; whoever starts the request again makes a new one.
How far a request is computed, `graphgen.scheduler.running` knows. Both are plain state, which the parts of the policy
change; only what is said of the order of service never changes.

Order of service. A request has a rank that never changes, and of one tenant's the lowest is served first:

    (arrived_s + patience - AGEING_S * priority, arrival)

Its patience is its TTFT target, at most AGEING_S, which it also is if it states none. So a service class is worth
AGEING_S seconds of waiting: among requests that arrive together classes are strict. Within a class the first to arrive
is served first, but for TTFT targets: the request that is due first. And nothing that arrives
AGEING_S * (MAX_PRIORITY - priority) + patience seconds after a request is ever served before it: that is the bound on
starvation. Whose turn it is among tenants: see `graphgen.scheduler.tenants`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from graphgen.ipc.codec import pack_int32, unpack_int32
from graphgen.ipc.engine_messages import MAX_PRIORITY, MAX_TARGET_MS, FinishReason, Submit
from graphgen.ipc.errors import InvalidRequestError
from graphgen.ipc.worker_messages import MAX_LOGPROBS, SamplerParams, SlotInit
from graphgen.scheduler.page_chain import PageChain
from graphgen.scheduler.page_groups import BlockTable
from graphgen.scheduler.tokens import Tokens

if TYPE_CHECKING:
    from graphgen.scheduler.tenants import Tenant

AGEING_S = 10.0
"""Seconds of waiting that are worth one service class, and the patience of a request that states none."""

MAX_PREEMPTIONS = 3
"""Times a request may lose its slot and pages. After that it is admitted with every page it can ever need, and keeps
them."""

MOST_BROUGHT = 2
"""Deaths elsewhere that count here: with the next one it runs alone, and only what it does then can fail it."""

LEAST_CAUTION, MOST_CAUTION = 2, 16
"""Tokens that a request with a grammar awaits one by one after refusals close to each other, of which each doubles
them. Where every mask comes too late for what is drawn ahead, 16 make 35 steps of 17 tokens, 3 % more than if all were
awaited."""
FREE_RUN = 3
"""Tokens drawn ahead and allowed, after which a refusal alone makes no request cautious: one in so many costs no more
than awaiting them all."""

Rank = tuple[float, int]


class Request:
    """One prompt with its sampling parameters, and every token it has got so far."""

    __slots__ = (
        "_next_caution",
        "_num_ahead",
        "_slot_init",
        "arrival",
        "cached_tokens",
        "caution",
        "chain",
        "deadline_s",
        "death_len",
        "end_position",
        "ended",
        "first_token_s",
        "is_constrained",
        "is_counted",
        "itl_target_ms",
        "last_step",
        "log_id",
        "logprobs",
        "max_cached_len",
        "max_tokens",
        "min_tokens",
        "num_admissions",
        "num_deaths",
        "num_fruitless_deaths",
        "num_preemptions",
        "num_scored",
        "num_stale",
        "output",
        "priority",
        "prompt_len",
        "prompt_logprobs",
        "rank",
        "request_id",
        "running",
        "sender",
        "started_s",
        "stop_token_ids",
        "tenant",
        "times_passed",
        "tokens",
        "tpot_target_ms",
        "ttft_by_s",
        "ttft_target_ms",
    )

    def __init__(
        self, submit: Submit, arrival: int, arrived_s: float, page_size: int, tenant: "Tenant", sender: int = 0
    ) -> None:
        """arrival: its number; arrived_s: submit.arrived_s, or later if it is out of order. sender: whose it is. Raises
        InvalidRequestError for fields that no request can have."""
        _check(submit)
        self.request_id = submit.request_id
        self.log_id = submit.log_id or str(submit.request_id)
        self.tenant = tenant
        self.sender = sender
        self.arrival = arrival  # the order of service within a class; unlike arrived_s it has no ties
        self.priority = submit.priority
        self.rank: Rank = (arrived_s + _patience_s(submit) - AGEING_S * submit.priority, arrival)
        self.tokens = _unpack(submit)
        self.output = self.tokens.output  # what has arrived of it
        self.chain = PageChain(self.tokens, page_size, submit.cache_salt)
        self.prompt_len = len(self.tokens.prompt)
        # Of the output: its end, and up to where no stop token ends it.
        self.max_tokens = submit.max_tokens
        self.min_tokens = submit.min_tokens
        self.stop_token_ids = frozenset(submit.stop_token_ids)
        # The last token of the output is never computed: nothing is drawn after it.
        self.end_position = self.prompt_len + self.max_tokens - 1
        self.is_constrained = bool(submit.grammar)
        # With a grammar: whether the device counts its tokens, for penalties; the tokens that it awaits before it runs
        # ahead again, those of the next refusal, those that were drawn ahead since the last, and its rows in flight
        # whose draws mean nothing.
        self.is_counted = _is_penalised(submit.sampler)
        self.caution, self._next_caution, self._num_ahead = 0, LEAST_CAUTION, 0
        self.num_stale = 0
        self._slot_init = SlotInit(
            prompt_len=self.prompt_len,
            min_length=self.prompt_len + self.min_tokens,
            stop_token_ids=submit.stop_token_ids,
            sampler=submit.sampler,
            max_len=self.prompt_len + self.max_tokens,
            logprobs=submit.logprobs,
            grammar=submit.grammar,
        )
        self.logprobs = submit.logprobs
        self.prompt_logprobs = submit.prompt_logprobs
        # Of the rows of its prompt: those whose log-probabilities have arrived, all of them before the first token.
        self.num_scored = self.prompt_len - 1 if self.output else 0
        self.max_cached_len = _max_cached_len(submit.sampler, self.prompt_len, self.max_tokens)
        self.itl_target_ms = submit.itl_target_ms
        self.tpot_target_ms = submit.tpot_target_ms
        self.ttft_target_ms = submit.ttft_target_ms
        self.ttft_by_s = None if submit.ttft_target_ms is None else submit.arrived_s + submit.ttft_target_ms / 1000.0
        self.deadline_s = None if submit.deadline_ms is None else submit.arrived_s + submit.deadline_ms / 1000.0
        self.last_step = -1  # the newest step that draws a token for it, as of when it last had no row any more
        self.cached_tokens = 0  # of the prompt, found in the prefix cache by its first admission
        self.num_admissions = 0
        self.num_preemptions = 0
        # Of worker groups that computed it, see `graphgen.scheduler.trials`: those in a row, of these the last ones
        # without a new token in between, and the tokens of output at the last one.
        self.num_deaths = self.num_fruitless_deaths = min(submit.num_deaths, MOST_BROUGHT)
        self.death_len = len(self.output) if submit.num_deaths else 0
        self.times_passed = 0  # plans in which a younger request was admitted while this one did not fit
        self.started_s = submit.arrived_s  # when its first chunk was planned; its arrival until then
        self.first_token_s = submit.first_token_s  # when the step that drew it ended; None until then
        self.ended = False  # finished or cancelled: tokens that still arrive are dropped
        self.running: RunningRequest | None = None  # None while it holds no slot and no pages

    def init_slot(self) -> SlotInit:
        """What the worker must know of it when it gets a slot. Its grammar has to follow the tokens that it has."""
        if not self.is_constrained:
            return self._slot_init
        return msgspec.structs.replace(self._slot_init, output_token_ids=pack_int32(self.output))

    @property
    def is_scored(self) -> bool:
        """Whether rows of its prompt are still to be computed for what they say of the prompt's next token."""
        return self.prompt_logprobs is not None and self.num_scored < self.prompt_len - 1

    @property
    def asks_for_gaps(self) -> bool:
        """Whether it has a target for the gaps between its tokens."""
        return self.itl_target_ms is not None or self.tpot_target_ms is not None

    @property
    def runs_ahead(self) -> bool:
        """With a grammar: whether it draws the next token before the grammar has seen this one, as requests without a
        grammar do. What it draws is looked at when it arrives."""
        return not (self.caution or self.is_counted)

    def draw_allowed(self) -> None:
        """Its grammar has allowed a token."""
        if self.caution:
            self.caution -= 1
        else:
            self._num_ahead += 1

    def draw_refused(self) -> None:
        """Its grammar has refused one. A token that is drawn ahead and refused costs three steps, one awaited two."""
        if self._num_ahead >= FREE_RUN:
            self._next_caution = LEAST_CAUTION
        else:
            self.caution = self._next_caution
            self._next_caution = min(2 * self._next_caution, MOST_CAUTION)
        self._num_ahead = 0

    @property
    def has_output_to_come(self) -> bool:
        """Whether its output goes on behind what it has of it."""
        return not self.output or self.finish_reason is None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Whether the newest token of the output is the last one.

        Stop tokens count from the one after `min_tokens` on: the device does not draw them earlier.
        """
        num_tokens = len(self.output)
        if self.output[-1] in self.stop_token_ids and num_tokens > self.min_tokens:
            return "stop"
        return "length" if num_tokens >= self.max_tokens else None


class RunningRequest:
    """A request's slot and pages, and how far the plans so far compute what it knew when it got them."""

    __slots__ = (
        "decode_row",
        "is_announced",
        "is_long",
        "is_reserved",
        "num_prefilled",
        "prefill_end",
        "request",
        "slot",
        "tables",
    )

    def __init__(
        self,
        request: Request,
        slot: int,
        tables: Sequence[BlockTable],
        num_cached: int,
        is_reserved: bool,
        is_long: bool,
    ) -> None:
        """tables: of each page group. num_cached: its first tokens that need not be computed, those in shared pages and
        those that are copied."""
        self.request = request
        self.slot = slot
        self.tables = tables
        self.is_announced = False  # the worker knows that the slot has a new owner
        self.is_reserved = is_reserved  # it holds every page it can ever need at once and is never preempted
        self.is_long = is_long  # its prompt leaves room to others, to its last chunk
        # Everything known at admission is computed as chunks: after a preemption that is prompt and output.
        # From there on every position is a decode row, whose token the device feeds back.
        self.prefill_end = len(request.tokens)
        self.num_prefilled = num_cached  # of these tokens: those that plans compute or that were cached
        self.decode_row: int | None = None  # its place in the decode set; None while it has none

    @property
    def num_pages(self) -> int:
        """Pages that it holds, of all groups."""
        return sum(len(table.pages) for table in self.tables)

    def all_pages(self) -> list[int]:
        return [page for table in self.tables for page in table.pages]

    @property
    def num_missing(self) -> int:
        """Known tokens that no plan computes yet."""
        return self.prefill_end - self.num_prefilled


def _patience_s(submit: Submit) -> float:
    return AGEING_S if submit.ttft_target_ms is None else min(submit.ttft_target_ms / 1000.0, AGEING_S)


def _max_cached_len(sampler: SamplerParams, prompt_len: int, max_tokens: int) -> int:
    """Up to where a request may skip computing its tokens.

    The device counts, for the penalties, the tokens that it computes for a slot: a repetition penalty needs them all,
    the other two those of the output, which a preempted request computes again.
    """
    if sampler.repetition_penalty != 1.0:
        return 0
    return prompt_len if sampler.presence_penalty or sampler.frequency_penalty else prompt_len + max_tokens


def _is_penalised(sampler: SamplerParams) -> bool:
    return sampler.repetition_penalty != 1.0 or bool(sampler.presence_penalty or sampler.frequency_penalty)


def _check(submit: Submit) -> None:
    if not 0 <= submit.priority <= MAX_PRIORITY:
        raise InvalidRequestError(f"priority is {submit.priority}: use an integer from 0 to {MAX_PRIORITY}")
    for name in ("deadline_ms", "itl_target_ms", "ttft_target_ms", "tpot_target_ms"):
        value = getattr(submit, name)
        if value is not None and not 0 < value <= MAX_TARGET_MS:
            raise InvalidRequestError(
                f"{name} is {value}: use milliseconds above 0 and up to {MAX_TARGET_MS:g}, or none"
            )
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(submit, name)
        if value is not None and not 0 <= value <= MAX_LOGPROBS:
            raise InvalidRequestError(f"{name} is {value}: use an integer from 0 to {MAX_LOGPROBS}, or none")


def _unpack(submit: Submit) -> Tokens:
    parts = []
    for name, packed in (("prompt", submit.prompt_token_ids), ("output", submit.output_token_ids)):
        try:
            parts.append(unpack_int32(packed))
        except ValueError:
            raise InvalidRequestError(
                f"the {name} of request {submit.request_id} has {len(packed)} bytes, which is no multiple of 4: pack"
                " its token ids as int32"
            ) from None
    return Tokens(*parts)
