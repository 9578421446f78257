"""What an attention backend is: one object that plans the steps, and of each step one that the layers call.

    AttentionBackend   loads its kernels once, plans each step on the host, and makes a StepAttention of its row tables
    StepAttention      the tensors that the plan and the operator share, by name, and the call of the operator

An operator of torch.library takes tensors, lists of tensors and numbers only. The `attend` of a StepAttention is the
one place that spells the named tensors out for it; it is traced into a layer's graph, like the layer itself.

Never imports a kernel. live.py, reference.py, flashinfer.py and latent_tiles.py implement it,
graphgen/worker/backend.py chooses between them.
"""

from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.tables import RowTables
from graphgen.models.attention.variant import AttentionVariant

Words = np.ndarray[tuple[int], np.dtype[np.int32]]


class StepAttention(Protocol):
    """Attention of one step, the same for all layers: a NamedTuple of tensors, so that it can be traced."""

    @property
    def tables(self) -> RowTables: ...

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
        """Attention of every row over its own positions, [T, Hq, D]; padded prefill rows are zero.

        q: [T, Hq, D]. k, v: [T, Hkv, D]. cos, sin: [T, D], by which q and k are rotated first; k and v are then
        stored in the pages, from which every row reads them, its own too. pages, variant: the layer's. temperatures:
        [T] float32, by which the rotated q is multiplied. Softmax in float32.
        """
        ...

    def attend_latent(
        self, q: Tensor, row: Tensor, pages: Tensor, value_size: int, variant: AttentionVariant
    ) -> Tensor:
        """Attention of every row over its own positions, whose one key is what they keep, and whose value its
        beginning: [T, Hq, value_size]; padded prefill rows are zero.

        q: [T, Hq, D], rotated. row: [T, D], rotated, which is written to the pages first. pages: [pages, page_size, 1,
        D]. variant: the layer's, whose numbers alone count.
        """
        ...


class AttentionBackend(Protocol):
    """The kernels of both regions of a step's rows."""

    name: str  # as EngineConfig.attention names it
    description: str  # for people
    late_import: str | None  # the package that `load_kernels` imports first, which takes a while
    most_chunk_pages: int | None  # that the chunks of a step may see together; None: any
    runs_fused_layers: bool  # False: the plain layers alone, as a reference for others

    def load_kernels(self) -> None: ...

    def plan(self, num_prefill_rows: int, chunk_starts: Words, chunk_kv_lens: Words, decode_kv_lens: Words) -> None:
        """Host part of a step, before its launch, on the launching stream.

        chunk_starts: [C + 1]; chunk_kv_lens: [C]; decode_kv_lens: [R], padded rows see 1 position.
        """
        ...

    def prepare(self, tables: RowTables) -> StepAttention:
        """Device part of a step, captured with it. `plan` must have run before."""
        ...


class StepTensors(NamedTuple):
    """What all layers of a step read beside their own weights and pages."""

    cos: Tensor
    """[T, D]: the rotation of each row's position."""
    sin: Tensor
    """[T, D]"""
    attention: StepAttention
    temperatures: Tensor | None = None
    """[T] float32: of the queries of a rope that has them."""
