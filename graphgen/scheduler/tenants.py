"""Tenants: who requests are accounted to, what each tenant has and holds, and whose turn it is.

Owns the waiting requests of every tenant and the service it has had. Hands out no row, slot or page. Called by
`graphgen.scheduler.policy` and its parts.

Service classes and targets order the requests of one tenant (`graphgen.scheduler.request`). Among tenants three rules
hold, whatever they ask for:

- **Turns.** Of the tenants that have prompts to compute, the one that was served least goes first. Service is the time
  of the device: what a step is predicted to take, divided among its rows, prompts and decodes alike. One that had
  nothing to compute starts at most BURST_MS behind those that have, so that nobody saves service up, and whoever is
  ahead stays so while it is away for a moment. This is start-time fair queueing (Goyal et al. 1996), for language
  models the virtual token counter (Sheng et al. 2024).
- **Shares.** Of n tenants with open requests each is entitled to the n-th part of slots and pages. What one does not
  want is anybody's; a tenant below its share takes it back from those above theirs (`graphgen.scheduler.admission`).
- **Steps.** No step is so long that another tenant's tokens come slower than its share allows: prompts of others get
  fewer rows (`graphgen.scheduler.step_bounds`), decodes of tenants that have most rest (`graphgen.scheduler.rests`).

With one tenant nothing is counted and the order of service is that of its requests.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter

from graphgen.ipc.engine_messages import MAX_PRIORITY
from graphgen.scheduler.plan import StepRecord
from graphgen.scheduler.request import Rank, Request, RunningRequest
from graphgen.scheduler.waiting import WaitingQueue

BURST_MS = 50.0
"""Service that a tenant may have before others when it comes back: a short prompt is computed at once."""

MAX_AWAY = 1024
"""Tenants that are remembered although they have no open request, because they are ahead of the others."""

_Turn = tuple[float, int]


class Tenant:
    """One tenant. Made when its first request comes, forgotten some time after its last one has ended."""

    __slots__ = (
        "name",
        "newest_rank",
        "num_decodes",
        "num_of_class",
        "num_open",
        "num_resting",
        "num_running",
        "served",
        "turn",
        "waiting",
    )

    def __init__(self, name: str, long_prompt_len: int) -> None:
        self.name = name
        self.waiting = WaitingQueue(long_prompt_len)
        self.num_open = 0  # requests that have not ended
        self.num_running = 0  # of these: requests that hold a slot
        self.num_of_class = [0] * (MAX_PRIORITY + 1)  # those, by service class
        self.num_decodes = 0  # of these: requests that have a decode row in the next plan
        self.num_resting = 0  # of these: requests that would, but rest
        self.newest_rank: Rank = (float("-inf"), 0)  # of those whose turn it was to decode while others rest: the last
        self.served = 0.0  # milliseconds, since there are several tenants
        self.turn: _Turn = (0.0, 0)  # its place in the order of turns: of equals the first to wait comes first

    @property
    def num_all_decodes(self) -> int:
        """Requests whose prompt is computed."""
        return self.num_decodes + self.num_resting

    @property
    def lowest_class(self) -> int | None:
        """The lowest service class that runs."""
        return next((priority for priority, count in enumerate(self.num_of_class) if count), None)


class SenderWork:
    """What one sender has here (`graphgen.ipc.senders`): requests that have not ended, and of these those that wait."""

    __slots__ = ("num_open", "num_waiting", "num_waiting_tokens")

    def __init__(self) -> None:
        self.num_open = self.num_waiting = self.num_waiting_tokens = 0


_turn_of = attrgetter("turn")


class Tenants:
    """All tenants that have open requests. Each operation costs O(log n) of the tenants that wait."""

    def __init__(self, long_prompt_len: int, num_senders: int = 1) -> None:
        """long_prompt_len: see WaitingQueue."""
        self.of_sender = tuple(SenderWork() for _ in range(num_senders))
        self._long_prompt_len = long_prompt_len
        self._open: dict[str, Tenant] = {}
        self._away: OrderedDict[str, Tenant] = OrderedDict()  # ahead of the others, without an open request
        self._turns: list[Tenant] = []  # those that wait, in order of their turns
        self._last: Tenant | None = None  # the one that waited last
        self._level = 0.0  # what the least served of those with prompts had, at the last look
        self._num_turns = 0
        self._only: Request | None = None  # while it is set, nobody else may start
        self._decode_row_ms = 0.0  # what one decode row of each plan cost together, since they were charged last
        self.num_waiting = 0
        """Requests that wait, of all tenants."""
        self.num_waiting_tokens = 0
        """Known tokens of these."""
        self.num_with_ttft_target = 0
        """Open requests that have one; while there is none, no plan looks for one that is late."""

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Tenant]:
        return iter(self._open.values())

    def num_with(self, tenant: Tenant) -> int:
        """Tenants with open requests, this one among them."""
        return len(self._open) + (not tenant.num_open)

    def num_waiting_by_class(self) -> tuple[int, ...]:
        """Requests that wait, by service class."""
        counts = [0] * (MAX_PRIORITY + 1)
        for tenant in self._turns:
            tenant.waiting.count_classes(counts)
        return tuple(counts)

    @property
    def is_counting(self) -> bool:
        """Whether turns mean anything: there are several tenants, or one that was ahead may come back."""
        return len(self._open) + len(self._away) > 1

    def of(self, name: str) -> Tenant:
        """The tenant of that name; a new one is kept from its first `opened` request on."""
        return self._open.get(name) or self._away.get(name) or Tenant(name, self._long_prompt_len)

    def opened(self, request: Request) -> None:
        tenant = request.tenant
        if not tenant.num_open:
            self._away.pop(tenant.name, None)
            self._open[tenant.name] = tenant
        tenant.num_open += 1
        self.of_sender[request.sender].num_open += 1
        self.num_with_ttft_target += request.ttft_by_s is not None

    def closed(self, request: Request) -> None:
        """A request has ended, and neither waits nor runs any more."""
        tenant = request.tenant
        tenant.num_open -= 1
        self.of_sender[request.sender].num_open -= 1
        self.num_with_ttft_target -= request.ttft_by_s is not None
        if tenant.num_open:
            return
        del self._open[tenant.name]
        if not self._open:  # who is ahead of nobody
            self._away.clear()
            self._last = None
        elif tenant.served > self._level - BURST_MS:
            self._away[tenant.name] = tenant
            if len(self._away) > MAX_AWAY:
                self._away.popitem(last=False)

    # --- the requests that wait ----------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """It waits, in the order of service of its tenant."""
        tenant = request.tenant
        if not tenant.waiting:
            if not self._turns and self._last is not None:
                self._level = max(self._level, self._last.served)
            tenant.served = max(tenant.served, self._level - BURST_MS)
            self._last = tenant
            self._num_turns += 1
            tenant.turn = (tenant.served, self._num_turns)
            insort(self._turns, tenant, key=_turn_of)
        tenant.waiting.add(request)
        self.num_waiting += 1
        self.num_waiting_tokens += len(request.tokens)
        own = self.of_sender[request.sender]
        own.num_waiting += 1
        own.num_waiting_tokens += len(request.tokens)

    def remove(self, request: Request) -> None:
        """It waits no longer. Raises KeyError when it did not."""
        tenant = request.tenant
        num_tokens = tenant.waiting.remove(request)
        self.num_waiting_tokens -= num_tokens
        self.num_waiting -= 1
        own = self.of_sender[request.sender]
        own.num_waiting -= 1
        own.num_waiting_tokens -= num_tokens
        if not tenant.waiting:
            self._leave(tenant)

    def first(self, count: int) -> list[Tenant]:
        """Of the tenants that wait the `count` whose turn comes first."""
        if self._only is not None:
            return [self._only.tenant] if self._only in self._only.tenant.waiting else []
        return self._turns[:count]

    def serve_only(self, request: Request | None) -> None:
        """From now on nobody else is offered; None ends that."""
        if self._only is not None:
            self._only.tenant.waiting.only = None
        self._only = request
        if request is not None:
            request.tenant.waiting.only = request

    def lose_slots(self) -> None:
        """Nobody runs any more."""
        for tenant in self._open.values():
            tenant.num_running = tenant.num_decodes = tenant.num_resting = 0
            tenant.num_of_class = [0] * (MAX_PRIORITY + 1)

    # --- turns ---------------------------------------------------------------------------------------------------

    def in_turn(self, waiting: Sequence[Tenant], begun: Iterable[RunningRequest]) -> list[Tenant]:
        """These tenants, and those of the prompts that have begun, the least served first."""
        found = dict.fromkeys(waiting) | dict.fromkeys(running.request.tenant for running in begun)
        order = sorted(found, key=_turn_of)
        self._level = max(self._level, order[0].served)
        return order

    def charge_step(self, record: StepRecord, step_ms: float) -> None:
        """A plan was made that is predicted to take so long."""
        row_ms = step_ms / (record.rows.num_rows - record.num_padding_rows)
        for chunk in record.chunks:
            self._charge(chunk.request.tenant, chunk.length * row_ms)
        self._decode_row_ms += row_ms

    def _charge(self, tenant: Tenant, milliseconds: float) -> None:
        if tenant.waiting:
            self._leave(tenant)
        tenant.served += milliseconds
        tenant.turn = (tenant.served, tenant.turn[1])
        if tenant.waiting:
            insort(self._turns, tenant, key=_turn_of)

    def charge_decodes(self, decodes: Iterable[RunningRequest]) -> None:
        """For the plans since the last call: a row of each for every request that decodes now."""
        row_ms, self._decode_row_ms = self._decode_row_ms, 0.0
        if not row_ms:
            return
        for tenant in {running.request.tenant for running in decodes}:
            self._charge(tenant, tenant.num_decodes * row_ms)
        while self._away and next(iter(self._away.values())).served <= self._level - BURST_MS:
            self._away.popitem(last=False)

    def _leave(self, tenant: Tenant) -> None:
        del self._turns[bisect_left(self._turns, tenant.turn, key=_turn_of)]
