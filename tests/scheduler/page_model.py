"""What the prefix cache must know, worked out by brute force from what the device computed.

Never looks into the policy: it reads plans, block tables and the tokens that rows attended to.
"""

from collections.abc import Iterator, Sequence, Set

from graphgen.ipc.engine_messages import Submit
from graphgen.ipc.step_schema import live_entries
from graphgen.ipc.worker_messages import SamplerParams, StepPlan
from tests.scheduler.fake_worker import FakeWorker, Row, Windows

Prefix = tuple[int, str, tuple[int, ...]]
"""A page group, a salt, and the tokens up to the end of a page."""


class PageModel:
    """Every page that was computed whole, and the beginning of a prompt that it completes."""

    def __init__(self, page_size: int, windows: Windows, is_used: bool) -> None:
        """is_used: whether the cache is on."""
        self._page_size = page_size
        self._windows = windows
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

    def lose(self, pages: Set[int]) -> None:
        """Somebody holds these who has not written to them yet: what they held is gone."""
        self._computed = {page: prefix for page, prefix in self._computed.items() if page not in pages}
        self._known = {page: prefix for page, prefix in self._known.items() if page not in pages}

    def take_plan(
        self,
        plan: StepPlan,
        worker: FakeWorker,
        rows: Sequence[Row],
        owners: dict[int, Submit],
        tokens: dict[int, list[int]],
    ) -> None:
        """Checks what the plan shares, then learns what it computed. Called after its execution.

        owners: by slot. tokens: by slot, all that the device knows or draws of its request.
        """
        starts = {chunk.slot: chunk.start for chunk in plan.chunks if chunk.init is not None}
        entries = live_entries(plan, "new_pages")
        fresh = {page for _, slot, index, page in entries if (index + 1) * self._page_size > starts.get(slot, 0)}
        shared = {(group, slot, index): page for group, slot, index, page in entries if page not in fresh}
        assert len(fresh) == sum(entry[:3] not in shared for entry in entries), "a page was handed out twice"
        known = {prefix for page, prefix in self._known.items() if page not in fresh}
        self.lose(fresh)
        self._learn(plan, worker, rows, owners, tokens)
        for chunk in plan.chunks:
            if chunk.init is not None:
                owner = owners[chunk.slot]
                context = tuple(tokens[chunk.slot][: chunk.start + chunk.length])
                self._check_start(chunk.slot, chunk.start, context, owner.cache_salt, shared)
                if self._is_used and not _has_penalty(owner.sampler) and owner.prompt_logprobs is None:
                    self._check_missed(chunk.slot, chunk.start, context, owner.cache_salt, known)

    def _read_behind(self, num_pages: int) -> Iterator[tuple[int, int]]:
        """(page group, index) of the pages before this one that rows behind it read."""
        for group, window in enumerate(self._windows):
            oldest = 0 if window is None else max(0, num_pages * self._page_size - window + 1)
            yield from ((group, index) for index in range(oldest // self._page_size, num_pages))

    def _check_start(
        self, slot: int, start: int, context: tuple[int, ...], salt: str, shared: dict[tuple[int, int, int], int]
    ) -> None:
        """What is shared is right, and all there that is read."""
        size = self._page_size
        assert self._is_used or start == 0, "the cache is off"
        assert {(slot, *place) for place in self._read_behind(start // size)} == {
            (slot, group, index) for group, owner, index in shared if owner == slot
        }
        for group, index in self._read_behind(start // size):
            prefix = (group, salt, context[: (index + 1) * size])
            assert self._computed.get(shared[group, slot, index]) == prefix, (
                f"page {index} of slot {slot} in group {group} holds something else"
            )
        self.num_hits += start // size
        self.num_copies += start % size > 0

    def _check_missed(self, slot: int, start: int, context: tuple[int, ...], salt: str, known: set[Prefix]) -> None:
        """No longer beginning was in the cache, without the request's last known token: of each a page was missing."""
        size = self._page_size
        for num_pages in range(start // size + 1, (len(context) - 1) // size + 1):
            needed = {(group, salt, context[: (index + 1) * size]) for group, index in self._read_behind(num_pages)}
            assert not needed <= known, f"the pages before {num_pages * size} of slot {slot} were not shared"

    def _learn(
        self,
        plan: StepPlan,
        worker: FakeWorker,
        rows: Sequence[Row],
        owners: dict[int, Submit],
        tokens: dict[int, list[int]],
    ) -> None:
        num_chunk_rows = sum(chunk.length for chunk in plan.chunks)
        for number, row in enumerate(rows):
            if (row.position + 1) % self._page_size:
                continue
            for group in range(len(self._windows)):
                page = worker.page_of(group, row.slot, row.position)
                prefix = (group, owners[row.slot].cache_salt, tuple(tokens[row.slot][: row.position + 1]))
                if number < num_chunk_rows and prefix not in self._computed.values():
                    self._known[page] = prefix
                self._computed[page] = prefix


def _has_penalty(sampler: SamplerParams) -> bool:
    """Such a request computes tokens again, for the device to count them."""
    return sampler.repetition_penalty != 1.0 or sampler.presence_penalty != 0.0 or sampler.frequency_penalty != 0.0
