"""Paged attention on CUDA, FlashInfer's kernels and ours: one kernel for the prefill region, one for the decode region.

    SM90    prefill FA3, decode split-KV (ours: no plan, block tables and lengths are read on the device)
    SM80+   prefill FA2, decode split-KV
    for comparison: decode XQA on SM90, decode FA2 planned with one row per request

A planned kernel (FA2, FA3) gets its work list from the host: `plan` computes it in pinned memory and queues its copy.
The launch constants that come back depend on the shape alone, never on the lengths, so a captured graph keeps them;
`plan` verifies that at every step.

The op takes tensors only. What a kernel needs besides the row tables travels in `extra`, made by `prepare` inside the
captured step; the CPU tensors in it hold choices and launch constants, read when the op runs, which is at capture.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from graphgen.ipc.errors import ConfigError
from graphgen.models.attention.kernels import (
    AttentionShape,
    Kernel,
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
from graphgen.models.attention.planned import PlannedRegion, Words, run_planned
from graphgen.models.attention.split_kv import FreshRows, SplitKvWorkspace, split_kv_attention
from graphgen.models.attention.store import rotate_and_store
from graphgen.models.attention.tables import RowTables
from graphgen.models.chaining import can_chain

_XQA_SEMAPHORE_BYTES = 8 << 20
_XQA_SCRATCH_BYTES = 128 << 20
_DECODE_PAGE_SIZES = {Kernel.XQA: (16, 32, 64, 128), Kernel.SPLIT_KV: (16, 32, 64, 128, 256)}


class FlashInferAttention:
    """The kernels of both regions, their workspaces, and the plans of the steps in flight."""

    name = "flashinfer"

    def __init__(
        self,
        shape: AttentionShape,
        most_chunks: int,
        most_prefill_rows: int,
        most_decode_rows: int,
        kernels: tuple[Kernel, Kernel] | None = None,
    ) -> None:
        """kernels: of the prefill and the decode region; None takes the device's best pair."""
        check_supported(shape)
        device = torch.device("cuda", torch.cuda.current_device())
        capability = torch.cuda.get_device_capability(device)
        prefill, decode = kernels or best_kernels(capability)
        if decode in _DECODE_PAGE_SIZES and shape.page_size not in _DECODE_PAGE_SIZES[decode]:
            sizes = _DECODE_PAGE_SIZES[decode]
            raise ConfigError(f"page_size is {shape.page_size}, the decode kernel has {sizes}: choose one")
        self._prefill = PlannedRegion(prefill, shape, most_chunks, most_prefill_rows)
        self._decode = _decode_region(decode, shape, most_decode_rows, device)
        self._windows = shape.windows
        self._libraries = needed_libraries(shape, (prefill, decode))
        self._folder = KernelFolder.of(arch_of(capability))
        self.late_import: str | None = package_to_load(self._libraries, self._folder)
        self.description = f"flashinfer (prefill {prefill.name}, decode {decode.name})"

    def load_kernels(self) -> None:
        """Loads, or builds where no build is found, every kernel the layers will use, and says where they were."""
        sources = load_libraries(self._libraries, self._folder)
        prefill, decode = self._prefill.kernel, self._decode.kernel
        self.description = f"flashinfer (prefill {prefill.name}, decode {decode.name}, {describe_sources(sources)})"

    def prepare(self, tables: RowTables) -> list[Tensor]:
        """`extra` of the op for one step of this shape; part of the captured step. `plan` must have run before."""
        num_decode_rows = tables.decode_kv_lens.shape[0]
        num_prefill_rows = tables.kv_locations.shape[0] - num_decode_rows
        prefill = (
            self._prefill.prepare(num_prefill_rows, tables.chunk_starts, tables.chunk_kv_lens, tables.chunk_pages)
            if num_prefill_rows
            else self._prefill.absent()
        )
        kv_lens, pages = tables.decode_kv_lens, tables.decode_pages
        if isinstance(self._decode, PlannedRegion):
            starts = torch.arange(num_decode_rows + 1, dtype=torch.int32, device=kv_lens.device)
            decode = self._decode.prepare(num_decode_rows, starts, kv_lens, pages)
        else:
            decode = self._decode.prepare(kv_lens, pages)
        header = [self._prefill.kernel, self._decode.kernel, len(prefill), *self._windows]
        return [torch.tensor(header, dtype=torch.int64), *prefill, *decode]

    def plan(self, num_prefill_rows: int, chunk_starts: Words, chunk_kv_lens: Words, decode_kv_lens: Words) -> None:
        """Host part of a step, before its launch, on the launching stream.

        chunk_starts: [C + 1]; chunk_kv_lens: [C]; decode_kv_lens: [R], padded rows see 1 position.
        """
        if num_prefill_rows:
            self._prefill.plan(num_prefill_rows, chunk_starts, chunk_kv_lens)
        if isinstance(self._decode, PlannedRegion):
            num_rows = len(decode_kv_lens)
            self._decode.plan(num_rows, np.arange(num_rows + 1, dtype=np.int32), decode_kv_lens)


