"""The requests that run: who holds a slot and pages, and what each of them does next.

Owns the slots, and which of the running requests begin, decode, rest or await a token; never chooses who starts or who
has to stop. Called by `graphgen.scheduler.policy` and its parts.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from operator import attrgetter

from graphgen.scheduler.decodes import DecodeSet
from graphgen.scheduler.page_groups import BlockTable
from graphgen.scheduler.request import Request, RunningRequest

_rank = attrgetter("request.rank")  # of a running request


class RunningSet:
    """Requests from their admission to their last planned row."""

    def __init__(self, num_slots: int, page_size: int) -> None:
        self.decodes = DecodeSet(page_size)
        """Those whose prompt is computed and that do not rest."""
        self.resting: dict[RunningRequest, int] = {}
        """Those that would decode, but have no rows for now (see `graphgen.scheduler.rests`), and how far each is
        computed."""
        self.constrained: dict[RunningRequest, None] = {}
        """Of the decodes, those that follow a grammar."""
        self.awaiting: dict[RunningRequest, int] = {}
        """Those that follow a grammar and whose newest token is not known yet, and how far each is computed. What may
        come next depends on that token, so they have no row meanwhile."""
        self.redrawn: dict[RunningRequest, None] = {}
        """Those that follow a grammar and whose next decode row computes their last known token once more."""
        self.begun: list[RunningRequest] = []
        """The others, in order of service."""
        self._by_rank: list[RunningRequest] = []
        self._free_slots = list(range(num_slots - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._by_rank)

    def __iter__(self) -> Iterator[RunningRequest]:
        """In order of service."""
        return iter(self._by_rank)

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def is_decode(self, running: RunningRequest) -> bool:
        """Whether its prompt is computed."""
        return running.decode_row is not None or running in self.resting

    def num_computed(self, running: RunningRequest) -> int:
        """Positions of a request that the plans made so far compute, from its first one on, cached ones included. So at
        every moment, whatever the request does."""
        if running.decode_row is not None:
            return self.decodes.position(running)
        if running in self.awaiting:
            return self.awaiting[running]
        return self.resting.get(running, running.num_prefilled)

    def victims(self) -> Iterator[RunningRequest]:
        """Those that may be preempted, the one to serve last first. The set may not change meanwhile."""
        return (running for running in reversed(self._by_rank) if not running.is_reserved)

    def start(
        self,
        request: Request,
        tables: Sequence[BlockTable],
        num_cached: int,
        reserve: bool,
        is_long: bool,
    ) -> RunningRequest:
        """Gives a request a slot; it has begun. See RunningRequest."""
        slot = self._free_slots.pop()
        running = RunningRequest(request, slot, tables, num_cached, reserve, is_long)
        request.running = running
        tenant = request.tenant
        tenant.num_running += 1
        tenant.num_of_class[request.priority] += 1
        insort(self._by_rank, running, key=_rank)
        insort(self.begun, running, key=_rank)
        return running

    def finish_prompt(self, running: RunningRequest) -> None:
        """All it knew at its admission is computed: it decodes from the next plan on."""
        self._leave_begun(running)
        self._join_decodes(running, running.prefill_end)

    def await_token(self, running: RunningRequest, newest_step: int) -> None:
        """One that follows a grammar draws a token in the newest plan: it has no rows until `take_token`, or `redraw`.
        newest_step: that plan."""
        if running.decode_row is not None:
            self.awaiting[running] = self._leave_decodes(running)
        else:
            self._leave_begun(running)
            self.awaiting[running] = running.prefill_end
        running.request.last_step = newest_step

    def take_token(self, running: RunningRequest) -> None:
        """The token of one that awaits it has arrived: it decodes from the next plan on."""
        self._join_decodes(running, self.awaiting.pop(running))

    def redraw(self, running: RunningRequest) -> None:
        """The token of one that awaits it, or that has run ahead, was refused: its last known token is computed once
        more by its next row, that of a decode."""
        position = len(running.request.tokens) - 1
        self.redrawn[running] = None
        if running in self.resting:
            self.resting[running] = position
            return
        if running in self.awaiting:
            del self.awaiting[running]
        else:
            self._leave_decodes(running)
        self._join_decodes(running, position)

    def take_redrawn(self) -> list[RunningRequest]:
        """Those that the next plan has rows of, which then are as other decodes."""
        taken = [running for running in self.redrawn if running.decode_row is not None]
        for running in taken:
            del self.redrawn[running]
        return taken

    def rest(self, running: RunningRequest, newest_step: int) -> None:
        """One that decodes has no rows from the next plan on. It keeps slot and pages, and its newest token stays on
        the device. newest_step: the newest that may draw a token for it."""
        self.resting[running] = self._leave_decodes(running)
        running.request.last_step = newest_step
        running.request.tenant.num_resting += 1

    def wake(self, running: RunningRequest) -> None:
        """One that rests decodes from the next plan on, where it left off."""
        self._join_decodes(running, self.resting.pop(running))
        running.request.tenant.num_resting -= 1

    def _join_decodes(self, running: RunningRequest, position: int) -> None:
        self.decodes.join(running, position)
        running.request.tenant.num_decodes += 1
        if running.request.is_constrained:
            self.constrained[running] = None

    def _leave_decodes(self, running: RunningRequest) -> int:
        running.request.tenant.num_decodes -= 1
        self.constrained.pop(running, None)
        return self.decodes.leave(running)

    def _leave_begun(self, running: RunningRequest) -> None:
        del self.begun[bisect_left(self.begun, running.request.rank, key=_rank)]

    def remove(self, running: RunningRequest) -> int:
        """Takes the slot away; the request's pages are the caller's to give back. Returns its `num_computed`."""
        tenant = running.request.tenant
        self.redrawn.pop(running, None)
        if running.decode_row is not None:
            num_computed = self._leave_decodes(running)
        elif running in self.resting:
            num_computed = self.resting.pop(running)
            tenant.num_resting -= 1
        elif running in self.awaiting:
            num_computed = self.awaiting.pop(running)
        else:
            num_computed = running.num_prefilled
            self._leave_begun(running)
        del self._by_rank[bisect_left(self._by_rank, running.request.rank, key=_rank)]
        tenant.num_running -= 1
        tenant.num_of_class[running.request.priority] -= 1
        self._free_slots.append(running.slot)
        running.request.running = None
        return num_computed
