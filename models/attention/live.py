"""Paged attention on the CPU: of a step only what is live, found out once for all layers.

Owns what each row of a step reads: which rows share a product, which pages they gather and what they do not see. A
layer then gathers and multiplies, and asks no tensor for its contents. Never allocates KV pages. `LiveStep` is called
by the decoder's layers where nothing is compiled, and by the operators of reference.py elsewhere.

Shapes: `T` token rows, `R` decode rows of a batch, `P` pages of each, `L` positions, `Hq`/`Hkv` heads, `D` head size.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphgen.models.attention.formula import attend_rows, visible
from graphgen.models.attention.pages import LayerPages, store, take
from graphgen.models.attention.tables import RowTables
from graphgen.models.attention.variant import AttentionVariant, Numbers, Scoring

_BATCH_POSITIONS = 2048
"""Positions whose K and V are gathered at once: small enough for the cache and for memory the process has."""
_BLOCK_ROWS = 64
"""Rows of a chunk whose scores are held at once, where no kernel of torch's serves: bounds memory, not the result."""


class ChunkRead(NamedTuple):
    """The rows of one chunk, and the positions that some of them see."""

    rows: slice
    pages: Tensor
    """[P] int32"""
    positions: Tensor
    """[L]: what the pages hold, from the first one that is seen to the last row's own."""
    own: Tensor
    """[rows]: the position of each row."""
    seen: Tensor | None
    """[rows, L] bool; None: each row sees all positions up to its own."""

    def attend(self, q: Tensor, pages: LayerPages, scoring: Scoring) -> Tensor:
        """q: [rows, Hq, D], like the result."""
        keys, values = (part.flatten(0, 1)[: len(self.positions)] for part in _taken(pages, self.pages, q.dtype))
        if not scoring.only_masks:
            blocks = zip(q.split(_BLOCK_ROWS), self.own.split(_BLOCK_ROWS), strict=True)
            return torch.cat(
                [
                    attend_rows(part[None], keys[None], values[None], own[None], self.positions, scoring)[0]
                    for part, own in blocks
                ]
            )
        mixed = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=self.seen,
            is_causal=self.seen is None,
            scale=scoring.numbers.scale,
            enable_gqa=True,
        )
        return mixed[0].transpose(0, 1)


class RowRead(NamedTuple):
    """A decode row alone. It sees all that it reads, so nothing is masked."""

    rows: slice
    pages: Tensor
    """[P] int32"""
    seen: slice
    """The positions that it sees, among those of its pages."""
    positions: Tensor
    """[L]: their numbers."""

    def attend(self, q: Tensor, pages: LayerPages, scoring: Scoring) -> Tensor:
        """q: [1, Hq, D], like the result."""
        keys, values = (part.flatten(0, 1)[None, self.seen] for part in _taken(pages, self.pages, q.dtype))
        if not scoring.only_masks:
            return attend_rows(q[None], keys, values, self.positions[None, -1:], self.positions, scoring)[0]
        return _mixed(q, keys, values, None, scoring)


class BatchRead(NamedTuple):
    """Decode rows of similar length. Each reads as many pages as the longest, of which less than half are padding."""

    rows: slice | Tensor
    pages: Tensor
    """[R * P] int32"""
    positions: Tensor
    """[L]"""
    own: Tensor
    """[R, 1]: the position of each row."""
    past_end: Tensor
    """Of all R * L positions, those past their row's end."""
    seen: Tensor
    """[R, 1, 1, L] bool"""

    def attend(self, q: Tensor, pages: LayerPages, scoring: Scoring) -> Tensor:
        """q: [R, Hq, D], like the result."""
        keys, values = _taken(pages, self.pages, q.dtype)
        # Past a row's end lies whatever the page held before; a weight of zero does not silence a NaN.
        for part in (keys,) if values is keys else (keys, values):
            part.flatten(0, 1).index_fill_(0, self.past_end, 0)
        keys, values = (part.view(len(q), -1, *part.shape[2:]) for part in (keys, values))
        if not scoring.only_masks:
            return attend_rows(q[:, None], keys, values, self.own, self.positions, scoring).flatten(0, 1)
        return _mixed(q, keys, values, self.seen, scoring)


