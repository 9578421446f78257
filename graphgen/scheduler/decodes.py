"""The requests that decode and do not rest: one row of every plan for each of them.

Owns what their rows need (slots, positions, page borders, last rows, the tightest target), kept so that a plan costs
little however many decode. Never takes a page and never decides who decodes. Owned by `graphgen.scheduler.running`,
read by the parts of the policy.

Every plan advances every decode by one position. So a request's position is the number of plans made plus an offset
that never changes, and the plan in which it crosses a page border or draws its last token is known when it joins.
Nobody else keeps the position of one that is here.
"""

from array import array
from collections.abc import Iterator

import numpy as np

from graphgen.ipc.codec import pack_int32
from graphgen.scheduler.request import Request, RunningRequest


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
        # By clock: who draws a last token in that plan; by clock modulo page_size: who crosses a page border in it.
        # In the order in which they joined; whoever leaves is taken out at once.
        self._last_rows: dict[int, dict[RunningRequest, None]] = {}
        self._border_rows: list[dict[RunningRequest, None]] = [{} for _ in range(page_size)]
        self._num_with_target: dict[float, int] = {}
        self._itl_target_ms: float | None = None

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
        self._border_rows[-offset % self._page_size][running] = None
        self._last_rows.setdefault(running.request.end_position - 1 - offset, {})[running] = None
        target = running.request.itl_target_ms
        if target is not None:
            self._num_with_target[target] = self._num_with_target.get(target, 0) + 1
            self._itl_target_ms = target if self._itl_target_ms is None else min(target, self._itl_target_ms)

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
        last = self._rows.pop()
        offset, slot, request = self._offsets.pop(), self._slots.pop(), self._requests.pop()
        if last is not running:
            self._rows[row], self._requests[row], self._slots[row], self._offsets[row] = last, request, slot, offset
            last.decode_row = row
        target = running.request.itl_target_ms
        if target is not None:
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
        self._clock += 1
        return last