class XqaRegion:
    """One row per request, block tables read on the device."""

    kernel = Kernel.XQA

    def __init__(self, device: torch.device) -> None:
        # The semaphores must be zero before the first use; the kernel leaves them so.
        self._semaphores = torch.zeros(_XQA_SEMAPHORE_BYTES, dtype=torch.uint8, device=device)
        self._scratch = torch.empty(_XQA_SCRATCH_BYTES, dtype=torch.uint8, device=device)

    def prepare(self, kv_lens: Tensor, pages: Tensor) -> list[Tensor]:
        return [kv_lens.view(torch.uint32).unsqueeze(1), pages, self._semaphores, self._scratch]


class SplitKvRegion:
    """One row per request, read in parallel parts."""

    kernel = Kernel.SPLIT_KV

    def __init__(self, shape: AttentionShape, most_rows: int, device: torch.device) -> None:
        self._workspace = SplitKvWorkspace(most_rows, shape.num_heads, shape.num_kv_heads, shape.head_dim, device)

    def prepare(self, kv_lens: Tensor, pages: Tensor) -> list[Tensor]:
        workspace = self._workspace
        return [kv_lens, pages, workspace.parts, workspace.peaks_and_sums, workspace.finished]


def _decode_region(
    kernel: Kernel, shape: AttentionShape, most_rows: int, device: torch.device
) -> PlannedRegion | XqaRegion | SplitKvRegion:
    if kernel is Kernel.SPLIT_KV:
        return SplitKvRegion(shape, most_rows, device)
    return XqaRegion(device) if kernel is Kernel.XQA else PlannedRegion(kernel, shape, most_rows, most_rows)


def _run_xqa(q: Tensor, out: Tensor, k_pages: Tensor, v_pages: Tensor, prepared: Sequence[Tensor], window: int) -> None:
    from flashinfer.xqa import xqa

    kv_lens, pages, semaphores, scratch = prepared
    xqa(
        q.unsqueeze(1),
        k_pages,
        v_pages,
        pages,
        kv_lens,
        out.unsqueeze(1),
        scratch,
        semaphores,
        k_pages.shape[2],
        k_pages.shape[1],
        q_scale=1.0,  # the kernel divides by the square root of the head size itself
        sliding_win_size=window,
        enable_pdl=True,
    )


def _run_split_kv(
    q: Tensor,
    out: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    prepared: Sequence[Tensor],
    window: int,
    fresh: FreshRows | None = None,
) -> None:
    kv_lens, pages, parts, peaks_and_sums, finished = prepared
    workspace = parts, peaks_and_sums, finished
    split_kv_attention(q, out, k_pages, v_pages, pages, kv_lens, workspace, window, fresh, chained=can_chain())


def _paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    kv_locations: Tensor,
    chunk_starts: Tensor,
    chunk_kv_lens: Tensor,
    chunk_pages: Tensor,
    decode_kv_lens: Tensor,
    decode_pages: Tensor,
    extra: list[Tensor],
    window: int,
) -> Tensor:
    prefill_kernel, decode_kernel, num_prefill_tensors, *windows = extra[0].tolist()
    prefill, decode = extra[1 : 1 + num_prefill_tensors], extra[1 + num_prefill_tensors :]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    split = q.shape[0] - decode_kv_lens.shape[0]
    if not split and decode_kernel == Kernel.SPLIT_KV:
        _run_split_kv(q, out, k_pages, v_pages, decode, window, FreshRows(k, v, cos, sin))
        return out
    q = rotate_and_store(q, k, v, cos, sin, k_pages, v_pages, kv_locations, out, chained=can_chain())
    index = windows.index(window)
    if not split:
        _run_decode(Kernel(decode_kernel), q, out, k_pages, v_pages, decode, index, window)
        return out
    # The chunks' kernel computes and the decodes' reads memory, so they share the device well.
    main, side = torch.cuda.current_stream(), _side_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        if split < q.shape[0]:
            _run_decode(Kernel(decode_kernel), q[split:], out[split:], k_pages, v_pages, decode, index, window)
    run_planned(Kernel(prefill_kernel), q[:split], out[:split], k_pages, v_pages, prefill, index, window)
    main.wait_stream(side)
    return out


@functools.cache  # one process drives one device
def _side_stream() -> torch.cuda.Stream:
    """Runs the decode rows of a mixed step beside its chunks."""
    return torch.cuda.Stream()


def _run_decode(
    kernel: Kernel,
    q: Tensor,
    out: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    prepared: Sequence[Tensor],
    window_index: int,
    window: int,
) -> None:
    if kernel is Kernel.SPLIT_KV:
        _run_split_kv(q, out, k_pages, v_pages, prepared, window)
    elif kernel is Kernel.XQA:
        _run_xqa(q, out, k_pages, v_pages, prepared, window)
    else:
        run_planned(kernel, q, out, k_pages, v_pages, prepared, window_index, window)


def _result_like(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


# The KV write is deliberately not in the schema: a declared mutation makes torch.compile copy the cache.
_library = torch.library.Library("graphgen", "FRAGMENT")
_library.define(
    "paged_attention_flashinfer(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor k_pages, "
    "Tensor v_pages, Tensor kv_locations, Tensor chunk_starts, Tensor chunk_kv_lens, Tensor chunk_pages, "
    "Tensor decode_kv_lens, Tensor decode_pages, Tensor[] extra, int window) -> Tensor"
)
_library.impl("paged_attention_flashinfer", _paged_attention, "CUDA")
torch.library.register_fake("graphgen::paged_attention_flashinfer", _result_like, lib=_library)
