"""The `torch` attention backend: paged attention in plain PyTorch, for any device, and what other backends
are held to.

Owns the operators `paged_attention_torch` and `latent_attention_torch` and the backend around them. Never allocates
KV pages. The decoder's layers call it through TorchStep, inside or outside a compiled graph.

On the CPU it does what live.py does, and reads the step's lengths in every layer, since a compiled graph hands on
tensors alone. On a device with graphs it neither waits for the device nor depends on the lengths for a shape, so a
graph can capture it; then it computes every padded position too.

The operators write into the pages but their schemas do not say so. A declared mutation hands the pages
to the compiler's functionalisation, which copies what is mutated wherever it cannot prove the original dead,
and here that is the KV cache. Leaving it out is safe because nothing else in a layer's graph reads or writes
the pages, and the result, which is used, keeps the call alive and in order.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphgen.models.attention.backend import Words
from graphgen.models.attention.formula import attend_rows
from graphgen.models.attention.live import LiveStep
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
    pages = LayerPages(k_pages, v_pages, k_scales, v_scales)
    tables = RowTables(kv_locations, chunk_starts, chunk_kv_lens, chunk_pages, decode_kv_lens, decode_pages)
    if q.device.type == "cpu":
        variant = AttentionVariant(numbers, sinks, alibi_slopes)
        return LiveStep(tables, k_pages.shape[1]).attend(q, k, v, cos, sin, pages, variant, temperatures)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if temperatures is not None:
        q = (q * temperatures[:, None, None]).to(q.dtype)
    write_kv(pages, k, v, kv_locations)
    return all_rows(q, pages, tables, Scoring(Numbers.unpacked(numbers), sinks, alibi_slopes))


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
    """See StepAttention.attend_latent and RowTables."""
    tables = RowTables(kv_locations, chunk_starts, chunk_kv_lens, chunk_pages, decode_kv_lens, decode_pages)
    if q.device.type == "cpu":
        return LiveStep(tables, pages.shape[1]).attend_latent(q, row, pages, value_size, AttentionVariant(numbers))
    return latent_of_all_rows(q, row, pages, tables, numbers, value_size)


def latent_of_all_rows(
    q: Tensor, row: Tensor, pages: Tensor, tables: RowTables, numbers: Tensor, value_size: int
) -> Tensor:
    """The same with shapes that follow from the arguments' shapes alone. It is attention whose values are its keys, of
    which the end is dropped."""
    store(pages, None, row[:, None], tables.kv_locations)
    gathered = all_rows(q, LayerPages(pages, pages), tables, Scoring(Numbers.unpacked(numbers)))
    return gathered[..., :value_size].contiguous()


def write_kv(pages: LayerPages, k: Tensor, v: Tensor, kv_locations: Tensor) -> None:
    """Puts row t of k and v at position kv_locations[t] of the page pool."""
    store(pages.k, pages.k_scales, k, kv_locations)
    store(pages.v, pages.v_scales, v, kv_locations)


# --- devices with graphs: static shapes, no wait ---


def all_rows(q: Tensor, pages: LayerPages, tables: RowTables, scoring: Scoring) -> Tensor:
    """Attention of q, whose keys and values are in the pages, with shapes that follow from the arguments' shapes alone.
    Every chunk meets every row."""
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
            mixed = attend_rows(q[None, part], keys, values, own[None, part], positions, scoring)[0]
            out[part] = torch.where(member[part], mixed, out[part])
    for row, kv_len in enumerate(tables.decode_kv_lens, start=num_prefill_rows):
        block_table = tables.decode_pages[row - num_prefill_rows]
        keys, values, positions = _gather(pages, block_table, kv_len)
        here = slice(row, row + 1)
        out[here] = attend_rows(q[None, here], keys, values, kv_len.view(1, 1) - 1, positions, scoring)[0]
    return out


def _gather(pages: LayerPages, block_table: Tensor, kv_len: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All positions of a block table as [1, M * page_size, Hkv, D] float32, zero from kv_len on, and their numbers."""
    taken = (
        take(pages.k, pages.k_scales, block_table, torch.float32),
        take(pages.v, pages.v_scales, block_table, torch.float32),
    )
    keys, values = (part.flatten(0, 1).float() for part in taken)
    positions = torch.arange(keys.shape[0], device=keys.device)
    past_end = (positions >= kv_len)[:, None, None]
    return keys.masked_fill(past_end, 0)[None], values.masked_fill(past_end, 0)[None], positions


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

    def __init__(self, reason: str, live_page_size: int | None = None) -> None:
        """reason: why it was chosen, for people. live_page_size: of the pages, where layers call live.py themselves: on
        the CPU, where nothing is compiled. It is faster there; what a compiled graph calls must be an operator."""
        self.description = f"torch ({reason})"
        self._live_page_size = live_page_size

    def load_kernels(self) -> None:
        """They are part of torch."""

    def plan(self, num_prefill_rows: int, chunk_starts: Words, chunk_kv_lens: Words, decode_kv_lens: Words) -> None:
        """The row tables say all that is needed."""

    def prepare(self, tables: RowTables) -> TorchStep | LiveStep:
        return TorchStep(tables) if self._live_page_size is None else LiveStep(tables, self._live_page_size)
