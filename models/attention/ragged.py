"""Block tables in FlashInfer's ragged form, made on the device in one Triton launch. CUDA only.

FlashInfer's planned kernels read the pages of all requests from one list, request after request, and know where each
begins. Called by flashinfer.py inside the captured step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_SPARE_PAGES = 256
"""Entries behind the last page that are set to a valid one: a kernel's last tile loads past the end before it masks."""

_BLOCK = 256


@triton.jit(  # type: ignore[untyped-decorator]  # triton has no types
    do_not_specialize=["kv_lens", "last_lens", "num_requests", "table_stride", "page_size"]
)
def _flatten_kernel(
    kv_lens: "tl.tensor",
    block_tables: "tl.tensor",
    page_starts: "tl.tensor",
    flat: "tl.tensor",
    last_lens: "tl.tensor",
    num_requests: int,
    table_stride: int,
    page_size: int,
    REQUESTS: tl.constexpr,
    SPARE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program a request, and one more for what lies behind the last."""
    request = tl.program_id(0)
    others = tl.arange(0, REQUESTS)
    lens = tl.load(kv_lens + others, others < num_requests, other=0)
    counts = (lens + page_size - 1) // page_size
    first = tl.sum(tl.where(others < request, counts, 0))
    tl.store(page_starts + request, first)
    steps = tl.arange(0, BLOCK)
    if request == num_requests:
        for index in range(0, SPARE, BLOCK):
            tl.store(flat + first + index + steps, tl.zeros([BLOCK], tl.int32))
    else:
        kv_len = tl.load(kv_lens + request)
        count = (kv_len + page_size - 1) // page_size
        tl.store(last_lens + request, kv_len - tl.maximum(count - 1, 0) * page_size)
        for index in range(0, count, BLOCK):
            inside = index + steps < count
            pages = tl.load(block_tables + request.to(tl.int64) * table_stride + index + steps, inside, other=0)
            tl.store(flat + first + index + steps, pages, inside)


def flatten_pages(kv_lens: Tensor, block_tables: Tensor, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(first entry of each request and the end [N + 1], pages of all requests, positions in each last page [N]).

    kv_lens: [N] int32, 0 for an unused request. block_tables: [N, M] int32. The list has room for N * M pages and some
    to spare.
    """
    num_requests, pages_each = block_tables.shape
    device = block_tables.device
    page_starts = torch.empty(num_requests + 1, dtype=torch.int32, device=device)
    last_lens = torch.empty(num_requests, dtype=torch.int32, device=device)
    flat = torch.empty(num_requests * pages_each + _SPARE_PAGES, dtype=torch.int32, device=device)
    _flatten_kernel[(num_requests + 1,)](
        kv_lens,
        block_tables,
        page_starts,
        flat,
        last_lens,
        num_requests,
        block_tables.stride(0),
        page_size,
        triton.next_power_of_2(num_requests),
        _SPARE_PAGES,
        _BLOCK,
    )
    return page_starts, flat, last_lens
