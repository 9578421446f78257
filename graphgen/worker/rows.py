"""What a step plan means on the device: its token rows, what they attend to, and which of them draw a token.

Owns the slot tables and the way from a bucket's input fields to row tables; `graphgen.ipc.step_schema` says what the
fields hold. Runs at the start of every captured step, before any layer. This is the torch version, some forty small
kernels; in rows_cuda.py they are four, since each costs a microsecond or two however little it does.

Shapes: `T` = `P` prefill rows + `R` decode rows; `C` chunks; `N` = C + R rows that may draw; `S` slots, the trash slot
being number S; `M` pages of a block table; `G` page groups.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from graphgen.ipc.step_schema import NEW_PAGE_WORDS, Counts
from graphgen.ipc.worker_messages import Bucket
from graphgen.models.attention.tables import RowTables


class SlotTables:
    """What the device keeps between steps, one row per slot and a last one for padding."""

    def __init__(
        self,
        num_slots: int,
        pages_per_slot: int,
        trash_page: int,
        device: torch.device,
        windows: tuple[int | None, ...] = (None,),
    ) -> None:
        """windows: of each page group, the positions that a row sees; None sees all."""
        shape = (len(windows), num_slots + 1, pages_per_slot)
        self.windows = windows
        self.block_tables = torch.full(shape, trash_page, dtype=torch.int32, device=device)
        """[G, S + 1, M]. Entries that lie behind a window name pages that may be others' by now."""
        self.last_token = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)

    @property
    def trash_slot(self) -> int:
        return self.last_token.shape[0] - 1


class Rows(NamedTuple):
    """The step's token rows, [T] int64 each; padded rows have the trash slot and position 0."""

    slots: Tensor
    positions: Tensor
    token_ids: Tensor
    sequence_lens: Tensor
    """Of the row's request: max(its length, position + 1), see TorchRows."""


class DrawingRows(NamedTuple):
    """The rows whose logits are computed, [N] int64 each: last rows of chunks, then decode rows. Those that get no
    token belong to the trash slot."""

    rows: Tensor
    slots: Tensor
    positions: Tensor  # of the token that is drawn


class ExpandedStep(NamedTuple):
    """All that the rest of a step reads of its plan."""

    rows: Rows
    tables: tuple[RowTables, ...]
    """Of each page group."""
    drawing_rows: DrawingRows


class RowExpander(Protocol):
    """The rows of one bucket, in torch here and in Triton in rows_cuda.py."""

    def append_pages(self) -> None:
        """Enters the plan's new pages into the block tables."""

    def expand(self) -> ExpandedStep:
        """Reads the plan and the slot tables; the new owners' parameters must be in the slots' tables by now."""

    def feed_back(self, tokens: Tensor, drawing_rows: DrawingRows) -> None:
        """Makes the drawn tokens, [N], the last tokens of their slots, and writes them into the step's outputs.

        The slot of a row that drew NO_TOKEN gets token 0: the next step may run before the host knows, and needs some
        token to look up.
        """


