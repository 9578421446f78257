"""Whether a waiting request may start: slots, pages, and what it would share.

Owns the pages that admission leaves free for the growth of those that run, and the promise that a request which was
preempted too often ends. Takes no page itself. Called by `graphgen.scheduler.policy` and its parts.

Reserved requests. A request that was preempted MAX_PREEMPTIONS times starts only with every page it can ever need and
is not preempted again. One rule keeps the others from being locked out by it: any running request that is not reserved
fits into the pool beside all reserved ones. So when pages run out, preempting the others in turn always lets the first
in the order of service go on, and the reserved ones end without asking for anything.

Several tenants. A request whose tenant holds less than its share, or nothing, may take slots and pages from tenants
that hold more than theirs; never the other way round. A tenant gives what it would serve last, reserved requests after
all others. Only its first in the order of service keeps what it has once it is reserved: so every request ends.
"""

from collections.abc import Iterable, Set
from typing import NamedTuple

from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.page_branches import common_len
from graphgen.scheduler.page_groups import PageGroups
from graphgen.scheduler.prefix_cache import Found, PrefixCache
from graphgen.scheduler.request import MAX_PREEMPTIONS, Request, RunningRequest
from graphgen.scheduler.running import RunningSet
from graphgen.scheduler.tenants import Tenant, Tenants

WATERMARK_DIVISOR = 16
"""Admission keeps one page free for each running request, at most this part of the pool (rounded up)."""

HEADROOM_DIVISOR = 4
"""After preemptions it keeps more free, at most this part of the pool."""

AWAITED_DIVISOR = 4
"""At least this part of a page has to be spared for a request to wait a step for it."""

_HEADROOM_KEPT = 1.0 - 1.0 / 256
"""Share of that headroom that is left after each plan."""


class Offer(NamedTuple):
    """What a request would start with."""

    shared: Found
    """What the prefix cache has of its prompt."""
    ends: tuple[int, ...]
    """Where its block table of each page group ends."""
    num_new: int
    """Pages it needs at once beside the shared ones."""
    num_taken: int
    """Free pages that it would use up: the new ones, and the shared ones that nobody else holds."""
    num_spare: int
    """Pages that must be free besides."""
    num_cached: int
    """Tokens that it need not compute: those in the shared pages, and those it copies."""
    reserve: bool
    """It would get every page it can ever need."""
    is_long: bool
    """Its prompt would be a long one."""
    copy_from: tuple[int, ...] = ()
    """Of each page group, the page whose beginning it copies into the one after the shared ones; or none."""


