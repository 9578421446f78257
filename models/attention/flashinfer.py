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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphgen.ipc.errors import ConfigError
from graphgen.models.attention.kernels import (
    AttentionShape,
    Kernel,
    KernelFolder,
    arch_of,
    best_kernels,
    check_supported,
    describe_sources,
    load_libraries,
    needed_libraries,
    planned_library,
)
from graphgen.models.attention.ragged import flatten_pages
from graphgen.models.attention.split_kv import SplitKvWorkspace, split_kv_attention
from graphgen.models.attention.store import rotate_and_store
from graphgen.models.attention.tables import RowTables

Words = np.ndarray[tuple[int], np.dtype[np.int32]]

_INT_WORKSPACE_BYTES = 8 << 20
_XQA_SEMAPHORE_BYTES = 8 << 20
_XQA_SCRATCH_BYTES = 128 << 20
_PLAN_RING = 4  # pinned blocks: two steps in flight, one being planned, one to spare
_DECODE_PAGE_SIZES = {Kernel.XQA: (16, 32, 64, 128), Kernel.SPLIT_KV: (16, 32, 64, 128, 256)}
_CAUSAL = 1  # FlashInfer's MaskMode.CAUSAL
_NHD = 0  # FlashInfer's TensorLayout.NHD: [page, position, head, element]


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
        prefill, decode = kernels or best_kernels(torch.cuda.get_device_capability(device))
        if decode in _DECODE_PAGE_SIZES and shape.page_size not in _DECODE_PAGE_SIZES[decode]:
            sizes = _DECODE_PAGE_SIZES[decode]
            raise ConfigError(f"page_size is {shape.page_size}, the decode kernel has {sizes}: choose one")
        self._prefill = PlannedRegion(prefill, shape, most_chunks, most_prefill_rows)
        self._decode = _decode_region(decode, shape, most_decode_rows, device)
        self._shape = shape
        self._windows = shape.windows
        self.description = f"flashinfer (prefill {prefill.name}, decode {decode.name})"

    def load_kernels(self) -> None:
        """Loads, or builds where no build is found, every kernel the layers will use, and says where they were."""
        kernels = self._prefill.kernel, self._decode.kernel
        folder = KernelFolder.of(arch_of(torch.cuda.get_device_capability()))
        sources = load_libraries(needed_libraries(self._shape, kernels), folder)
        self.description = (
            f"flashinfer (prefill {kernels[0].name}, decode {kernels[1].name}, {describe_sources(sources)})"
        )

    def prepare(self, tables: RowTables) -> list[Tensor]:
        """`extra` of the op for one step of this shape; part of the captured step. `plan` must have run before."""
        num_decode_rows = tables.decode_kv_lens.shape[0]
        num_prefill_rows = tables.kv_locations.shape[0] - num_decode_rows
        prefill = (
            self._prefill.prepare(num_prefill_rows, tables.chunk_starts, tables.chunk_kv_lens, tables.chunk_pages)
            if num_prefill_rows
            else self._prefill.absent()
        )
        starts = torch.arange(num_decode_rows + 1, dtype=torch.int32, device=tables.decode_kv_lens.device)
        decode = self._decode.prepare(num_decode_rows, starts, tables.decode_kv_lens, tables.decode_pages)
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

    def prepare(self, num_rows: int, starts: Tensor, kv_lens: Tensor, pages: Tensor) -> list[Tensor]:
        del num_rows, starts
        return [kv_lens.view(torch.uint32).unsqueeze(1), pages, self._semaphores, self._scratch]


class SplitKvRegion:
    """One row per request, read in parallel parts."""

    kernel = Kernel.SPLIT_KV

    def __init__(self, shape: AttentionShape, most_rows: int, device: torch.device) -> None:
        self._workspace = SplitKvWorkspace(most_rows, shape.num_heads, shape.num_kv_heads, shape.head_dim, device)

    def prepare(self, num_rows: int, starts: Tensor, kv_lens: Tensor, pages: Tensor) -> list[Tensor]:
        del num_rows, starts
        workspace = self._workspace
        return [kv_lens, pages, workspace.parts, workspace.peaks_and_sums, workspace.finished]


