"""Paged attention on CUDA, FlashInfer's kernels and ours: one kernel for the prefill region, one for the decode region.

    SM90    prefill FA3, decode split-KV (ours: no plan, block tables and lengths are read on the device)
    SM80+   prefill FA2, decode split-KV
    scores that FlashInfer has no library for (segments, a soft cap with sinks, layers that differ): prefill row tiles
    for comparison: decode XQA on SM90, decode FA2 planned with one row per request

A planned kernel (FA2, FA3) gets its work list from the host: `plan` computes it in pinned memory and queues its copy.
The launch constants that come back depend on the shape alone, never on the lengths, so a captured graph keeps them;
`plan` verifies that at every step.

`prepare` makes the FlashInferStep of a step inside the step's graph. Its CPU tensors hold choices and launch constants,
read when the operator runs, which is at capture.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from graphgen.ipc.errors import ConfigError
from graphgen.models.attention.backend import Words
from graphgen.models.attention.beside import run_beside
from graphgen.models.attention.kernels import (
    AttentionShape,
    Kernel,
    Scores,
    arch_of,
    best_kernels,
    check_supported,
    needed_libraries,
)
from graphgen.models.attention.libraries import (
    KernelFolder,
    describe_sources,
    load_libraries,
    package_to_load,
)
from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.plain_pages import fill_plain_pages
from graphgen.models.attention.planned import PlannedRegion, PlannedTensors, run_planned
from graphgen.models.attention.row_tiles import Rows, TileShape, TileTensors, attend_in_tiles
from graphgen.models.attention.row_tiles import open_workspace as open_tiles
from graphgen.models.attention.split_kv import (
    FreshRows,
    HeadNorms,
    SplitKvTensors,
    open_workspace,
    share_out,
    split_kv_attention,
)
from graphgen.models.attention.store import rotate_and_store
from graphgen.models.attention.tables import RowTables
from graphgen.models.attention.variant import AttentionVariant, Numbers, Scoring
from graphgen.models.chaining import can_chain

_XQA_SEMAPHORE_BYTES = 8 << 20
_XQA_SCRATCH_BYTES = 128 << 20
_DECODE_PAGE_SIZES = {Kernel.XQA: (16, 32, 64, 128), Kernel.SPLIT_KV: (16, 32, 64, 128, 256)}


class FlashInferAttention:
    """The kernels of both regions, their workspaces, and the plans of the steps in flight."""

    name = "flashinfer"
    runs_fused_layers = True

    def __init__(
        self,
        shape: AttentionShape,
        most_chunks: int,
        most_prefill_rows: int,
        most_decode_rows: int,
        kernels: tuple[Kernel, Kernel] | None = None,
        most_quantised_pages: int = 0,
    ) -> None:
        """kernels: of the prefill and the decode region; None takes the device's best pair. most_quantised_pages: of
        all chunks of a step together, where pages are quantised; 0: they are not."""
        check_supported(shape)
        device = torch.device("cuda", torch.cuda.current_device())
        capability = torch.cuda.get_device_capability(device)
        prefill, decode = kernels or best_kernels(capability, shape.scores)
        if decode in _DECODE_PAGE_SIZES and shape.page_size not in _DECODE_PAGE_SIZES[decode]:
            sizes = _DECODE_PAGE_SIZES[decode]
            raise ConfigError(f"page_size is {shape.page_size}, the decode kernel has {sizes}: choose one")
        self._prefill = _prefill_region(prefill, shape, most_chunks, most_prefill_rows, most_quantised_pages, device)
        self._decode = _decode_region(decode, shape, most_decode_rows, device)
        self._num_kv_heads, self._page_size = shape.num_kv_heads, shape.page_size
        self._kernels = torch.tensor([prefill, decode], dtype=torch.int64)
        self._libraries = needed_libraries(shape, (prefill, decode))
        self._folder = KernelFolder.of(arch_of(capability))
        is_bounded = most_quantised_pages > 0 and isinstance(self._prefill, PlannedRegion)
        self.most_chunk_pages = most_quantised_pages if is_bounded else None
        self.late_import: str | None = package_to_load(self._libraries, self._folder)
        self.description = f"flashinfer (prefill {prefill.name}, decode {decode.name})"

    def load_kernels(self) -> None:
        """Loads, or builds where no build is found, every kernel the layers will use, and says where they were."""
        sources = load_libraries(self._libraries, self._folder)
        prefill, decode = self._prefill.kernel, self._decode.kernel
        self.description = f"flashinfer (prefill {prefill.name}, decode {decode.name}, {describe_sources(sources)})"

    def prepare(self, tables: RowTables) -> "FlashInferStep":
        """See AttentionBackend."""
        num_decode_rows = tables.decode_kv_lens.shape[0]
        num_prefill_rows = tables.kv_locations.shape[0] - num_decode_rows
        prefill = self._prepare_prefill(tables, num_prefill_rows)
        if isinstance(self._decode, PlannedRegion):
            starts = torch.arange(num_decode_rows + 1, dtype=torch.int32, device=tables.decode_kv_lens.device)
            decode = self._decode.prepare(num_decode_rows, starts, tables.decode_kv_lens, tables.decode_pages)
            return FlashInferStep(tables, self._kernels, prefill, decode)
        if isinstance(self._decode.workspace, SplitKvTensors):
            share_out(tables.decode_kv_lens, self._num_kv_heads, self._page_size, self._decode.workspace)
        return FlashInferStep(tables, self._kernels, prefill, self._decode.workspace)

    def _prepare_prefill(self, tables: RowTables, num_rows: int) -> "PrefillTensors":
        if not isinstance(self._prefill, PlannedRegion):
            return self._prefill.workspace
        if not num_rows:
            return self._prefill.absent()
        return self._prefill.prepare(num_rows, tables.chunk_starts, tables.chunk_kv_lens, tables.chunk_pages)

    def plan(self, num_prefill_rows: int, chunk_starts: Words, chunk_kv_lens: Words, decode_kv_lens: Words) -> None:
        """See AttentionBackend."""
        if num_prefill_rows and isinstance(self._prefill, PlannedRegion):
            self._prefill.plan(num_prefill_rows, chunk_starts, chunk_kv_lens)
        if isinstance(self._decode, PlannedRegion):
            num_rows = len(decode_kv_lens)
            self._decode.plan(num_rows, np.arange(num_rows + 1, dtype=np.int32), decode_kv_lens)


class XqaTensors(NamedTuple):
    """What XQA's programs tell each other."""

    semaphores: Tensor
    """Zero before the first use; the kernel leaves them so."""
    scratch: Tensor