class Admission:
    """The rules of one pool."""

    def __init__(
        self,
        limits: SchedulerLimits,
        cache: PrefixCache,
        groups: PageGroups,
        running: RunningSet,
        tenants: Tenants,
        long_prompt_len: int,
    ) -> None:
        """long_prompt_len: the least missing tokens that make a prompt long."""
        self._long_prompt_len = long_prompt_len
        self._limits = limits
        self._cache = cache
        self._groups = groups
        self._running = running
        self._tenants = tenants
        self._watermark_limit = -(-limits.num_pages // WATERMARK_DIVISOR)
        self._headroom_limit = limits.num_pages // HEADROOM_DIVISOR
        self._headroom = 0.0
        self._num_reserved = 0

    def offer(self, request: Request) -> Offer:
        """What it would get now, before anything is copied."""
        size, num_tokens = self._limits.page_size, len(request.tokens)
        shared = self._cache.find(request.chain, _most_cached(request) // size)
        reserve = request.num_preemptions >= MAX_PREEMPTIONS
        ends = self._groups.start_ends(shared.num_pages, num_tokens, request.end_position if reserve else None)
        num_new = sum(ends) - len(ends) * shared.num_pages
        num_idle = sum(not self._cache.pool.num_holders(page) for table in shared.tables for page in table)
        # A reserved one does not grow, and with nothing running there is nothing to spare a page for: so a request
        # that fits into the pool always starts in the end.
        num_spare = 0 if reserve or not len(self._running) else self._num_spare()
        num_cached = shared.num_pages * size
        is_long = num_tokens - num_cached >= self._long_prompt_len
        return Offer(shared, ends, num_new, num_new + num_idle, num_spare, num_cached, reserve, is_long)

    def with_copy(self, request: Request, offer: Offer) -> Offer:
        """The offer, and the beginning of the page after the shared ones if some page has it. For one who starts now:
        see `PrefixCache.find_copy`."""
        most = _most_cached(request) - offer.num_cached
        found = self._cache.find_copy(request.chain, offer.shared.num_pages, most)
        if found is None:
            return offer
        return offer._replace(num_cached=offer.num_cached + found.num_tokens, copy_from=found.sources)

    def has_pages(self, request: Request, offer: Offer, num_more: int = 0, fewer_reserved: int = 0) -> bool:
        """Whether the free pages, and `num_more` besides, suffice; with so many pages fewer that are reserved."""
        if offer.num_taken + offer.num_spare > self._cache.pool.num_free + num_more:
            return False
        most = self._most_pages(request) + self._num_reserved - fewer_reserved
        if offer.reserve:
            most += max((self._most_pages(one.request) for one in self._running if not one.is_reserved), default=0)
        return most <= self._limits.num_pages

    def is_held_back(self, request: Request, offer: Offer) -> bool:
        """Whether it waits for another prompt: for a page that is being computed, or because enough are long."""
        if self._awaits_page(request, offer):
            return True
        if not offer.is_long:
            return False
        return sum(running.is_long for running in self._running.begun) >= self._limits.max_long_prompts

    def victims_for(self, request: Request, offer: Offer) -> list[RunningRequest]:
        """Whom of its own tenant to preempt so that it starts: requests of lower classes that are to be served after
        it, the last first.

        None at all if it has what it needs, or if it would not get it that way either.
        """
        victims: list[RunningRequest] = []
        shared = offer.shared.all_pages()
        candidates = (one for one in self._running.victims() if one.request.tenant is request.tenant)
        num_freed = 0
        while not (victims or self._running.num_free_slots) or not self.has_pages(request, offer, num_freed):
            victim = next(candidates, None)
            if victim is None or victim.request.rank < request.rank:
                return []
            if victim.request.priority < request.priority:
                victims.append(victim)
                # What it shares with the victim is not to be had twice.
                num_freed += self._num_freed(victim, shared)
        return victims

    # --- several tenants -----------------------------------------------------------------------------------------

    @property
    def _num_shares(self) -> int:
        """One for each tenant, as far as there are slots."""
        return min(len(self._tenants), self._limits.num_slots)

    @property
    def share_slots(self) -> int:
        """Slots that each tenant is entitled to."""
        return self._limits.num_slots // self._num_shares

    @property
    def share_pages(self) -> int:
        """Pages that each tenant is entitled to."""
        return self._limits.num_pages // self._num_shares

    def may_take(self, request: Request, offer: Offer) -> bool:
        """Whether it lacks a slot or pages, and its tenant has fewer slots than its share."""
        lacks = not self._running.num_free_slots or not self.has_pages(request, offer)
        return lacks and request.tenant.num_running < self.share_slots

    def givers_for(self, request: Request, offer: Offer) -> list[RunningRequest]:
        """Whom of other tenants to preempt so that a request starts that `may_take`.

        None at all if its tenant would have more pages than its share, or if it would not get what it needs.
        """
        holdings = self._holdings()
        own = holdings.get(request.tenant)
        if own is not None and own.num_pages + offer.num_new > self.share_pages:
            return []
        victims: list[RunningRequest] = []
        shared = offer.shared.all_pages()
        num_freed = reserved = 0
        while True:
            lacks_slot = not (victims or self._running.num_free_slots)
            if not lacks_slot and self.has_pages(request, offer, num_freed, reserved):
                return victims
            victim = self._next_giver(holdings, request.tenant, of_slots=lacks_slot)
            if victim is None:
                return []
            victims.append(victim)
            num_freed += self._num_freed(victim, shared)
            reserved += self._most_pages(victim.request) if victim.is_reserved else 0

    def victim_of_growth(self) -> RunningRequest:
        """Whom to preempt when a decode needs a page and none is free: of the tenant that holds most beyond its share;
        with one tenant, whoever is to be served last."""
        if len(self._tenants) == 1:
            return next(self._running.victims())
        holdings = self._holdings()
        victim = self._next_giver(holdings, None, of_slots=False)
        if victim is not None:
            return victim
        most = max(holdings.values(), key=lambda holding: (holding.num_victims > 0, holding.num_pages))
        return most.take_last()

    def _holdings(self) -> "dict[Tenant, _Holding]":
        found: dict[Tenant, _Holding] = {}
        for running in self._running:
            found.setdefault(running.request.tenant, _Holding()).add(running)
        return found

    def _next_giver(
        self, holdings: "dict[Tenant, _Holding]", taker: Tenant | None, of_slots: bool
    ) -> RunningRequest | None:
        """The next to be preempted of the tenant that holds most slots, or pages, if that is more than its share."""
        candidates: Iterable[_Holding] = (
            holding for tenant, holding in holdings.items() if tenant is not taker and holding.can_give
        )
        if of_slots:
            giver = max(candidates, key=lambda holding: len(holding.running), default=None)
            is_above = giver is not None and len(giver.running) > self.share_slots
        else:
            giver = max(candidates, key=lambda holding: holding.num_pages, default=None)
            is_above = giver is not None and giver.num_pages > self.share_pages
        return giver.take_last() if giver is not None and is_above else None

    # --- pages of other prompts, reserved requests -----------------------------------------------------------------

    def _awaits_page(self, request: Request, offer: Offer) -> bool:
        """Whether a prompt that is served before it is about to compute the page it misses first, or enough of it.

        Then it waits, so that many requests with one prompt, sent together, compute it once.
        """
        if not self._cache.enabled or not self._running.begun:
            return False
        index, start, size = offer.shared.num_pages, offer.num_cached, self._limits.page_size
        end = min(start + size, _most_cached(request))
        least = max(1, size // AWAITED_DIVISOR)
        if end - start < least:
            return False
        for begun in self._running.begun:
            other = begun.request
            is_there = begun.num_prefilled // size == index and other.rank < request.rank
            if is_there and other.chain.parent(index) == request.chain.parent(index):
                theirs = other.chain.packed(start, min(end, begun.prefill_end))
                num_common = common_len(theirs, request.chain.packed(start, end))
                if num_common >= least and begun.num_prefilled < start + num_common:
                    return True
        return False

    def started(self, running: RunningRequest) -> None:
        if running.is_reserved:
            self._num_reserved += self._most_pages(running.request)

    def stopped(self, running: RunningRequest) -> None:
        if running.is_reserved:
            self._num_reserved -= self._most_pages(running.request)

    def plan_made(self) -> None:
        self._headroom *= _HEADROOM_KEPT

    def preempted(self, running: RunningRequest) -> None:
        """Pages ran out, and this one gave its own back: more are kept free for a while.

        Without this the next plan would admit what the one after it preempts, and an overload would be spent on
        computing the same tokens again and again.
        """
        self._headroom = min(self._headroom + running.num_pages, self._headroom_limit)

    def _num_spare(self) -> int:
        num_growing = len(self._running) * len(self._groups)
        return min(num_growing, self._watermark_limit) + int(self._headroom)

    def _most_pages(self, request: Request) -> int:
        return self._groups.most_pages(request.end_position)

    def _num_freed(self, victim: RunningRequest, shared: Set[int]) -> int:
        """Pages that its preemption would free, without those that are to be shared."""
        return sum(self._cache.pool.num_holders(page) == 1 for page in {*victim.all_pages()} - shared)


class _Holding:
    """What one tenant holds, while it is decided who gives."""

    def __init__(self) -> None:
        self.running: list[RunningRequest] = []  # in order of service
        self.num_pages = 0
        self.num_victims = 0  # of `running`: not reserved

    def add(self, running: RunningRequest) -> None:
        self.running.append(running)
        self.num_pages += running.num_pages
        self.num_victims += not running.is_reserved

    @property
    def can_give(self) -> bool:
        return self.num_victims > 0 or len(self.running) > 1

    def take_last(self) -> RunningRequest:
        """The one to preempt first, which it then does not hold any more."""
        found = next((one for one in reversed(self.running) if not one.is_reserved), self.running[-1])
        self.running.remove(found)
        self.num_pages -= found.num_pages
        self.num_victims -= not found.is_reserved
        return found


def _most_cached(request: Request) -> int:
    """Tokens it may skip. The last known one is always computed: its row draws the next one. And so is a row of its
    prompt that is asked what it says of the next token."""
    most = min(len(request.tokens) - 1, request.max_cached_len)
    return min(most, request.num_scored) if request.is_scored else most
