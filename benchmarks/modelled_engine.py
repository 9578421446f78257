"""An engine in virtual time whose steps cost what a table says, without the scheduler: hundreds of them run at once.

Owns requests, a prefix cache and its clock. It does what the policy does in the main: decodes first, prompts in the
order of arrival in what is left of a step's rows, one request a slot, pages of prompts shared and given up in the order
of their last use. Steps without prompts are taken many at a time. `benchmarks.simulated_replicas` holds it against the
real scheduler.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from heapq import heappop, heappush
from math import ceil, inf

import numpy as np
from msgspec import Struct

from benchmarks.conversations import Turn
from benchmarks.virtual_engine import HOST_DELAY_S
from graphgen.ipc.attended import Attended
from graphgen.ipc.reports import EngineReport
from graphgen.ipc.worker_messages import StepTimeTable

LEAST_PROMPT_ROWS = 64
"""That a step has for prompts however many decode."""


class Heard(Struct):
    """What a request gets: its first token, or its last one."""

    request_id: int
    num_new: int  # tokens, since it was heard of last
    cached_tokens: int | None  # with its first token
    is_last: bool


class StepCosts(Struct, frozen=True):
    """Milliseconds of a step: base + prompt_row * rows of prompts + decode_row * decodes, and what they attend to."""

    base: float
    prompt_row: float
    decode_row: float
    decode_position: float
    prompt_pair: float
    chunk_position: float
    context: int  # positions of each decode that decode_row includes
    prompt_start: int  # position at which a prompt's rows are that prompt_row includes
    num_rows: int  # of a full step

    @classmethod
    def of(cls, table: StepTimeTable, num_rows: int) -> "StepCosts":
        """Least squares over the buckets of at most so many rows, each error as a share of its time."""
        times = [one for one in table.times if one.bucket.num_rows <= num_rows]
        rows = np.array([[1.0, one.bucket.prefill_rows, one.bucket.decode_rows] for one in times])
        milliseconds = np.array([one.milliseconds for one in times])
        base, prompt_row, decode_row = np.linalg.lstsq(rows / milliseconds[:, None], np.ones(len(times)))[0]
        return cls(
            float(base),
            float(prompt_row),
            float(decode_row),
            table.ms_per_decode_position,
            table.ms_per_prompt_pair,
            table.ms_per_chunk_position,
            table.decode_context,
            table.prompt_start,
            num_rows,
        )

    def step_s(self, prompt_rows: int, num_decodes: int, attended: Attended) -> float:
        """prompt_rows: all of the step's chunks."""
        chunk_positions = attended.chunk_positions - (self.prompt_start + prompt_rows if prompt_rows else 0)
        milliseconds = (
            self.base
            + self.prompt_row * prompt_rows
            + self.prompt_pair * (attended.prompt_pairs - prompt_rows * self.prompt_start)
            + self.chunk_position * chunk_positions
            + self.decode_row * num_decodes
            + self.decode_position * (attended.decode_positions - num_decodes * self.context)
        )
        return max(milliseconds, 0.2 * self.base) / 1000.0


class _Request:
    __slots__ = ("cached", "digests", "left", "num_heard", "output_digests", "output_len", "prompt_len", "request_id")

    def __init__(self, request_id: int, turn: Turn, num_output: int) -> None:
        self.request_id = request_id
        self.prompt_len = turn.prompt_len + num_output
        self.output_len = turn.output_len - num_output
        self.digests, self.output_digests = turn.digests, turn.output_digests
        self.left = self.prompt_len  # of its prompt, to compute
        self.cached = 0
        self.num_heard = 0