DecodeTensors = PlannedTensors | XqaTensors | SplitKvTensors

_DECODE_TENSORS: dict[Kernel, type[DecodeTensors]] = {
    Kernel.FA2: PlannedTensors,
    Kernel.FA3: PlannedTensors,
    Kernel.XQA: XqaTensors,
    Kernel.SPLIT_KV: SplitKvTensors,
}


PrefillTensors = PlannedTensors | TileTensors

_PREFILL_TENSORS: dict[Kernel, type[PrefillTensors]] = {
    Kernel.FA2: PlannedTensors,
    Kernel.FA3: PlannedTensors,
    Kernel.TILES: TileTensors,
}


class UnplannedRegion(NamedTuple):
    """One row per request, block tables and lengths read on the device."""

    kernel: Kernel
    workspace: XqaTensors | SplitKvTensors


class UnplannedChunks(NamedTuple):
    """The same of chunks."""

    kernel: Kernel
    workspace: TileTensors


def _prefill_region(
    kernel: Kernel, shape: AttentionShape, most_chunks: int, most_rows: int, num_plain_pages: int, device: torch.device
) -> PlannedRegion | UnplannedChunks:
    if kernel is not Kernel.TILES:
        return PlannedRegion(kernel, shape, most_chunks, most_rows, num_plain_pages)
    tile = TileShape(shape.num_heads, shape.num_kv_heads, shape.head_dim, 0)
    return UnplannedChunks(kernel, open_tiles(tile, most_rows, most_chunks, False, device))