class Turn(NamedTuple):
    """A rotation of a step's rows, as heads [T, H, D] are multiplied by it."""

    cos: Tensor
    """[T, D], as layers hand it over."""
    sin: Tensor
    of_heads: Tensor
    """[T, 1, D]: cos."""
    signed_sin: Tensor
    """[T, 1, D]: sin, negative in the first half, which takes the second half of a head."""


Read = ChunkRead | RowRead | BatchRead


class LiveStep:
    """StepAttention of one step."""

    def __init__(self, tables: RowTables, page_size: int) -> None:
        self._tables, self._page_size = tables, page_size
        self._chunk_starts: list[int] = tables.chunk_starts.tolist()
        self._chunk_lens: list[int] = tables.chunk_kv_lens.tolist()
        self._decode_lens: list[int] = tables.decode_kv_lens.tolist()
        self._reads: dict[tuple[int, int], list[Read]] = {}
        """By the window and the segment of a layer."""
        self._turn: Turn | None = None

    @property
    def tables(self) -> RowTables:
        return self._tables

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        pages: LayerPages,
        variant: AttentionVariant,
        temperatures: Tensor | None = None,
    ) -> Tensor:
        """See StepAttention."""
        q, k = self._rotate(torch.cat((q, k), dim=1), cos, sin).split((q.shape[1], k.shape[1]), dim=1)
        if temperatures is not None:
            q = (q * temperatures[:, None, None]).to(q.dtype)
        store(pages.k, pages.k_scales, k, self._tables.kv_locations)
        store(pages.v, pages.v_scales, v, self._tables.kv_locations)
        numbers, sinks, slopes = variant
        return self._gathered(q, pages, Scoring(Numbers.unpacked(numbers), sinks, slopes))

    def attend_latent(
        self, q: Tensor, row: Tensor, pages: Tensor, value_size: int, variant: AttentionVariant
    ) -> Tensor:
        """See StepAttention. It is attention whose values are its keys, of which the end is dropped: kernels for equal
        sizes serve it."""
        store(pages, None, row[:, None], self._tables.kv_locations)
        gathered = self._gathered(q, LayerPages(pages, pages), Scoring(Numbers.unpacked(variant.numbers)))
        return gathered[..., :value_size].contiguous()

    def _rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """rope.rotate in place, with the same roundings. What the layers of a rotation share is made once."""
        if self._turn is None or self._turn.cos is not cos or self._turn.sin is not sin:
            first, second = sin.chunk(2, dim=-1)
            self._turn = Turn(cos, sin, cos[:, None], torch.cat((-first, second), dim=-1)[:, None])
        turned = heads.roll(heads.shape[-1] // 2, -1).mul_(self._turn.signed_sin)
        return heads.mul_(self._turn.of_heads).add_(turned)

    def _gathered(self, q: Tensor, pages: LayerPages, scoring: Scoring) -> Tensor:
        """[T, Hq, D]; padded prefill rows are zero."""
        kind = scoring.numbers.window, scoring.numbers.segment
        if (reads := self._reads.get(kind)) is None:
            reads = self._reads[kind] = [*self._chunk_reads(scoring.numbers), *self._decode_reads(scoring.numbers)]
        if len(reads) == 1 and isinstance(rows := reads[0].rows, slice) and rows == slice(0, len(q)):
            return reads[0].attend(q, pages, scoring).contiguous()
        out = torch.zeros(q.shape, dtype=q.dtype)
        for read in reads:
            out[read.rows] = read.attend(q[read.rows], pages, scoring)
        return out

    def _chunk_reads(self, numbers: Numbers) -> Iterator[Read]:
        starts = self._chunk_starts
        for chunk, kv_len in enumerate(self._chunk_lens):
            rows = slice(starts[chunk], starts[chunk + 1])
            if not (num_rows := rows.stop - rows.start):
                continue
            first_seen = numbers.first_seen(kv_len - num_rows)
            pages, begin = self._pages(self._tables.chunk_pages[chunk], first_seen, kv_len)
            own, positions = torch.arange(kv_len - num_rows, kv_len), torch.arange(begin, kv_len)
            is_whole = kv_len - num_rows == begin and numbers.first_seen(kv_len - 1) <= begin
            yield ChunkRead(
                rows, pages, positions, own, None if is_whole else visible(own[:, None], positions, numbers)
            )

    def _decode_reads(self, numbers: Numbers) -> Iterator[Read]:
        split = len(self._tables.kv_locations) - len(self._decode_lens)
        for batch, num_pages in _rows_of_similar_length(self._decode_lens, self._page_size):
            if len(batch) == 1:
                yield self._row_read(batch[0], split + batch[0], numbers)
                continue
            index = torch.tensor(batch)
            own = self._tables.decode_kv_lens[index][:, None] - 1
            positions = torch.arange(num_pages * self._page_size)
            yield BatchRead(
                rows=_slice_of(batch, split) or index + split,
                pages=self._tables.decode_pages[index, :num_pages].flatten(),
                positions=positions,
                own=own,
                past_end=(positions > own).flatten().nonzero().flatten(),
                seen=visible(own, positions, numbers)[:, None, None],
            )

    def _row_read(self, number: int, row: int, numbers: Numbers) -> RowRead:
        kv_len = self._decode_lens[number]
        first_seen = numbers.first_seen(kv_len - 1)
        pages, begin = self._pages(self._tables.decode_pages[number], first_seen, kv_len)
        return RowRead(
            slice(row, row + 1), pages, slice(first_seen - begin, kv_len - begin), torch.arange(first_seen, kv_len)
        )

    def _pages(self, block_table: Tensor, first_seen: int, kv_len: int) -> tuple[Tensor, int]:
        """Those with the positions from `first_seen` on, and the first position in them."""
        first_page = first_seen // self._page_size
        return block_table[first_page : -(-kv_len // self._page_size)], first_page * self._page_size


def _mixed(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scoring: Scoring) -> Tensor:
    """[R, Hq, D] of one row a request. q: [R, Hq, D]; keys, values: [R, L, Hkv, D]."""
    grouped = q.unflatten(1, (keys.shape[2], -1))  # heads of a group read the same keys
    mixed = F.scaled_dot_product_attention(
        grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=seen, scale=scoring.numbers.scale
    )
    return mixed.flatten(1, 2)


def _taken(pages: LayerPages, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of pages, [N, page_size, Hkv, D] each; the same tensor where the pages are."""
    keys = take(pages.k, pages.k_scales, index, dtype)
    return keys, keys if pages.v is pages.k else take(pages.v, pages.v_scales, index, dtype)


def _slice_of(batch: Sequence[int], offset: int) -> slice | None:
    """The same rows, where they follow one another."""
    first, last = batch[0], batch[-1]
    return slice(offset + first, offset + last + 1) if last - first + 1 == len(batch) else None


def _rows_of_similar_length(kv_lens: Sequence[int], page_size: int) -> Iterator[tuple[list[int], int]]:
    """(row numbers, rising; pages of the longest), of rows whose page counts lie between the same powers of two."""
    classes: defaultdict[int, list[int]] = defaultdict(list)
    pages = [-(-kv_len // page_size) for kv_len in kv_lens]
    for row, num_pages in enumerate(pages):
        classes[num_pages.bit_length()].append(row)
    for rows in classes.values():
        longest = max(pages[row] for row in rows)
        most = max(1, _BATCH_POSITIONS // (longest * page_size))
        for first in range(0, len(rows), most):
            yield rows[first : first + most], longest
