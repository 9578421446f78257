"""RowExpander in Triton: what rows.py does with some forty torch kernels, in five launches. CUDA only.

A step of one row would spend as long between forty tiny kernels as in two layers of the model. One compilation serves
all buckets: Triton is told not to specialise on sizes, nor on where a bucket's fields lie.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphgen.ipc.step_schema import NEW_PAGE_WORDS, Counts
from graphgen.ipc.worker_messages import Bucket
from graphgen.models.attention.tables import RowTables
from graphgen.worker.rows import DrawingRows, ExpandedStep, Rows, SlotTables

_ROW_BLOCK = 128
_PAGE_BLOCK = 1024
_CHUNK_BLOCK = 32
_TABLE_BLOCK = 256

_NO_WINDOW = 2**31 - 1
"""More than any position."""

_PREFILL_ROWS = tl.constexpr(int(Counts.PREFILL_ROWS))
_NEW_PAGES = tl.constexpr(int(Counts.NEW_PAGES))
_OUTPUT_ROW = tl.constexpr(int(Counts.OUTPUT_ROW))
_ENTRY = tl.constexpr(NEW_PAGE_WORDS)


@triton.jit(  # type: ignore[untyped-decorator]  # triton has no types
    do_not_specialize=["counts", "new_pages", "group_stride", "table_stride"]
)
def _append_pages_kernel(
    counts: "tl.tensor",
    new_pages: "tl.tensor",
    block_tables: "tl.tensor",
    group_stride: int,
    table_stride: int,
    BLOCK: tl.constexpr,
) -> None:
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = number < tl.load(counts + _NEW_PAGES)
    group = tl.load(new_pages + number * _ENTRY, live, other=0).to(tl.int64)
    slot = tl.load(new_pages + number * _ENTRY + 1, live, other=0).to(tl.int64)
    index = tl.load(new_pages + number * _ENTRY + 2, live, other=0)
    page = tl.load(new_pages + number * _ENTRY + 3, live, other=0)
    tl.store(block_tables + group * group_stride + slot * table_stride + index, page, live)


@triton.jit(  # type: ignore[untyped-decorator]  # triton has no types
    do_not_specialize=["slots", "positions", "windows", "num_pages", "group_stride", "table_stride", "num_rows"]
)
def _window_tables_kernel(
    slots: "tl.tensor",
    positions: "tl.tensor",
    windows: "tl.tensor",
    block_tables: "tl.tensor",
    pages: "tl.tensor",
    num_pages: int,
    group_stride: int,
    table_stride: int,
    num_rows: int,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per row, BLOCK pages and page group. pages: [G, rows, M]. windows: [G], more than any position for
    a group without one."""
    row, group = tl.program_id(0), tl.program_id(2).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_pages
    slot = tl.load(slots + row).to(tl.int64)
    oldest = tl.maximum(tl.load(positions + row).to(tl.int32) - tl.load(windows + group) + 1, 0)
    source = tl.maximum(index, oldest // PAGE)
    page = tl.load(block_tables + group * group_stride + slot * table_stride + source, inside, other=0)
    tl.store(pages + (group * num_rows + row) * num_pages + index, page, inside)


@triton.jit(  # type: ignore[untyped-decorator]  # triton has no types
    do_not_specialize=[
        *("counts", "chunk_slots", "chunk_positions", "chunk_starts", "chunk_draws", "chunk_token_ids"),
        *("decode_slots", "decode_positions", "request_lens", "kv_locations", "kv_lens", "drawing_rows"),
        *("num_prefill", "num_decode", "num_chunks", "group_stride", "table_stride", "request_lens_stride"),
        "trash_slot",
    ]
)
def _expand_kernel(
    counts: "tl.tensor",
    chunk_slots: "tl.tensor",
    chunk_positions: "tl.tensor",
    chunk_starts: "tl.tensor",
    chunk_draws: "tl.tensor",
    chunk_token_ids: "tl.tensor",
    decode_slots: "tl.tensor",
    decode_positions: "tl.tensor",
    last_token: "tl.tensor",
    block_tables: "tl.tensor",
    request_lens: "tl.tensor",
    row_outputs: "tl.tensor",
    kv_locations: "tl.tensor",
    kv_lens: "tl.tensor",
    drawing_rows: "tl.tensor",
    num_prefill: int,
    num_decode: int,
    num_chunks: int,
    group_stride: int,
    table_stride: int,
    request_lens_stride: int,
    trash_slot: int,
    GROUPS: tl.constexpr,
    PAGE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per BLOCK rows; the first also describes the chunks.

    row_outputs: slots, positions, token ids, sequence lengths, one after another. kv_locations: [G, T]. kv_lens: of
    chunks, then of decode rows. drawing_rows: rows, slots, positions, one after another.
    """
    num_rows = num_prefill + num_decode
    num_drawing_rows = num_chunks + num_decode
    chunks = tl.arange(0, CHUNKS)
    in_chunks = chunks < num_chunks
    starts = tl.load(chunk_starts + chunks, in_chunks, other=0)
    ends = tl.load(chunk_starts + chunks + 1, in_chunks, other=2147483647)

    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    in_prefill = row < num_prefill
    live = row < tl.load(counts + _PREFILL_ROWS)
    # A chunk ends where the next begins, so the row's chunk is the number of ends at or before it.
    chunk = tl.minimum(tl.sum((ends[None, :] <= row[:, None]).to(tl.int32), 1), num_chunks - 1)
    offset = row - tl.load(chunk_starts + chunk, live, other=0)
    decode = row - num_prefill
    in_decode = inside & (decode >= 0)
    slot = tl.load(chunk_slots + chunk, live, other=0)
    slot = tl.where(live, slot, tl.load(decode_slots + decode, in_decode, other=trash_slot)).to(tl.int64)
    position = tl.load(chunk_positions + chunk, live, other=0) + offset
    position = tl.where(live, position, tl.load(decode_positions + decode, in_decode, other=0)).to(tl.int64)
    token_id = tl.load(chunk_token_ids + row, in_prefill, other=0).to(tl.int64)
    token_id = tl.where(in_decode, tl.load(last_token + slot, in_decode, other=0), token_id)
    length = tl.load(request_lens + slot * request_lens_stride, inside, other=0).to(tl.int64)

    tl.store(row_outputs + row, slot, inside)
    tl.store(row_outputs + num_rows + row, position, inside)
    tl.store(row_outputs + 2 * num_rows + row, token_id, inside)
    tl.store(row_outputs + 3 * num_rows + row, tl.maximum(length, position + 1), inside)
    for group in tl.static_range(GROUPS):
        entry = block_tables + group * group_stride + slot * table_stride + position // PAGE
        page = tl.load(entry, inside, other=0).to(tl.int64)
        tl.store(kv_locations + group * num_rows + row, page * PAGE + position % PAGE, inside)
    tl.store(kv_lens + num_chunks + decode, (position + 1).to(tl.int32), in_decode)
    place = num_chunks + decode
    tl.store(drawing_rows + place, row.to(tl.int64), in_decode)
    tl.store(drawing_rows + num_drawing_rows + place, slot, in_decode)
    tl.store(drawing_rows + 2 * num_drawing_rows + place, position + 1, in_decode)

    if tl.program_id(0) == 0:
        lengths = ends - starts
        seen = tl.where(lengths > 0, tl.load(chunk_positions + chunks, in_chunks, other=0) + lengths, 0)
        draws = tl.load(chunk_draws + chunks, in_chunks, other=0) > 0
        drawing = tl.where(draws, tl.load(chunk_slots + chunks, in_chunks, other=0), trash_slot)
        tl.store(kv_lens + chunks, seen, in_chunks)
        tl.store(drawing_rows + chunks, tl.maximum(ends - 1, 0).to(tl.int64), in_chunks)
        tl.store(drawing_rows + num_drawing_rows + chunks, drawing.to(tl.int64), in_chunks)
        tl.store(drawing_rows + 2 * num_drawing_rows + chunks, tl.maximum(seen, 1).to(tl.int64), in_chunks)


@triton.jit(  # type: ignore[untyped-decorator]  # triton has no types
    do_not_specialize=["counts", "slots", "num_drawing_rows", "ring_stride"]
)
def _feed_back_kernel(
    counts: "tl.tensor",
    tokens: "tl.tensor",
    slots: "tl.tensor",
    last_token: "tl.tensor",
    ring: "tl.tensor",
    num_drawing_rows: int,
    ring_stride: int,
    BLOCK: tl.constexpr,
) -> None:
    draw = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = draw < num_drawing_rows
    token = tl.load(tokens + draw, inside, other=0)
    tl.store(last_token + tl.load(slots + draw, inside, other=0), tl.maximum(token, 0).to(tl.int64), inside)
    tl.store(ring + tl.load(counts + _OUTPUT_ROW) * ring_stride + draw, token.to(tl.int32), inside)


class TritonRows:
    """RowExpander on CUDA. Padded prompt rows' sequence length, and drawing rows of the trash slot, are arbitrary."""

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
        """As of TorchRows."""
        del trash_page  # entries past the live ones are not written at all
        self._bucket = bucket
        self._fields = fields
        self._slots = slots
        self._request_lens = request_lens
        self._outputs = outputs
        self._page_size = page_size
        self._num_chunks = fields["chunk_slots"].shape[0]
        self._windows = _windows_on(request_lens.device, slots.windows)
        assert self._num_chunks <= _CHUNK_BLOCK, "the kernel describes all chunks in one block"

    def append_pages(self) -> None:
        """As of RowExpander."""
        new_pages, block_tables = self._fields["new_pages"], self._slots.block_tables
        _append_pages_kernel[(triton.cdiv(new_pages.shape[0] // NEW_PAGE_WORDS, _PAGE_BLOCK),)](
            self._fields["counts"], new_pages, block_tables, *block_tables.stride()[:2], _PAGE_BLOCK
        )

    def expand(self) -> ExpandedStep:
        """As of RowExpander."""
        bucket, fields, block_tables = self._bucket, self._fields, self._slots.block_tables
        num_rows, num_drawing_rows = bucket.num_rows, self._num_chunks + bucket.decode_rows
        num_groups, device = block_tables.shape[0], block_tables.device
        row_outputs = torch.empty((4, num_rows), dtype=torch.int64, device=device)
        kv_locations = torch.empty((num_groups, num_rows), dtype=torch.int64, device=device)
        kv_lens = torch.empty(num_drawing_rows, dtype=torch.int32, device=device)
        drawing_rows = torch.empty((3, num_drawing_rows), dtype=torch.int64, device=device)
        _expand_kernel[(triton.cdiv(num_rows, _ROW_BLOCK),)](
            fields["counts"],
            fields["chunk_slots"],
            fields["chunk_positions"],
            fields["chunk_starts"],
            fields["chunk_draws"],
            fields["chunk_token_ids"],
            fields["decode_slots"],
            fields["decode_positions"],
            self._slots.last_token,
            block_tables,
            self._request_lens,
            row_outputs,
            kv_locations,
            kv_lens,
            drawing_rows,
            bucket.prefill_rows,
            bucket.decode_rows,
            self._num_chunks,
            *block_tables.stride()[:2],
            self._request_lens.stride(0),
            self._slots.trash_slot,
            num_groups,
            self._page_size,
            _CHUNK_BLOCK,
            _ROW_BLOCK,
        )
        chunk_pages = self._pages(fields["chunk_slots"], fields["chunk_positions"])
        decode_pages = self._pages(fields["decode_slots"], fields["decode_positions"])
        tables = tuple(
            RowTables(
                kv_locations=kv_locations[group],
                chunk_starts=fields["chunk_starts"],
                chunk_kv_lens=kv_lens[: self._num_chunks],
                chunk_pages=chunk_pages[group],
                decode_kv_lens=kv_lens[self._num_chunks :],
                decode_pages=decode_pages[group],
            )
            for group in range(num_groups)
        )
        return ExpandedStep(Rows(*row_outputs.unbind(0)), tables, DrawingRows(*drawing_rows.unbind(0)))

    def _pages(self, slots: Tensor, positions: Tensor) -> Tensor:
        """The block tables of slots, [G, rows, M] int32; see TorchRows for what stands behind a window."""
        block_tables = self._slots.block_tables
        if self._windows is None:
            return block_tables.index_select(1, slots)
        (num_groups, _, num_pages), num_rows = block_tables.shape, slots.shape[0]
        pages = torch.empty((num_groups, num_rows, num_pages), dtype=torch.int32, device=slots.device)
        if num_rows:
            _window_tables_kernel[(num_rows, triton.cdiv(num_pages, _TABLE_BLOCK), num_groups)](
                slots,
                positions,
                self._windows,
                block_tables,
                pages,
                num_pages,
                *block_tables.stride()[:2],
                num_rows,
                self._page_size,
                _TABLE_BLOCK,
            )
        return pages

    def feed_back(self, tokens: Tensor, drawing_rows: DrawingRows) -> None:
        """As of RowExpander."""
        num_drawing_rows, ring = tokens.shape[0], self._outputs["token_ids"]
        _feed_back_kernel[(triton.cdiv(num_drawing_rows, _ROW_BLOCK),)](
            self._fields["counts"],
            tokens,
            drawing_rows.slots,
            self._slots.last_token,
            ring,
            num_drawing_rows,
            ring.stride(0),
            _ROW_BLOCK,
        )


def _windows_on(device: torch.device, windows: tuple[int | None, ...]) -> Tensor | None:
    """[G] int32; None where no group has a window."""
    if all(window is None for window in windows):
        return None
    return torch.tensor([_NO_WINDOW if window is None else window for window in windows], dtype=torch.int32).to(device)
