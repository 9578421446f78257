"""One step on the device: from the input block to the drawn tokens, without a word to the host.

Owns the slot tables and the order of a step. Everything here has fixed shapes and addresses, so that one graph per
bucket holds all of it; on the CPU it runs as it stands. Read `Step.__call__` top to bottom: that is what a graph is.

Shapes: `T` = `P` prefill rows + `R` decode rows; `C` chunks; `S` slots, the trash slot being number S; `M` pages of
a block table. Padded rows belong to the trash slot, whose block table holds the trash page alone.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from graphgen.capture.buffers import BlockLayout
from graphgen.ipc.messages import Bucket
from graphgen.models.attention.tables import RowTables
from graphgen.models.decoder import Decoder
from graphgen.models.kv_cache import KVCache
from graphgen.models.sampling import Sampler

TOKEN_RING = 4
"""Rows of the token ring: a step's tokens stay on the device while two later steps run."""


class SlotTables:
    """What the device keeps between steps, one row per slot and a last one for padding."""

    def __init__(self, num_slots: int, pages_per_slot: int, trash_page: int, device: torch.device) -> None:
        self.block_table = torch.full((num_slots + 1, pages_per_slot), trash_page, dtype=torch.int32, device=device)
        self.last_token = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)


class Attention(Protocol):
    """The part of an attention backend that runs inside a step."""

    def prepare(self, tables: RowTables) -> list[Tensor]: ...


class Rows(NamedTuple):
    """The step's token rows, [T] int64 each; padded rows have the trash slot and position 0."""

    slots: Tensor
    positions: Tensor
    token_ids: Tensor


class Step:
    """The callable of one bucket."""

    def __init__(
        self,
        bucket: Bucket,
        layout: BlockLayout,
        block: Tensor,
        slots: SlotTables,
        token_ring: Tensor,
        decoder: Decoder,
        kv_cache: KVCache,
        attention: Attention,
        sampler: Sampler,
    ) -> None:
        """block: the device's input words. token_ring: [TOKEN_RING, most sampled rows] int32."""
        self._bucket = bucket
        self._fields = layout.views(block)
        self._slots = slots
        self._token_ring = token_ring
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._attention = attention
        self._sampler = sampler
        device = block.device
        self._trash_slot = slots.last_token.shape[0] - 1
        self._prefill_rows = torch.arange(bucket.prefill_rows, device=device)
        self._decode_rows = torch.arange(bucket.prefill_rows, bucket.num_rows, device=device)
        self._page_numbers = torch.arange(self._fields["new_pages"].shape[0] // 3, device=device)

    def __call__(self) -> None:
        self._append_pages()
        chunk_slots = self._fields["chunk_slots"].long()
        self._sampler.write_slots(self._fields["slot_params"], chunk_slots, self._fields["chunk_inits"])
        rows = self._expand_rows()
        self._sampler.count_inputs(rows.token_ids, rows.slots, rows.positions)
        tables = self._row_tables(rows)
        sequence_lens = torch.maximum(self._sampler.tables.prompt_len[rows.slots].long(), rows.positions + 1)
        hidden = self._decoder(
            rows.token_ids,
            rows.positions,
            sequence_lens,
            self._kv_cache,
            tables,
            self._attention.prepare(tables),
        )
        self._draw(hidden, rows, chunk_slots)

    def _append_pages(self) -> None:
        """Enters the plan's new pages into the block tables; entries past the live ones go to the trash slot."""
        slot, index, page = self._fields["new_pages"].view(-1, 3).unbind(1)
        live = self._page_numbers < self._fields["counts"][1]
        places = (torch.where(live, slot, self._trash_slot).long(), torch.where(live, index, 0).long())
        self._slots.block_table.index_put_(places, torch.where(live, page, self._kv_cache.trash_page))

    def _expand_rows(self) -> Rows:
        """The chunk table becomes rows; decode rows take the token that was drawn last for their slot."""
        decode_slots = self._fields["decode_slots"].long()
        decode_positions = self._fields["decode_positions"].long()
        decode_tokens = self._slots.last_token[decode_slots]
        if not self._bucket.prefill_rows:
            return Rows(decode_slots, decode_positions, decode_tokens)
        starts = self._fields["chunk_starts"]
        num_chunks = starts.shape[0] - 1
        # A chunk ends where the next begins, so the row's chunk is the number of ends at or before it.
        chunk = torch.searchsorted(starts[1:], self._prefill_rows.int(), right=True).clamp(max=num_chunks - 1)
        live = self._prefill_rows < self._fields["counts"][0]
        slots = torch.where(live, self._fields["chunk_slots"][chunk].long(), self._trash_slot)
        offset = self._prefill_rows - starts[chunk]
        positions = torch.where(live, self._fields["chunk_positions"][chunk] + offset, 0)
        return Rows(
            torch.cat((slots, decode_slots)),
            torch.cat((positions, decode_positions)),
            torch.cat((self._fields["chunk_token_ids"].long(), decode_tokens)),
        )

    def _row_tables(self, rows: Rows) -> RowTables:
        """Where the rows write their K and V, and what they see."""
        page_size = self._kv_cache.page_size
        block_table = self._slots.block_table
        pages = block_table[rows.slots, rows.positions // page_size].long()
        split = self._bucket.prefill_rows
        starts = self._fields["chunk_starts"]
        lengths = starts[1:] - starts[:-1]
        return RowTables(
            kv_locations=pages * page_size + rows.positions % page_size,
            chunk_starts=starts,
            chunk_kv_lens=torch.where(lengths > 0, self._fields["chunk_positions"] + lengths, 0),
            chunk_pages=block_table[self._fields["chunk_slots"].long()],
            decode_kv_lens=(rows.positions[split:] + 1).int(),
            decode_pages=block_table[rows.slots[split:]],
        )

    def _draw(self, hidden: Tensor, rows: Rows, chunk_slots: Tensor) -> None:
        """Logits of the rows that sample, their tokens, and the feedback: last tokens and the token ring."""
        last_rows = (self._fields["chunk_starts"][1:] - 1).clamp(min=0).long()
        sampled = torch.cat((last_rows, self._decode_rows))
        drawing_chunks = torch.where(self._fields["chunk_samples"] > 0, chunk_slots, self._trash_slot)
        slots = torch.cat((drawing_chunks, rows.slots[self._bucket.prefill_rows :]))
        logits = self._decoder.logits(hidden[sampled])
        tokens = self._sampler.sample(logits, slots, rows.positions[sampled] + 1)
        self._slots.last_token.index_copy_(0, slots, tokens.long())
        ring_row = self._fields["counts"][2:3].long()
        self._token_ring[:, : tokens.shape[0]].index_copy_(0, ring_row, tokens.int().unsqueeze(0))
