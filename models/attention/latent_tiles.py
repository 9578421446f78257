"""Latent attention on CUDA: the rows of both regions in tiles, see row_tiles.py. Nothing is planned.

Owns the operator `latent_attention_tiles` and the backend around it. FlashInfer has no part in it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphgen.ipc.errors import ConfigError, UnsupportedModelError
from graphgen.models.attention.backend import Words
from graphgen.models.attention.beside import run_beside
from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.row_tiles import Rows, TileShape, TileTensors, attend_in_tiles, open_workspace
from graphgen.models.attention.tables import RowTables
from graphgen.models.attention.variant import AttentionVariant, Numbers, Scoring

PAGE_SIZES = (16, 32, 64, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16)
_REMEDY = "use attention='torch'"


def check_supported(shape: TileShape, page_size: int, dtype: torch.dtype) -> None:
    """Raises ConfigError or UnsupportedModelError for what the kernel cannot run."""
    if dtype not in _DTYPES:
        raise ConfigError(f"the kernel of latent attention is for bfloat16 and float16, dtype is {dtype}: {_REMEDY}")
    if page_size not in PAGE_SIZES:
        raise ConfigError(f"page_size is {page_size}, the kernel of latent attention has {PAGE_SIZES}: choose one")
    sizes = shape.value_dim, shape.rest_dim
    if any(size < 16 or size & (size - 1) for size in sizes):
        raise UnsupportedModelError(
            f"latents have {sizes[0]} elements and {sizes[1]} that turn, the kernel of latent attention needs powers of"
            f" two from 16: {_REMEDY}"
        )


class LatentTiles:
    """The kernel of both regions and a workspace for each."""

    name = "flashinfer"  # the choice that it is part of
    description = "row tiles of latent attention (graphgen's own, in Triton)"
    late_import: str | None = None
    most_chunk_pages: int | None = None
    runs_fused_layers = True

    def __init__(
        self,
        shape: TileShape,
        page_size: int,
        dtype: torch.dtype,
        most_chunks: int,
        most_prefill_rows: int,
        most_decode_rows: int,
        device: torch.device,
    ) -> None:
        check_supported(shape, page_size, dtype)
        self._chunks = open_workspace(shape, most_prefill_rows, most_chunks, False, device)
        self._decodes = open_workspace(shape, most_decode_rows, most_decode_rows, True, device)

    def load_kernels(self) -> None:
        """Triton compiles them at their first launch, and keeps them."""

    def plan(self, num_prefill_rows: int, chunk_starts: Words, chunk_kv_lens: Words, decode_kv_lens: Words) -> None:
        """The row tables say all that is needed."""

    def prepare(self, tables: RowTables) -> "LatentStep":
        """See AttentionBackend."""
        return LatentStep(tables, self._chunks, self._decodes)


class LatentStep(NamedTuple):
    """The rows of a step, and where the parts of each region wait."""

    tables: RowTables
    chunks: TileTensors
    decodes: TileTensors

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
        """See StepAttention. Never called: ModelSpec.latent is of every layer."""
        raise NotImplementedError("the operator is for latent attention alone: use attention='torch'")

    def attend_latent(
        self, q: Tensor, row: Tensor, pages: Tensor, value_size: int, variant: AttentionVariant
    ) -> Tensor:
        """See StepAttention."""
        workspaces = [*self.chunks, *self.decodes]
        result: Tensor = _operator(q, row, pages, *self.tables, workspaces, variant.numbers, value_size)
        return result


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
    workspaces: list[Tensor],
    numbers: Tensor,
    value_size: int,
) -> Tensor:
    """See StepAttention.attend_latent and RowTables."""
    pages.flatten(0, 1).index_copy_(0, kv_locations, row[:, None])
    num_rows, num_heads, key_size = q.shape
    shape = TileShape(num_heads, 1, value_size, key_size - value_size)
    scoring = Scoring(Numbers.unpacked(numbers))
    out = q.new_empty(num_rows, num_heads, value_size)
    split = num_rows - decode_kv_lens.shape[0]
    of_both = LayerPages(pages, pages)
    of_chunks, of_decodes = TileTensors(*workspaces[:2]), TileTensors(*workspaces[2:])

    def chunks() -> None:
        rows = Rows(chunk_starts, chunk_kv_lens, chunk_pages)
        attend_in_tiles(q[:split], out[:split], of_both, rows, shape, of_chunks, scoring)

    def decodes() -> None:
        rows = Rows(None, decode_kv_lens, decode_pages)
        attend_in_tiles(q[split:], out[split:], of_both, rows, shape, of_decodes, scoring)

    if not split:
        decodes()
    elif split == num_rows:
        chunks()
    else:
        run_beside(chunks, decodes)
    return out


def _first_values(q: Tensor, *arguments: Any) -> Tensor:
    """What tracing knows of the result; the last argument is the size of a value."""
    return q.new_empty((*q.shape[:2], arguments[-1]))


# The write to the pages is deliberately not in the schema, see reference.py.
_library = torch.library.Library("graphgen", "FRAGMENT")
_library.define(
    "latent_attention_tiles(Tensor q, Tensor row, Tensor pages, Tensor kv_locations, Tensor chunk_starts,"
    " Tensor chunk_kv_lens, Tensor chunk_pages, Tensor decode_kv_lens, Tensor decode_pages, Tensor[] workspaces,"
    " Tensor numbers, int value_size) -> Tensor"
)
_library.impl("latent_attention_tiles", latent_attention, "CUDA")
torch.library.register_fake("graphgen::latent_attention_tiles", _first_values, lib=_library)
_operator = torch.ops.graphgen.latent_attention_tiles.default