class PlannedRegion:
    """Ragged rows over paged KV, scheduled by the host: FA2 or FA3.

    One work list per distinct sliding window, since the window decides how much a row reads.
    """

    def __init__(self, kernel: Kernel, shape: AttentionShape, most_requests: int, most_rows: int) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        self.kernel = kernel
        self._shape = shape
        self._constants: dict[tuple[int, int, int], list[int]] = {}
        self._float_workspace = torch.empty(
            _float_workspace_bytes(kernel, shape, most_requests, most_rows, device),
            dtype=torch.uint8,
            device=device,
        )
        self._work_lists = {
            window: torch.empty(_INT_WORKSPACE_BYTES, dtype=torch.uint8, device=device) for window in shape.windows
        }
        self._ring = [torch.empty(_INT_WORKSPACE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(_PLAN_RING)]
        self._copied: list[torch.cuda.Event | None] = [None] * _PLAN_RING
        self._next = 0

    def prepare(self, num_rows: int, starts: Tensor, kv_lens: Tensor, pages: Tensor) -> list[Tensor]:
        """The block tables of [N] requests in FlashInfer's ragged form, made on the device."""
        num_requests = len(kv_lens)
        page_starts, flat, last_lens = flatten_pages(kv_lens, pages, self._shape.page_size)
        prepared = [starts, page_starts, flat, last_lens, self._float_workspace]
        for window in self._shape.windows:
            constants = torch.tensor(self._constants[num_rows, num_requests, window], dtype=torch.int64)
            prepared += [self._work_lists[window], constants]
        return prepared

    def absent(self) -> list[Tensor]:
        """Stands in for `prepare` in a bucket without this region, so that every bucket runs one compiled layer."""
        indices = torch.empty(0, dtype=torch.int32, device=self._float_workspace.device)
        prepared = [indices, indices, indices, indices, self._float_workspace]
        for window in self._shape.windows:
            prepared += [self._work_lists[window], torch.empty(0, dtype=torch.int64)]
        return prepared

    def plan(self, num_rows: int, starts: Words, kv_lens: Words) -> None:
        """Queues the work lists of one step for every window."""
        counts = -(-kv_lens // self._shape.page_size)
        page_starts = np.zeros(len(kv_lens) + 1, dtype=np.int32)
        np.cumsum(counts, out=page_starts[1:])
        for window in self._shape.windows:
            constants = self._plan_window(window, num_rows, starts, page_starts, kv_lens)
            captured = self._constants.setdefault((num_rows, len(kv_lens), window), constants)
            if constants != captured:
                raise RuntimeError(
                    f"{self.kernel.name} plans {num_rows} rows of {len(kv_lens)} requests with launch constants "
                    f"{constants}, the captured graph has {captured}: this FlashInfer version does not fit graphs"
                )

    def _plan_window(self, window: int, num_rows: int, starts: Words, page_starts: Words, kv_lens: Words) -> list[int]:
        copied = self._copied[self._next]
        if copied is not None:
            copied.synchronize()
        shape = self._shape
        arguments: list[Any] = [  # FlashInfer's plan functions are untyped
            self._float_workspace,
            self._work_lists[window],
            self._ring[self._next],
            torch.from_numpy(starts),
            torch.from_numpy(page_starts),
            torch.from_numpy(kv_lens),
            num_rows,
            len(kv_lens),
            shape.num_heads,
            shape.num_kv_heads,
            shape.page_size,
            True,  # launch constants for a graph
            shape.head_dim,
            shape.head_dim,
            True,  # causal
            window - 1,
        ]
        if self.kernel is Kernel.FA2:
            arguments += [-1, False, 0]  # split size chosen freely, splitting on, nothing co-located
        module = _planned_module(self.kernel, shape.dtype, shape.head_dim, window > 0)
        constants = [int(value) for value in module.plan(*arguments)]
        event = torch.cuda.Event()
        event.record()
        self._copied[self._next] = event
        self._next = (self._next + 1) % _PLAN_RING
        return constants


def _decode_region(
    kernel: Kernel, shape: AttentionShape, most_rows: int, device: torch.device
) -> PlannedRegion | XqaRegion | SplitKvRegion:
    if kernel is Kernel.SPLIT_KV:
        return SplitKvRegion(shape, most_rows, device)
    return XqaRegion(device) if kernel is Kernel.XQA else PlannedRegion(kernel, shape, most_rows, most_rows)


def _float_workspace_bytes(
    kernel: Kernel, shape: AttentionShape, most_requests: int, most_rows: int, device: torch.device
) -> int:
    """FA2 always splits the KV of a graph step and keeps fp32 partial outputs of every padded tile."""
    if kernel is Kernel.FA3:
        return 1 << 20
    group = shape.num_heads // shape.num_kv_heads
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    most = 0
    for tile in (16, 64, 128):
        tiles = -(-most_rows * group // tile) + most_requests
        padded = max(2 * num_sms // shape.num_kv_heads, tiles)
        needed = shape.num_heads * padded * tile * (shape.head_dim + 1) * 4
        if tile == 16 and most_rows > most_requests:
            continue  # this tile serves one row a request only
        most = max(most, needed)
    return most + (16 << 20)


@functools.cache  # a loaded kernel module is immutable
def _planned_module(kernel: Kernel, dtype: torch.dtype, head_dim: int, windowed: bool) -> Any:  # untyped library
    return planned_library(kernel, dtype, head_dim, windowed).load()


def _run_planned(
    kernel: Kernel,
    q: Tensor,
    out: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    prepared: Sequence[Tensor],
    window_index: int,
    window: int,
) -> None:
    starts, page_starts, flat_pages, last_lens, float_workspace = prepared[:5]
    work_list, constants = prepared[5 + 2 * window_index : 7 + 2 * window_index]
    head_dim = q.shape[2]
    module = _planned_module(kernel, q.dtype, head_dim, window > 0)
    module.paged_run(
        float_workspace,
        work_list,
        constants.tolist(),
        q,
        k_pages,
        v_pages,
        starts,
        page_starts,
        flat_pages,
        last_lens,
        out,
        None,  # log-sum-exp is not wanted
        _CAUSAL,
        _NHD,
        window - 1,
        kernel is Kernel.FA3,  # programmatic dependent launch
        *(None,) * 6,  # mask, mask starts, alibi slopes, prefix lengths, item positions, longest item
        0.0,  # no soft cap
        head_dim**-0.5,
        *(None,) * 3,  # fp8 scales
        1.0,
        1e4,  # rope is applied by the model
        0,
        0,
    )


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
    q: Tensor, out: Tensor, k_pages: Tensor, v_pages: Tensor, prepared: Sequence[Tensor], window: int
) -> None:
    kv_lens, pages, parts, peaks_and_sums, finished = prepared
    workspace = parts, peaks_and_sums, finished
    split_kv_attention(q, out, k_pages, v_pages, pages, kv_lens, workspace, window, chained=_can_chain())


@functools.cache  # one process drives one device
def _can_chain() -> bool:
    """Whether a kernel may be launched before the one ahead is done (programmatic dependent launch)."""
    return torch.cuda.get_device_capability()[0] >= 9


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
    q = rotate_and_store(q, k, v, cos, sin, k_pages, v_pages, kv_locations, chained=_can_chain())
    out = torch.empty_like(q)
    split = q.shape[0] - decode_kv_lens.shape[0]
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
    out[:split].zero_()  # no kernel writes the padded rows behind the last chunk
    _run_planned(Kernel(prefill_kernel), q[:split], out[:split], k_pages, v_pages, prefill, index, window)
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
        _run_planned(kernel, q, out, k_pages, v_pages, prepared, window_index, window)


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