def _decode_region(
    kernel: Kernel, shape: AttentionShape, most_rows: int, device: torch.device
) -> PlannedRegion | UnplannedRegion:
    if kernel is Kernel.SPLIT_KV:
        sizes = shape.num_heads, shape.num_kv_heads, shape.head_dim
        return UnplannedRegion(kernel, open_workspace(most_rows, *sizes, device))
    if kernel is Kernel.XQA:
        semaphores = torch.zeros(_XQA_SEMAPHORE_BYTES, dtype=torch.uint8, device=device)
        scratch = torch.empty(_XQA_SCRATCH_BYTES, dtype=torch.uint8, device=device)
        return UnplannedRegion(kernel, XqaTensors(semaphores, scratch))
    return PlannedRegion(kernel, shape, most_rows, most_rows)


# --- the operator ----------------------------------------------------------------------------------------------


class FlashInferStep(NamedTuple):
    """The kernels of both regions and what they read."""

    tables: RowTables
    kernels: Tensor
    """[2] int64 on the host: the Kernel of the prefill and of the decode region."""
    prefill: PrefillTensors
    decode: DecodeTensors

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
        head_norms: HeadNorms | None = None,
    ) -> Tensor:
        """See StepAttention. head_norms: of q and k; only where `norms_heads`."""
        planned = self.kernels, [*self.prefill], [*self.decode]
        norms = head_norms or (None, None, 0.0)
        result: Tensor = _operator(q, k, v, cos, sin, *pages, *self.tables, *planned, *variant, temperatures, *norms)
        return result

    @property
    def norms_heads(self) -> bool:
        """Whether the kernel that runs norms them itself: the split-KV one, in a step of decode rows alone. Not for use
        in a compiled layer: it reads the choice of the kernel."""
        only_decodes = len(self.tables.kv_locations) == len(self.tables.decode_kv_lens)
        return only_decodes and isinstance(self.decode, SplitKvTensors)

    def attend_latent(
        self, q: Tensor, row: Tensor, pages: Tensor, value_size: int, variant: AttentionVariant
    ) -> Tensor:
        """See StepAttention. Never called: latent_tiles.py serves such a model."""
        raise NotImplementedError("FlashInfer's operator has no latent attention: use attention='torch'")


def _paged_attention(
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
    kernels: Tensor,
    prefill: list[Tensor],
    decode: list[Tensor],
    numbers: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    temperatures: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
) -> Tensor:
    prefill_kernel, decode_kernel = (Kernel(number) for number in kernels.tolist())
    scoring = Scoring(Numbers.unpacked(numbers), sinks, alibi_slopes)
    pages = LayerPages(k_pages, v_pages, k_scales, v_scales)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    split = q.shape[0] - decode_kv_lens.shape[0]
    chunks = ChunkRows(
        Rows(chunk_starts, chunk_kv_lens, chunk_pages), prefill_kernel, _PREFILL_TENSORS[prefill_kernel](*prefill)
    )
    decodes = DecodeRows(decode_kv_lens, decode_pages, decode_kernel, _DECODE_TENSORS[decode_kernel](*decode))
    if not split and decode_kernel is Kernel.SPLIT_KV:
        norms = None if q_norm is None or k_norm is None else HeadNorms(q_norm, k_norm, norm_eps)
        _run_decode(q, out, pages, decodes, scoring, FreshRows(k, v, cos, sin, temperatures, norms))
        return out
    if q_norm is not None or k_norm is not None:
        raise ValueError("this step's kernels norm no heads, see FlashInferStep.norms_heads: norm them first")
    q = rotate_and_store(q, k, v, cos, sin, pages, kv_locations, out, temperatures, can_chain())
    if not split:
        _run_decode(q, out, pages, decodes, scoring)
        return out

    def prefill_rows() -> None:
        _run_prefill(q[:split], out[:split], pages, chunks, scoring)

    def decode_rows() -> None:
        if split < q.shape[0]:
            _run_decode(q[split:], out[split:], pages, decodes, scoring)

    run_beside(prefill_rows, decode_rows)
    return out


class ChunkRows(NamedTuple):
    """The prefill region of a step, and what runs it."""

    rows: Rows
    kernel: Kernel
    tensors: PrefillTensors