class ModelledEngine:
    """One engine. `next_s` is when `advance` is to be called; infinity while there is nothing to do."""

    def __init__(self, costs: StepCosts, num_slots: int, num_pages: int, page_size: int) -> None:
        self._costs = costs
        self._num_slots = num_slots
        self._num_pages = num_pages
        self._page_size = page_size
        self.pace = 1.0
        """Steps take so many times as long."""
        self.epoch = 0
        self._reset()

    def _reset(self) -> None:
        self.next_s = inf
        self._waiting: deque[_Request] = deque()
        self._begun: deque[_Request] = deque()
        self._completing: list[_Request] = []
        self._decodes: list[tuple[int, int, _Request]] = []  # a heap: the step of its last token
        self._positions = 0  # that the decodes attend to
        self._last_steps = 0  # their sum, of the decodes
        self._prompt_tokens = 0
        self._waiting_outputs = 0
        self._num_steps = 0
        self._at_s = 0.0  # the end of the newest step
        self._step_s, self._num_planned = 0.0, 0
        self._pages: OrderedDict[bytes, None] = OrderedDict()  # the oldest first

    def end(self) -> dict[int, int]:
        """It dies, and begins anew with nothing. Returns what open requests got since they were heard of last."""
        emitted = {
            request.request_id: request.output_len - (last_step - self._num_steps) - request.num_heard
            for last_step, _, request in self._decodes
        }
        self.epoch += 1
        self._reset()
        return emitted

    def submit(self, request_id: int, turn: Turn, num_output: int, tenant: str, now_s: float) -> None:
        """num_output: tokens that it got elsewhere, which are computed like its prompt. tenant: makes no difference."""
        request = _Request(request_id, turn, num_output)
        self._waiting.append(request)
        self._prompt_tokens += request.left
        self._waiting_outputs += request.output_len
        if self.next_s == inf:
            self._at_s = now_s + HOST_DELAY_S
            self._plan()
        elif self._num_planned > 1:  # steps of decodes alone: the prompt joins the next one
            self._num_planned = min(self._num_planned, max(1, ceil((now_s - self._at_s) / self._step_s)))
            self.next_s = self._at_s + self._num_planned * self._step_s

    def advance(self) -> list[Heard]:
        """The steps that were planned have ended."""
        count = self._num_planned
        self._num_steps += count
        self._at_s = self.next_s
        self._positions += len(self._decodes) * count
        heard = []
        while self._decodes and self._decodes[0][0] <= self._num_steps:
            last_step, _, request = heappop(self._decodes)
            self._last_steps -= last_step
            self._positions -= request.prompt_len + request.output_len
            self._keep(request.output_digests)
            heard.append(Heard(request.request_id, request.output_len - 1, None, True))
        for request in self._completing:
            is_last = request.output_len == 1
            heard.append(Heard(request.request_id, 1, request.cached, is_last))
            request.num_heard = 1
            self._waiting_outputs -= request.output_len
            if not is_last:
                last_step = self._num_steps + request.output_len - 1
                heappush(self._decodes, (last_step, request.request_id, request))
                self._last_steps += last_step
                self._positions += request.prompt_len + 1
        self._plan()
        return heard

    def report(self) -> EngineReport:
        costs, pace = self._costs, self.pace / 1000.0
        num_decodes = len(self._decodes)
        full_ms = costs.base + costs.prompt_row * costs.num_rows
        slots_ms = costs.base + costs.decode_row * self._num_slots
        return EngineReport(
            epoch=self.epoch,
            is_serving=True,
            num_open=num_decodes + len(self._waiting) + len(self._begun) + len(self._completing),
            num_tenants=1,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._last_steps - num_decodes * self._num_steps + self._waiting_outputs,
            num_others=0,  # one router has all of them
            others_prompt_tokens=0,
            others_output_tokens=0,
            num_steps=self._num_steps,
            pages_free=self._num_pages,
            prompt_token_s=full_ms / costs.num_rows * pace,
            output_token_s=slots_ms / self._num_slots * pace,
            step_s=self._step_s,
        )

    def _plan(self) -> None:
        """The next step, or all steps until a decode ends."""
        costs, decodes = self._costs, self._decodes
        num_decodes = len(decodes)
        room = max(costs.num_rows - num_decodes, LEAST_PROMPT_ROWS)
        rows, attended = 0, Attended()
        completing = self._completing = []
        begun = self._begun
        while rows < room:
            if not begun:
                if not self._waiting or num_decodes + len(completing) >= self._num_slots:
                    break
                begun.append(self._admit(self._waiting.popleft()))
            request = begun[0]
            length = min(request.left, room - rows)
            start = request.prompt_len - request.left
            attended = attended.with_chunk(start, length)
            rows += length
            request.left -= length
            if not request.left:
                completing.append(begun.popleft())
        self._prompt_tokens -= rows
        if rows:
            self._num_planned = 1
        elif num_decodes:
            self._num_planned = decodes[0][0] - self._num_steps
        else:
            self.next_s, self._num_planned = inf, 0
            return
        attended = attended._replace(decode_positions=self._positions + num_decodes * self._num_planned // 2)
        self._step_s = self.pace * costs.step_s(rows, num_decodes, attended)
        self.next_s = self._at_s + self._num_planned * self._step_s

    def _admit(self, request: _Request) -> _Request:
        """It takes what the prefix cache has of its prompt, and leaves its own there."""
        pages, digests = self._pages, request.digests
        kept = 0
        for digest in digests:
            if digest not in pages:
                break
            kept += 1
        request.cached = min(kept * self._page_size, request.prompt_len - 1)
        request.left -= request.cached
        self._prompt_tokens -= request.cached
        self._keep(digests)
        return request

    def _keep(self, digests: Sequence[bytes]) -> None:
        """The first of these pages is the newest now."""
        pages = self._pages
        for digest in reversed(digests):
            pages[digest] = None
            pages.move_to_end(digest)
        while len(pages) > self._num_pages:
            pages.popitem(last=False)
