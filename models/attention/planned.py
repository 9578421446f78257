"""FlashInfer's planned kernels, FA2 and FA3: ragged rows over paged KV, the work list made by the host.

Owns the work lists, the ring of pinned blocks they are planned in, and the launch. `PlannedRegion.plan` runs before a
step is launched, `prepare` and `run_planned` inside the captured step. Called by flashinfer.py.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from graphgen.models.attention.backend import Words
from graphgen.models.attention.direct import PlannedFunctions
from graphgen.models.attention.kernels import AttentionShape, Kernel, Scores, arch_of, planned_library
from graphgen.models.attention.libraries import KernelFolder, planned_functions
from graphgen.models.attention.ragged import flatten_pages
from graphgen.models.attention.variant import Scoring

_INT_WORKSPACE_BYTES = 8 << 20
_PLAN_RING = 4  # pinned blocks: two steps in flight, one being planned, one to spare
_CAUSAL = 1  # FlashInfer's MaskMode.CAUSAL
_NHD = 0  # FlashInfer's TensorLayout.NHD: [page, position, head, element]


class PlannedTensors(NamedTuple):
    """What `plan` and `run_planned` share of one region and step. N requests, W distinct windows."""

    starts: Tensor
    """[N + 1] int32: the first row of each request, and the end."""
    page_starts: Tensor
    """[N + 1] int32: the first page of each request in `flat_pages`, and the end."""
    flat_pages: Tensor
    """int32: the pages of all requests, one request after the other."""
    last_lens: Tensor
    """[N] int32: positions in the last page of each request."""
    float_workspace: Tensor
    """Bytes for partial results."""
    work_lists: Tensor
    """[W, bytes]: what `plan` computed for each window."""
    windows: Tensor
    """[W] int64 on the host: the window of each work list."""
    constants: Tensor
    """[W, count] int64 on the host: the launch constants of each work list, read at capture."""
    plain_pages: Tensor
    """[2, pages, page_size, Hkv, D]: where quantised keys and values are read to, see plain_pages.py; none where they
    are not quantised."""
    plain_places: Tensor
    """int32: where in `plain_pages` each of `flat_pages` is read to; none where they are not quantised."""


class PlannedRegion:
    """Ragged rows over paged KV, scheduled by the host: FA2 or FA3.

    One work list per distinct sliding window, since the window decides how much a row reads.
    """

    def __init__(
        self, kernel: Kernel, shape: AttentionShape, most_requests: int, most_rows: int, num_plain_pages: int = 0
    ) -> None:
        """num_plain_pages: of all requests together, at least; 0 where pages are not quantised."""
        device = torch.device("cuda", torch.cuda.current_device())
        self.kernel = kernel
        self._shape = shape
        self._constants: dict[tuple[int, int, int], list[int]] = {}
        self._float_workspace = torch.empty(
            _float_workspace_bytes(kernel, shape, most_requests, most_rows, device),
            dtype=torch.uint8,
            device=device,
        )
        size = len(shape.windows), _INT_WORKSPACE_BYTES
        self._work_lists = torch.empty(size, dtype=torch.uint8, device=device)
        self._windows = torch.tensor(shape.windows, dtype=torch.int64)
        pool = (2, num_plain_pages, shape.page_size, shape.num_kv_heads, shape.head_dim)
        # Zeros: a kernel multiplies what lies past a sequence by a weight of zero, and memory may hold NaN.
        self._plain_pages = torch.zeros(pool, dtype=shape.dtype, device=device)
        self._ring = [torch.empty(_INT_WORKSPACE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(_PLAN_RING)]
        self._copied: list[torch.cuda.Event | None] = [None] * _PLAN_RING
        self._next = 0

    def prepare(self, num_rows: int, starts: Tensor, kv_lens: Tensor, pages: Tensor) -> PlannedTensors:
        """The block tables of [N] requests in FlashInfer's ragged form, made on the device."""
        page_starts, flat_pages, last_lens = flatten_pages(kv_lens, pages, self._shape.page_size)
        constants = [self._constants[num_rows, len(kv_lens), window] for window in self._shape.windows]
        num_plain = self._plain_pages.shape[1]
        # Entries behind the last page are read, and masked after.
        count = len(flat_pages) if num_plain else 0
        places = torch.arange(count, dtype=torch.int32, device=flat_pages.device).clamp_(max=num_plain - 1)
        of_host = torch.tensor(constants, dtype=torch.int64)
        return self._tensors(starts, page_starts, flat_pages, last_lens, of_host, places)

    def absent(self) -> PlannedTensors:
        """Stands in for `prepare` in a bucket without this region, so that every bucket runs one compiled layer."""
        of_none = no_requests(len(self._shape.windows), self._float_workspace.device)
        return self._tensors(*of_none, torch.empty_like(of_none[0]))

    def _tensors(
        self,
        starts: Tensor,
        page_starts: Tensor,
        flat_pages: Tensor,
        last_lens: Tensor,
        constants: Tensor,
        plain_places: Tensor,
    ) -> PlannedTensors:
        return PlannedTensors(
            starts=starts,
            page_starts=page_starts,
            flat_pages=flat_pages,
            last_lens=last_lens,
            float_workspace=self._float_workspace,
            work_lists=self._work_lists,
            windows=self._windows,
            constants=constants,
            plain_pages=self._plain_pages,
            plain_places=plain_places,
        )

    def plan(self, num_rows: int, starts: Words, kv_lens: Words) -> None:
        """Queues the work lists of one step for every window."""
        counts = -(-kv_lens // self._shape.page_size)
        page_starts = np.zeros(len(kv_lens) + 1, dtype=np.int32)
        np.cumsum(counts, out=page_starts[1:])
        for window, work_list in zip(self._shape.windows, self._work_lists, strict=True):
            constants = self._plan_window(window, work_list, num_rows, starts, page_starts, kv_lens)
            captured = self._constants.setdefault((num_rows, len(kv_lens), window), constants)
            if constants != captured:
                raise RuntimeError(
                    f"{self.kernel.name} plans {num_rows} rows of {len(kv_lens)} requests with launch constants "
                    f"{constants}, the captured graph has {captured}: this FlashInfer version does not fit graphs"
                )

    def _plan_window(
        self, window: int, work_list: Tensor, num_rows: int, starts: Words, page_starts: Words, kv_lens: Words
    ) -> list[int]:
        copied = self._copied[self._next]
        if copied is not None:
            copied.synchronize()
        shape = self._shape
        functions = _functions(self.kernel, shape.dtype, shape.head_dim, window > 0, shape.scores)
        planned = functions.plan(
            self._float_workspace,
            work_list,
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
            *functions.plan_tail,
        )
        constants = [int(value) for value in planned]
        event = torch.cuda.Event()
        event.record()
        self._copied[self._next] = event
        self._next = (self._next + 1) % _PLAN_RING
        return constants


def no_requests(num_windows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What differs by step of a region's tensors, of a step without any rows: see PlannedTensors.

    The compiler would start anew for one tensor in four places, and for the strides of one without a column.
    """
    starts, page_starts, pages, last_lens = (torch.empty(0, dtype=torch.int32, device=device) for _ in range(4))
    return starts, page_starts, pages, last_lens, torch.zeros(num_windows, 1, dtype=torch.int64)


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


@functools.cache  # a loaded library is immutable, and one process drives one device
def _functions(
    kernel: Kernel, dtype: torch.dtype, head_dim: int, windowed: bool, scores: Scores | None
) -> PlannedFunctions:
    folder = KernelFolder.of(arch_of(torch.cuda.get_device_capability()))
    return planned_functions(planned_library(kernel, dtype, head_dim, windowed, scores), folder)


def run_planned(
    kernel: Kernel, q: Tensor, out: Tensor, k_pages: Tensor, v_pages: Tensor, tensors: PlannedTensors, scoring: Scoring
) -> None:
    """Writes out, the attention of the rows q over the pages of their requests. k_pages, v_pages: the plain ones where
    pages are quantised."""
    window = scoring.numbers.window
    index = tensors.windows.tolist().index(window)
    functions = _functions(kernel, q.dtype, q.shape[2], window > 0, Scores.of(scoring))
    functions.paged_run(
        tensors.float_workspace,
        tensors.work_lists[index],
        tensors.constants[index].tolist(),
        q,
        k_pages,
        v_pages,
        tensors.starts,
        tensors.page_starts,
        tensors.plain_places if tensors.plain_pages.shape[1] else tensors.flat_pages,
        tensors.last_lens,
        out,
        None,  # log-sum-exp is not wanted
        _CAUSAL,
        _NHD,
        window - 1,
        kernel is Kernel.FA3,  # programmatic dependent launch
        *functions.run_tail(scoring),
    )
