"""A worker without a device: it executes step plans by brute force on slot tables, block tables and page contents.

A page holds, for each position, the token whose K and V a real worker would have written there. The token a row draws
is a hash of everything the row can read, so one lost, repeated or misplaced token, page or slot changes the output.
"""

import zlib
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.step_schema import live_entries
from graphgen.ipc.worker_messages import SlotInit, StepPlan

VOCABULARY = 50
NEVER_WRITTEN = -1


Windows = tuple[int | None, ...]
"""Of each page group, the positions that a row sees, its own included; None is all."""


def visible(tokens: Sequence[int], window: int | None) -> list[int]:
    """What the row of the last of the tokens sees of them."""
    return list(tokens if window is None else tokens[-window:])


def next_token(contexts: Sequence[Sequence[int]], length: int, stop_token_ids: Collection[int], min_length: int) -> int:
    """The token after what a row saw in each page group; no stop token in a request shorter than `min_length`."""
    token = zlib.crc32(b"|".join(array("i", context).tobytes() for context in contexts)) % VOCABULARY
    while length < min_length and token in stop_token_ids:
        token = (token + 1) % VOCABULARY
    return token


def generate(
    prompt: Sequence[int], count: int, stop_token_ids: Collection[int], min_tokens: int, windows: Windows = (None,)
) -> list[int]:
    """The reference: `count` tokens after the prompt, drawn past any stop token."""
    tokens = list(prompt)
    for _ in range(count):
        contexts = [visible(tokens, window) for window in windows]
        tokens.append(next_token(contexts, len(tokens), stop_token_ids, len(prompt) + min_tokens))
    return tokens[len(prompt) :]


@dataclass
class Row:
    """One token row of a step: where it is, and what it read in each page group, itself last."""

    slot: int
    position: int
    contexts: list[list[int]]


@dataclass
class Slot:
    init: SlotInit
    block_table: dict[tuple[int, int], int] = field(default_factory=dict)  # by page group and index
    last_token: int = NEVER_WRITTEN


class FakeWorker:
    """Executes plans in the order they are given, as one compute stream does."""

    def __init__(self, num_pages: int, page_size: int, windows: Windows = (None,)) -> None:
        self.page_size = page_size
        self.windows = windows
        self._pages = [[NEVER_WRITTEN] * page_size for _ in range(num_pages)]
        self._slots: dict[int, Slot] = {}

    def execute(self, plan: StepPlan) -> tuple[list[int], list[Row]]:
        """The tokens of the step result, and every row of the step in the plan's order."""
        self._apply_tables(plan)
        written = self._write_chunks(plan) + self._write_decodes(plan)
        # Attention runs after all K and V of the step are written: so a page given out too early shows.
        rows = [Row(slot, position, self._read(slot, position)) for slot, position in written]
        num_chunk_rows = sum(chunk.length for chunk in plan.chunks)
        drawing, end = [], 0
        for chunk in plan.chunks:
            end += chunk.length
            if chunk.draws:
                drawing.append(rows[end - 1])
        return [self._draw(row) for row in drawing + rows[num_chunk_rows:]], rows

    def draw_instead(self, slot: int, token_id: int) -> None:
        """The token of a slot's newest row is this one."""
        self._slots[slot].last_token = token_id

    def page_of(self, group: int, slot: int, position: int) -> int:
        return self._slots[slot].block_table[group, position // self.page_size]

    def _apply_tables(self, plan: StepPlan) -> None:
        copied = self._copied_pages(plan)
        starts = {}
        for chunk in plan.chunks:
            if chunk.init is not None:
                self._slots[chunk.slot] = Slot(chunk.init)
                starts[chunk.slot] = chunk.start
        for group, slot, index, page in live_entries(plan, "new_pages"):
            table = self._slots[slot].block_table
            assert (group, index) not in table, f"page {index} of slot {slot} in group {group} was replaced"
            table[group, index] = page
            # A request that starts at a later position than 0 shares the pages before it, and of the page that this
            # position lies in it reads what was copied.
            num_kept = starts.get(slot, 0) - index * self.page_size
            if num_kept < self.page_size:
                kept = copied.pop(page)[:num_kept] if num_kept > 0 else []
                self._pages[page] = kept + [NEVER_WRITTEN] * (self.page_size - len(kept))
        assert not copied, "a page was copied and not used"

    def _copied_pages(self, plan: StepPlan) -> dict[int, list[int]]:
        """What each destination gets. A device copies all of them at once."""
        pairs = live_entries(plan, "page_copies")
        destinations = [destination for _, destination in pairs]
        for source, destination in pairs:
            others = [one for one, into in pairs if into != destination]
            assert destination not in others, f"page {destination} is written while it is copied"
            assert source == destination or source not in destinations, f"page {source} is written while it is copied"
        assert len(set(destinations)) == len(destinations)
        return {into: list(self._pages[source]) for source, into in pairs}

    def _write_chunks(self, plan: StepPlan) -> list[tuple[int, int]]:
        tokens = iter(live_entries(plan, "chunk_token_ids"))
        written = []
        for chunk in plan.chunks:
            for position in range(chunk.start, chunk.start + chunk.length):
                (token,) = next(tokens)
                self._write(chunk.slot, position, token)
                written.append((chunk.slot, position))
        assert next(tokens, None) is None, "the plan carries more tokens than its chunks hold"
        return written

    def _write_decodes(self, plan: StepPlan) -> list[tuple[int, int]]:
        slots, positions = (
            [word for (word,) in live_entries(plan, name)] for name in ("decode_slots", "decode_positions")
        )
        assert len(set(slots)) == len(slots), "a slot decodes twice in one step"
        redrawn = unpack_int32(plan.redrawn)
        for slot, token in zip(redrawn[::3], redrawn[1::3], strict=True):
            assert slot in slots, "a token is computed again and has no row"
            self._slots[slot].last_token = token
        for slot, position in zip(slots, positions, strict=True):
            self._write(slot, position, self._slots[slot].last_token)
        return list(zip(slots, positions, strict=True))

    def _write(self, slot: int, position: int, token: int) -> None:
        index, offset = divmod(position, self.page_size)
        for group in range(len(self.windows)):
            page = self._pages[self._slots[slot].block_table[group, index]]
            is_free = (
                page[offset] == NEVER_WRITTEN or self._slots[slot].init.grammar
            )  # it may have refused what is there
            assert is_free, f"position {position} of slot {slot} lies in a page that was written"
            page[offset] = token

    def _read(self, slot: int, position: int) -> list[list[int]]:
        """In each page group, what a row at this position may read."""
        table, size = self._slots[slot].block_table, self.page_size
        firsts = [0 if window is None else max(0, position - window + 1) for window in self.windows]
        return [
            [self._pages[table[group, p // size]][p % size] for p in range(first, position + 1)]
            for group, first in enumerate(firsts)
        ]

    def _draw(self, row: Row) -> int:
        slot = self._slots[row.slot]
        slot.last_token = next_token(row.contexts, row.position + 1, slot.init.stop_token_ids, slot.init.min_length)
        return slot.last_token
