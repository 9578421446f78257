"""The requests that decode and do not rest: one row of every plan for each of them.

Owns what their rows need (slots, positions, page borders, last rows, the tightest target, when tokens are due), kept so
that a plan costs little however many decode. Never takes a page and never decides who decodes. Owned by
`graphgen.scheduler.running`, read by the parts of the policy.

Every plan advances every decode by one position. So a request's position is the number of plans made plus an offset
that never changes, and the plan in which it crosses a page border or draws its last token is known when it joins.
Nobody else keeps the position of one that is here.
"""

import math
from array import array
from collections.abc import Iterator

import numpy as np

from graphgen.ipc.codec import pack_int32
from graphgen.scheduler.request import Request, RunningRequest

AIM = 0.99
"""Of a target for the mean gap, what is aimed at: the last step may take longer than expected."""


class DecodeSet:
    """Joining, leaving and advancing cost O(1) a request, a plan O(decodes / page_size) besides copying its rows.

    The order of rows means nothing: the last row takes the place of one that leaves.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._clock = 0  # plans made so far
        self._rows: list[RunningRequest] = []
        self._requests: list[Request] = []
        self._slots = array("i")
        self._offsets = array("i")  # of each row: its position, less the clock
        self._sum_offsets = 0
        # Of each row, for the mean of its gaps: its token of the next plan is due at the first number plus the clock
        # times the second, in seconds; infinity and 0 for one that has no such target, or cannot keep it any more.
        self._due_s = array("d")
        self._pace_s = array("d")
        self._without_token: dict[RunningRequest, float] = {}  # the pace of those whose first token is on its way
        self.num_with_tpot_target = 0
        """Rows whose mean gap should not exceed a target, and still can stay within it."""
        # By clock: who draws a last token in that plan; by clock modulo page_size: who crosses a page border in it.
        # In the order in which they joined; whoever leaves is taken out at once.
        self._last_rows: dict[int, dict[RunningRequest, None]] = {}
        self._border_rows: list[dict[RunningRequest, None]] = [{} for _ in range(page_size)]
        self._num_with_target: dict[float, int] = {}
        self._itl_target_ms: float | None = None
        self._first_gaps: dict[RunningRequest, float] = {}  # targets of those whose second token the next plan draws

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[RunningRequest]:
        return iter(self._rows)

    @property
    def num_positions(self) -> int:
        """(row, position) pairs of the next plan's decode rows: each attends to every position up to its own."""
        return self._sum_offsets + len(self._rows) * (self._clock + 1)

    @property
    def itl_target_ms(self) -> float | None:
        """The tightest target among them; None if nobody has one."""
        return self._itl_target_ms

    @property
    def first_gap_target_ms(self) -> float | None:
        """The tightest target of those whose second token the next plan draws; None if none of them has one."""
        return min(self._first_gaps.values(), default=None)

    def position(self, running: RunningRequest) -> int:
        """The position that the next plan computes for one of them: those before it are computed."""
        assert running.decode_row is not None, "only a request that decodes has a row"
        return self._offsets[running.decode_row] + self._clock

    def join(self, running: RunningRequest, position: int) -> None:
        """It gets a row from the next plan on, at first for this position. At least one is left."""
        offset = position - self._clock
        running.decode_row = len(self._rows)
        self._rows.append(running)
        self._requests.append(running.request)
        self._slots.append(running.slot)
        self._offsets.append(offset)
        self._sum_offsets += offset
        self._due_s.append(math.inf)
        self._pace_s.append(0.0)
        if running.request.tpot_target_ms is not None:
            self.num_with_tpot_target += 1
            self._without_token[running] = AIM * running.request.tpot_target_ms / 1000.0
            self.begin_output(running)
        self._border_rows[-offset % self._page_size][running] = None
        self._last_rows.setdefault(running.request.end_position - 1 - offset, {})[running] = None
        target = running.request.itl_target_ms
        if target is not None:
            self._num_with_target[target] = self._num_with_target.get(target, 0) + 1
            self._itl_target_ms = target if self._itl_target_ms is None else min(target, self._itl_target_ms)
            if position == running.request.prompt_len:
                self._first_gaps[running] = target

    def begin_output(self, running: RunningRequest) -> None:
        """It has its first token, if it did not have it before: from then on its later ones are due."""
        first_s, row = running.request.first_token_s, running.decode_row
        if first_s is None or row is None or running not in self._without_token:
            return
        pace_s = self._without_token.pop(running)
        # A row at a position draws the token after it, so that many gaps have passed by then.
        num_gaps = self._offsets[row] - running.request.prompt_len + 1
        self._due_s[row], self._pace_s[row] = first_s + num_gaps * pace_s, pace_s

    def first_due_s(self, begins_s: float, fastest_s: float) -> float | None:
        """When the next plan's step, which begins at that time, has to end so that no mean gap exceeds its target; None
        where nobody has one that can be kept. fastest_s: no step is shorter."""
        due_s = float((np.frombuffer(self._due_s) + np.frombuffer(self._pace_s) * self._clock).min())
        if due_s < begins_s + fastest_s:
            self._give_up(begins_s, fastest_s)
            due_s = float((np.frombuffer(self._due_s) + np.frombuffer(self._pace_s) * self._clock).min())
        for pace_s in self._without_token.values():
            if pace_s >= fastest_s:
                due_s = min(due_s, begins_s + pace_s)
        return None if due_s == math.inf else due_s

    def _give_up(self, begins_s: float, fastest_s: float) -> None:
        """The targets of those that would miss them even if all further steps were the fastest."""
        for row, running in enumerate(self._rows):
            last_clock = running.request.end_position - 1 - self._offsets[row]
            ends_s = begins_s + (last_clock + 1 - self._clock) * fastest_s
            if ends_s > self._due_s[row] + last_clock * self._pace_s[row]:
                self._due_s[row], self._pace_s[row] = math.inf, 0.0
                self.num_with_tpot_target -= 1

    def leave(self, running: RunningRequest) -> int:
        """Ends its rows; returns the position that the next one would have computed."""
        row = running.decode_row
        assert row is not None, "only a request that decodes leaves"
        running.decode_row = None
        left = self._offsets[row]
        self._sum_offsets -= left
        del self._border_rows[-left % self._page_size][running]
        last_clock = running.request.end_position - 1 - left
        del self._last_rows[last_clock][running]
        if not self._last_rows[last_clock]:
            del self._last_rows[last_clock]
        if self.num_with_tpot_target:
            self.num_with_tpot_target -= self._due_s[row] < math.inf or running in self._without_token
            self._without_token.pop(running, None)
        last = self._rows.pop()
        offset, slot, request = self._offsets.pop(), self._slots.pop(), self._requests.pop()
        due_s, pace_s = self._due_s.pop(), self._pace_s.pop()
        if last is not running:
            self._rows[row], self._requests[row], self._slots[row], self._offsets[row] = last, request, slot, offset
            self._due_s[row], self._pace_s[row] = due_s, pace_s
            last.decode_row = row
        target = running.request.itl_target_ms
        if target is not None:
            self._first_gaps.pop(running, None)
            self._num_with_target[target] -= 1
            if not self._num_with_target[target]:
                del self._num_with_target[target]
                self._itl_target_ms = min(self._num_with_target, default=None)
        return left + self._clock

    def at_border(self) -> list[RunningRequest]:
        """Those whose row of the next plan is the first of a page. The others hold the page of theirs."""
        return list(self._border_rows[self._clock % self._page_size])

    def rows(self) -> tuple[bytes, bytes, list[Request]]:
        """Slots and positions (packed int32) and the requests of the next plan's rows."""
        positions = np.frombuffer(self._offsets, np.int32) + np.int32(self._clock)
        return pack_int32(self._slots), positions.astype("<i4", copy=False).tobytes(), self._requests[:]

    def advance(self) -> list[RunningRequest]:
        """A plan was made with the rows that there are; returns those whose last row it has: they have to leave."""
        last = list(self._last_rows.get(self._clock, ()))
        self._first_gaps.clear()
        self._clock += 1
        return last