def _run_prefill(q: Tensor, out: Tensor, pages: LayerPages, chunks: ChunkRows, scoring: Scoring) -> None:
    match chunks.tensors:
        case TileTensors() as workspace:
            shape = TileShape(q.shape[1], pages.k.shape[2], q.shape[2], 0)
            attend_in_tiles(q, out, pages, chunks.rows, shape, workspace, scoring)
        case PlannedTensors() as planned:
            k_pages, v_pages = pages.k, pages.v
            if pages.k_scales is not None:
                tables = planned.page_starts, planned.flat_pages
                fill_plain_pages(planned.plain_pages, pages, chunks.rows, *tables, scoring.numbers.window)
                k_pages, v_pages = planned.plain_pages
            run_planned(chunks.kernel, q, out, k_pages, v_pages, planned, scoring)


class DecodeRows(NamedTuple):
    """The decode region of a step, see RowTables, and what runs it."""

    kv_lens: Tensor
    pages: Tensor
    kernel: Kernel
    tensors: DecodeTensors


def _run_decode(
    q: Tensor,
    out: Tensor,
    pages: LayerPages,
    rows: DecodeRows,
    scoring: Scoring,
    fresh: FreshRows | None = None,
) -> None:
    """fresh: see split_kv_attention; the other kernels find keys and values in their pages."""
    match rows.tensors:
        case SplitKvTensors() as workspace:
            split_kv_attention(q, out, pages, rows.pages, rows.kv_lens, workspace, scoring, fresh, chained=can_chain())
        case XqaTensors() as workspace:
            _run_xqa(q, out, _plain(pages, rows.kernel), rows, workspace, scoring)
        case PlannedTensors() as planned:
            run_planned(rows.kernel, q, out, *_plain(pages, rows.kernel), planned, scoring)


def _plain(pages: LayerPages, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Of a kernel that is here for comparison."""
    if pages.k_scales is not None:
        raise ConfigError(f"{kernel.name} reads no quantised pages for decode rows: use SPLIT_KV")
    return pages.k, pages.v


def _run_xqa(
    q: Tensor, out: Tensor, kv: tuple[Tensor, Tensor], rows: DecodeRows, workspace: XqaTensors, scoring: Scoring
) -> None:
    from flashinfer.xqa import xqa

    if Scores.of(scoring) is not Scores.PLAIN:
        raise ConfigError(f"XQA, which is here for comparison, has no {Scores.of(scoring)}: use SPLIT_KV")
    xqa(
        q.unsqueeze(1),
        *kv,
        rows.pages,
        rows.kv_lens.view(torch.uint32).unsqueeze(1),
        out.unsqueeze(1),
        workspace.scratch,
        workspace.semaphores,
        kv[0].shape[2],
        kv[0].shape[1],
        q_scale=scoring.numbers.scale * q.shape[2] ** 0.5,  # the kernel divides by the square root of the head size
        sliding_win_size=scoring.numbers.window,
        enable_pdl=True,
    )


def _result_like(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


# The KV write is deliberately not in the schema: a declared mutation makes torch.compile copy the cache.
_library = torch.library.Library("graphgen", "FRAGMENT")
_library.define(
    "paged_attention_flashinfer(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor k_pages, "
    "Tensor v_pages, Tensor? k_scales, Tensor? v_scales, Tensor kv_locations, "
    "Tensor chunk_starts, Tensor chunk_kv_lens, Tensor chunk_pages, "
    "Tensor decode_kv_lens, Tensor decode_pages, Tensor kernels, Tensor[] prefill, Tensor[] decode, "
    "Tensor numbers, Tensor? sinks, Tensor? alibi_slopes, Tensor? temperatures, "
    "Tensor? q_norm, Tensor? k_norm, float norm_eps) -> Tensor"
)
_library.impl("paged_attention_flashinfer", _paged_attention, "CUDA")
torch.library.register_fake("graphgen::paged_attention_flashinfer", _result_like, lib=_library)
_operator = torch.ops.graphgen.paged_attention_flashinfer.default
