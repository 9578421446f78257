"""The `torch` attention backend: paged attention in plain PyTorch, for any device, and what other backends
are held to.

Owns the operators `paged_attention_torch` and `latent_attention_torch` and the backend around them. Never allocates
KV pages. The decoder's layers call it through TorchStep, inside or outside a compiled graph.

On the CPU it reads the step's lengths and does only the live work. On a device with graphs it neither waits
for the device nor depends on the lengths for a shape, so a graph can capture it; then it computes every
padded position too.

The operators write into the pages but their schemas do not say so. A declared mutation hands the pages
to the compiler's functionalisation, which copies what is mutated wherever it cannot prove the original dead,
and here that is the KV cache. Leaving it out is safe because nothing else in a layer's graph reads or writes
the pages, and the result, which is used, keeps the call alive and in order.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphgen.models.attention.backend import Words
from graphgen.models.attention.pages import LayerPages, store, take
from graphgen.models.attention.tables import RowTables
from graphgen.models.attention.variant import AttentionVariant, Numbers, Scoring
from graphgen.models.rope import rotate

_SCHEMA = (
    "paged_attention_torch(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor k_pages, Tensor v_pages,"
    " Tensor? k_scales, Tensor? v_scales, Tensor kv_locations, Tensor chunk_starts, Tensor chunk_kv_lens,"
    " Tensor chunk_pages, Tensor decode_kv_lens, Tensor decode_pages, Tensor numbers, Tensor? sinks,"
    " Tensor? alibi_slopes, Tensor? temperatures) -> Tensor"
)
_LATENT_SCHEMA = (
    "latent_attention_torch(Tensor q, Tensor row, Tensor pages, Tensor kv_locations, Tensor chunk_starts,"
    " Tensor chunk_kv_lens, Tensor chunk_pages, Tensor decode_kv_lens, Tensor decode_pages, Tensor numbers,"
    " int value_size) -> Tensor"
)
_BATCH_POSITIONS = 2048
"""Positions whose K and V the CPU gathers at once: small enough for the cache and for memory the process has."""
_BLOCK_ROWS = 64
"""Rows whose scores the capturable path holds at once: bounds its memory, not its result."""


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    kv_locations: Tensor,
    chunk_starts: Tensor,
    chunk_kv_lens: Tensor,
    chunk_pages: Tensor,
    decode_kv_lens: Tensor,
    decode_pages: Tensor,
    numbers: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    temperatures: Tensor | None,
) -> Tensor:
    """See StepAttention.attend, LayerPages, RowTables and AttentionVariant."""
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if temperatures is not None:
        q = (q * temperatures[:, None, None]).to(q.dtype)
    pages = LayerPages(k_pages, v_pages, k_scales, v_scales)
    write_kv(pages, k, v, kv_locations)
    tables = RowTables(kv_locations, chunk_starts, chunk_kv_lens, chunk_pages, decode_kv_lens, decode_pages)
    scoring = Scoring(Numbers.unpacked(numbers), sinks, alibi_slopes)
    run = _live_rows if q.device.type == "cpu" else all_rows
    return run(q, pages, tables, scoring)


def latent_attention(
    q: Tensor,
    row: Tensor,
    pages: Tensor,
    kv_locations: Tensor,
    chunk_starts: Tensor,
    chunk_kv_lens: Tensor,
    chunk_pages: Tensor,
    decode_kv_lens: Tensor,
    decode_pages: Tensor,
    numbers: Tensor,
    value_size: int,
) -> Tensor:
    """See StepAttention.attend_latent and RowTables. It is attention whose values are its keys, of which the end is
    dropped: kernels for equal sizes serve it."""
    pages.flatten(0, 1).index_copy_(0, kv_locations, row[:, None].to(pages.dtype))
    tables = RowTables(kv_locations, chunk_starts, chunk_kv_lens, chunk_pages, decode_kv_lens, decode_pages)
    run = _live_rows if q.device.type == "cpu" else all_rows
    return run(q, LayerPages(pages, pages), tables, Scoring(Numbers.unpacked(numbers)))[..., :value_size].contiguous()


def write_kv(pages: LayerPages, k: Tensor, v: Tensor, kv_locations: Tensor) -> None:
    """Puts row t of k and v at position kv_locations[t] of the page pool."""
    store(pages.k, pages.k_scales, k, kv_locations)
    store(pages.v, pages.v_scales, v, kv_locations)


# --- the CPU: only what is live ---


def _live_rows(q: Tensor, pages: LayerPages, tables: RowTables, scoring: Scoring) -> Tensor:
    out = torch.zeros(q.shape, dtype=q.dtype)
    starts: list[int] = tables.chunk_starts.tolist()
    for chunk, kv_len in enumerate(tables.chunk_kv_lens.tolist()):
        first, last = starts[chunk], starts[chunk + 1]
        if first < last:
            _one_chunk(out[first:last], q[first:last], pages, tables.chunk_pages[chunk], kv_len, scoring)
    split = q.shape[0] - tables.decode_kv_lens.shape[0]
    _decode_rows(out[split:], q[split:], pages, tables.decode_kv_lens, tables.decode_pages, scoring)
    return out


def _one_chunk(out: Tensor, q: Tensor, pages: LayerPages, block_table: Tensor, kv_len: int, scoring: Scoring) -> None:
    """out, q: [rows, Hq, D], the last `rows` positions of the kv_len that the block table's pages hold."""
    num_rows, page_size = q.shape[0], pages.k.shape[1]
    first_page = scoring.numbers.first_seen(kv_len - num_rows) // page_size
    begin = first_page * page_size
    taken = _taken(pages, block_table[first_page : -(-kv_len // page_size)], q.dtype)
    keys, values = (part.flatten(0, 1)[: kv_len - begin] for part in taken)
    own, positions = torch.arange(kv_len - num_rows, kv_len), torch.arange(begin, kv_len)
    if not scoring.only_masks:
        for block in range(0, num_rows, _BLOCK_ROWS):
            part = slice(block, block + _BLOCK_ROWS)
            out[part] = _attend(q[None, part], keys[None], values[None], own[None, part], positions, scoring)[0]
        return
    whole = kv_len - num_rows == begin and scoring.numbers.first_seen(kv_len - 1) <= begin
    mixed = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=None if whole else _visible(own[:, None], positions, scoring.numbers),
        is_causal=whole,
        scale=scoring.numbers.scale,
        enable_gqa=True,
    )
    out.copy_(mixed[0].transpose(0, 1))


def _decode_rows(
    out: Tensor, q: Tensor, pages: LayerPages, kv_lens: Tensor, block_tables: Tensor, scoring: Scoring
) -> None:
    """out, q: [R, Hq, D]. Rows of similar length share a batch, at most half of which is padding."""
    page_size, num_kv_heads, head_dim = pages.k.shape[1:]
    for rows, num_pages in _rows_of_similar_length(kv_lens, page_size):
        index = torch.tensor(rows)
        lens = kv_lens[index][:, None]
        positions = torch.arange(num_pages * page_size)
        keys, values = _taken(pages, block_tables[index, :num_pages].flatten(), q.dtype)
        # Past a row's length lies whatever the page held before; a weight of zero does not silence a NaN.
        past_end = (positions >= lens).flatten().nonzero().flatten()
        keys.flatten(0, 1).index_fill_(0, past_end, 0)
        values.flatten(0, 1).index_fill_(0, past_end, 0)
        shape = (len(rows), -1, num_kv_heads, head_dim)
        keys, values = keys.view(shape), values.view(shape)
        if scoring.only_masks:
            grouped = q[index].view(len(rows), num_kv_heads, -1, head_dim)  # heads of a group read the same keys
            seen = _visible(lens - 1, positions, scoring.numbers)[:, None, None]
            mixed = F.scaled_dot_product_attention(
                grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=seen, scale=scoring.numbers.scale
            )
        else:
            mixed = _attend(q[index][:, None], keys, values, lens - 1, positions, scoring)
        out[index] = mixed.reshape(len(rows), -1, head_dim)


def _taken(pages: LayerPages, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of pages, [N, page_size, Hkv, D] each."""
    return take(pages.k, pages.k_scales, index, dtype), take(pages.v, pages.v_scales, index, dtype)


def _rows_of_similar_length(kv_lens: Tensor, page_size: int) -> Iterator[tuple[list[int], int]]:
    """(row numbers, pages of the longest), of rows whose page counts lie between the same powers of two."""
    classes: defaultdict[int, list[int]] = defaultdict(list)
    pages = [-(-kv_len // page_size) for kv_len in kv_lens.tolist()]
    for row, num_pages in enumerate(pages):
        classes[num_pages.bit_length()].append(row)
    for rows in classes.values():
        longest = max(pages[row] for row in rows)
        most = max(1, _BATCH_POSITIONS // (longest * page_size))
        for first in range(0, len(rows), most):
            yield rows[first : first + most], longest


# --- devices with graphs: static shapes, no wait ---


def all_rows(q: Tensor, pages: LayerPages, tables: RowTables, scoring: Scoring) -> Tensor:
    """Like `_live_rows` with shapes that follow from the arguments' shapes alone. Every chunk meets every
    row."""
    num_decode_rows = tables.decode_kv_lens.shape[0]
    num_prefill_rows = q.shape[0] - num_decode_rows
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    rows = torch.arange(num_prefill_rows, device=q.device)
    for chunk, kv_len in enumerate(tables.chunk_kv_lens):
        first, last = tables.chunk_starts[chunk], tables.chunk_starts[chunk + 1]
        member = ((rows >= first) & (rows < last))[:, None, None]
        own = kv_len - last + rows
        keys, values, positions = _gather(pages, tables.chunk_pages[chunk], kv_len)
        for block in range(0, num_prefill_rows, _BLOCK_ROWS):
            part = slice(block, min(block + _BLOCK_ROWS, num_prefill_rows))
            mixed = _attend(q[None, part], keys, values, own[None, part], positions, scoring)[0]
            out[part] = torch.where(member[part], mixed, out[part])
    for row, kv_len in enumerate(tables.decode_kv_lens, start=num_prefill_rows):
        block_table = tables.decode_pages[row - num_prefill_rows]
        keys, values, positions = _gather(pages, block_table, kv_len)
        here = slice(row, row + 1)
        out[here] = _attend(q[None, here], keys, values, kv_len.view(1, 1) - 1, positions, scoring)[0]
    return out


def _gather(pages: LayerPages, block_table: Tensor, kv_len: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All positions of a block table as [1, M * page_size, Hkv, D] float32, zero from kv_len on, and their numbers."""
    keys, values = (part.flatten(0, 1).float() for part in _taken(pages, block_table, torch.float32))
    positions = torch.arange(keys.shape[0], device=keys.device)
    past_end = (positions >= kv_len)[:, None, None]
    return keys.masked_fill(past_end, 0)[None], values.masked_fill(past_end, 0)[None], positions


# --- the formula ---


def _attend(q: Tensor, keys: Tensor, values: Tensor, own: Tensor, positions: Tensor, scoring: Scoring) -> Tensor:
    """q [B, rows, Hq, D] over keys, values [B, L, Hkv, D]; own [B, rows]: the position of each row; positions [L].
    Softmax in float32; a row that sees nothing is zero."""
    numbers = scoring.numbers
    grouped = q.float().unflatten(2, (keys.shape[2], -1))
    scores = torch.einsum("brhgd,blhd->bhgrl", grouped, keys.float()) * numbers.scale
    if numbers.softcap:
        scores = numbers.softcap * torch.tanh(scores / numbers.softcap)
    by_head = (1, keys.shape[2], -1, 1, 1)
    if scoring.alibi_slopes is not None:
        scores = scores + scoring.alibi_slopes.view(by_head) * (positions - own[..., None])[:, None, None]
    seen = _visible(own[..., None], positions, numbers)[:, None, None]
    scores = scores.masked_fill(~seen, float("-inf"))
    if scoring.sinks is not None:
        scores = torch.cat((scores, scoring.sinks.view(by_head).expand(*scores.shape[:-1], 1)), dim=-1)
    weights = scores.softmax(dim=-1).nan_to_num(0.0)[..., : len(positions)]
    return torch.einsum("bhgrl,blhd->brhgd", weights, values.float()).flatten(2, 3).to(q.dtype)


def _visible(own: Tensor, positions: Tensor, numbers: Numbers) -> Tensor:
    """Which positions a row at position `own` sees; the shapes broadcast."""
    seen = positions <= own
    if numbers.window:
        seen = seen & (positions > own - numbers.window)
    if numbers.segment:
        seen = seen & (positions >= own // numbers.segment * numbers.segment)
    return seen


# --- the operator ---


def _result_like(q: Tensor, *_arguments: object) -> Tensor:
    """What tracing knows of the result: a fresh contiguous tensor of q's shape."""
    return q.new_empty(q.shape)


def _first_values(q: Tensor, *arguments: Any) -> Tensor:
    """The same of latent attention; its last argument is their number."""
    return q.new_empty((*q.shape[:2], arguments[-1]))


# A Library ends with its last reference. define + impl cost a third of torch.library.custom_op at every call.
_library = torch.library.Library("graphgen", "FRAGMENT")
_library.define(_SCHEMA)
_library.define(_LATENT_SCHEMA)
for _device in ("CPU", "CUDA"):
    _library.impl("paged_attention_torch", paged_attention, _device)
    _library.impl("latent_attention_torch", latent_attention, _device)
torch.library.register_fake("graphgen::paged_attention_torch", _result_like, lib=_library)
torch.library.register_fake("graphgen::latent_attention_torch", _first_values, lib=_library)
_operator = torch.ops.graphgen.paged_attention_torch.default
_latent_operator = torch.ops.graphgen.latent_attention_torch.default


# --- the backend ---


class TorchStep(NamedTuple):
    """Nothing is planned, so the row tables are all that the operator needs."""

    tables: RowTables

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
        result: Tensor = _operator(q, k, v, cos, sin, *pages, *self.tables, *variant, temperatures)
        return result

    def attend_latent(
        self, q: Tensor, row: Tensor, pages: Tensor, value_size: int, variant: AttentionVariant
    ) -> Tensor:
        """See StepAttention."""
        result: Tensor = _latent_operator(q, row, pages, *self.tables, variant.numbers, value_size)
        return result


class TorchAttention:
    """The reference kernels: any device, nothing to plan."""

    name = "torch"
    late_import: str | None = None
    most_chunk_pages: int | None = None
    runs_fused_layers = False

    def __init__(self, reason: str) -> None:
        """reason: why it was chosen, for people."""
        self.description = f"torch ({reason})"

    def load_kernels(self) -> None:
        """They are part of torch."""

    def plan(self, num_prefill_rows: int, chunk_starts: Words, chunk_kv_lens: Words, decode_kv_lens: Words) -> None:
        """The row tables say all that is needed."""

    def prepare(self, tables: RowTables) -> TorchStep:
        return TorchStep(tables)