class TorchRows:
    """RowExpander on any device."""

    def __init__(
        self,
        bucket: Bucket,
        fields: Mapping[str, Tensor],
        slots: SlotTables,
        request_lens: Tensor,
        outputs: Mapping[str, Tensor],
        page_size: int,
        trash_page: int,
    ) -> None:
        """fields: of the bucket's input block. request_lens: [S + 1] int32, of each slot's owner the prompt's
        length or the most tokens it may have: the one from which a rotation follows. outputs: of the ring, see
        `OutputRing.views`."""
        self._bucket = bucket
        self._fields = fields
        self._slots = slots
        self._request_lens = request_lens
        self._outputs = outputs
        self._page_size = page_size
        self._trash_page = trash_page
        device = request_lens.device
        self._prefill_rows = torch.arange(bucket.prefill_rows, device=device)
        self._decode_rows = torch.arange(bucket.prefill_rows, bucket.num_rows, device=device)
        self._page_numbers = torch.arange(fields["new_pages"].shape[0] // NEW_PAGE_WORDS, device=device)

    def append_pages(self) -> None:
        """Entries past the live ones go to the trash slot."""
        group, slot, index, page = self._fields["new_pages"].view(-1, NEW_PAGE_WORDS).unbind(1)
        live = self._page_numbers < self._fields["counts"][Counts.NEW_PAGES]
        slot = torch.where(live, slot, self._slots.trash_slot)
        group, index = torch.where(live, group, 0), torch.where(live, index, 0)
        places = group.long(), slot.long(), index.long()
        self._slots.block_tables.index_put_(places, torch.where(live, page, self._trash_page))

    def expand(self) -> ExpandedStep:
        rows = self._rows()
        groups = range(len(self._slots.windows))
        tables = tuple(self._row_tables(rows, group) for group in groups)
        return ExpandedStep(rows, tables, self._drawing_rows(rows))

    def feed_back(self, tokens: Tensor, drawing_rows: DrawingRows) -> None:
        self._slots.last_token.index_copy_(0, drawing_rows.slots, tokens.clamp(min=0).long())
        output_row = self._fields["counts"][Counts.OUTPUT_ROW].long().view(1)
        self._outputs["token_ids"].index_copy_(0, output_row, tokens.int().unsqueeze(0))

    def _rows(self) -> Rows:
        """The chunk table becomes rows; decode rows take the token that was drawn last for their slot."""
        slots = self._fields["decode_slots"].long()
        positions = self._fields["decode_positions"].long()
        token_ids = self._slots.last_token[slots]
        if self._bucket.prefill_rows:
            starts = self._fields["chunk_starts"]
            num_chunks = starts.shape[0] - 1
            # A chunk ends where the next begins, so the row's chunk is the number of ends at or before it.
            chunk = torch.searchsorted(starts[1:], self._prefill_rows.int(), right=True).clamp(max=num_chunks - 1)
            live = self._prefill_rows < self._fields["counts"][Counts.PREFILL_ROWS]
            offset = self._prefill_rows - starts[chunk]
            chunk_slots = torch.where(live, self._fields["chunk_slots"][chunk].long(), self._slots.trash_slot)
            slots = torch.cat((chunk_slots, slots))
            positions = torch.cat((torch.where(live, self._fields["chunk_positions"][chunk] + offset, 0), positions))
            token_ids = torch.cat((self._fields["chunk_token_ids"].long(), token_ids))
        return Rows(slots, positions, token_ids, torch.maximum(self._request_lens[slots].long(), positions + 1))

    def _row_tables(self, rows: Rows, group: int) -> RowTables:
        """Where the rows write their K and V in the layers of a page group, and what they see there."""
        pages = self._slots.block_tables[group, rows.slots, rows.positions // self._page_size].long()
        split = self._bucket.prefill_rows
        starts = self._fields["chunk_starts"]
        lengths = starts[1:] - starts[:-1]
        return RowTables(
            kv_locations=pages * self._page_size + rows.positions % self._page_size,
            chunk_starts=starts,
            chunk_kv_lens=torch.where(lengths > 0, self._fields["chunk_positions"] + lengths, 0),
            chunk_pages=self._pages(group, self._fields["chunk_slots"], self._fields["chunk_positions"]),
            decode_kv_lens=(rows.positions[split:] + 1).int(),
            decode_pages=self._pages(group, rows.slots[split:], rows.positions[split:]),
        )

    def _pages(self, group: int, slots: Tensor, positions: Tensor) -> Tensor:
        """The block tables of slots whose first row is at this position, [N, M] int32.

        In place of pages behind a window comes the first that is not. No row sees any of it, but a kernel may read it,
        and what others write there is no business of this request, least of all a NaN.
        """
        tables, window = self._slots.block_tables[group][slots.long()], self._slots.windows[group]
        if window is None:
            return tables
        first = (positions.long() - window + 1).clamp(min=0) // self._page_size
        index = torch.arange(tables.shape[1], device=tables.device)
        return tables.gather(1, torch.maximum(index, first.unsqueeze(1)))

    def _drawing_rows(self, rows: Rows) -> DrawingRows:
        last_rows = (self._fields["chunk_starts"][1:] - 1).clamp(min=0).long()
        drawing = torch.cat((last_rows, self._decode_rows))
        draws = self._fields["chunk_draws"] > 0
        chunk_slots = torch.where(draws, self._fields["chunk_slots"].long(), self._slots.trash_slot)
        slots = torch.cat((chunk_slots, rows.slots[self._bucket.prefill_rows :]))
        return DrawingRows(drawing, slots, rows.positions[drawing] + 1)
