"""What the prefix cache must know, worked out by brute force from what the device computed.

Never looks into the policy: it reads plans, block tables and the tokens that rows attended to.
"""

from collections.abc import Sequence

from graphgen.ipc.messages import SamplerParams, StepPlan, Submit
from graphgen.ipc.step_schema import live_entries
from tests.scheduler.fake_worker import FakeWorker, Row

Prefix = tuple[str, tuple[int, ...]]
"""A salt, and the tokens up to the end of a page."""


class PageModel:
    """Every page that was computed whole, and the beginning of a prompt that it completes."""

    def __init__(self, page_size: int, is_used: bool) -> None:
        """is_used: whether the cache is on."""
        self._page_size = page_size
        self._is_used = is_used
        self._computed: dict[int, Prefix] = {}
        """Pages whose last position was written, by whatever kind of row."""
        self._known: dict[int, Prefix] = {}
        """Of these: pages that a chunk completed, the first one of each prefix. The cache must find them."""
        self.num_hits = 0
        self.num_copies = 0

    def forget(self) -> None:
        """The device is gone, and another one begins empty."""
        self._computed.clear()
        self._known.clear()

    def take_plan(self, plan: StepPlan, worker: FakeWorker, rows: Sequence[Row], owners: dict[int, Submit]) -> None:
        """Checks what the plan shares, then learns what it computed. owners: by slot. Called after its execution."""
        starts = {chunk.slot: chunk.start for chunk in plan.chunks if chunk.init is not None}
        entries = live_entries(plan, "new_pages")
        fresh = {page for slot, index, page in entries if (index + 1) * self._page_size > starts.get(slot, 0)}
        shared = {(slot, index): page for slot, index, page in entries if page not in fresh}
        assert len(fresh) == sum((slot, index) not in shared for slot, index, _ in entries), (
            "a page was handed out twice"
        )
        known = {prefix for page, prefix in self._known.items() if page not in fresh}
        self._computed = {page: prefix for page, prefix in self._computed.items() if page not in fresh}
        self._known = {page: prefix for page, prefix in self._known.items() if page not in fresh}
        self._learn(plan, worker, rows, owners)
        for chunk in plan.chunks:
            if chunk.init is not None:
                owner = owners[chunk.slot]
                context = tuple(worker.tokens_of(chunk.slot, chunk.start + chunk.length))
                self._check_start(chunk.slot, chunk.start, context, owner.cache_salt, shared)
                if self._is_used and not _has_penalty(owner.sampler):
                    self._check_missed(chunk.slot, chunk.start, context, owner.cache_salt, known)

    def _check_start(
        self, slot: int, start: int, context: tuple[int, ...], salt: str, shared: dict[tuple[int, int], int]
    ) -> None:
        """What is shared is right."""
        size = self._page_size
        assert self._is_used or start == 0, "the cache is off"
        for index in range(start // size):
            prefix = (salt, context[: (index + 1) * size])
            assert self._computed.get(shared[slot, index]) == prefix, (
                f"page {index} of slot {slot} holds something else"
            )
        self.num_hits += start // size
        self.num_copies += start % size > 0

    def _check_missed(self, slot: int, start: int, context: tuple[int, ...], salt: str, known: set[Prefix]) -> None:
        """The page after the shared ones was not in the cache, unless it holds the request's last known token."""
        end = start - start % self._page_size + self._page_size
        if len(context) > end:
            assert (salt, context[:end]) not in known, f"the page before {end} of slot {slot} was not shared"

    def _learn(self, plan: StepPlan, worker: FakeWorker, rows: Sequence[Row], owners: dict[int, Submit]) -> None:
        num_chunk_rows = sum(chunk.length for chunk in plan.chunks)
        for number, row in enumerate(rows):
            if (row.position + 1) % self._page_size == 0:
                page = worker.page_of(row.slot, row.position)
                prefix = (owners[row.slot].cache_salt, tuple(row.context))
                if number < num_chunk_rows and prefix not in self._computed.values():
                    self._known[page] = prefix
                self._computed[page] = prefix


def _has_penalty(sampler: SamplerParams) -> bool:
    """Such a request computes tokens again, for the device to count them."""
    return sampler.repetition_penalty != 1.0 or sampler.presence_penalty != 0.0 or sampler.frequency_penalty != 0.0
