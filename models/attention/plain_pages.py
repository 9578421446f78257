"""Quantised pages read into pages of the model's dtype, for a kernel that takes no others: FlashInfer's, for chunks.
CUDA only.

Plain pages are numbered as the list of the chunks' pages counts them, chunk after chunk, so there need be as many as a
step's chunks see together, which the scheduler bounds. All layers share them: a layer's chunks are computed before the
next layer's pages are read. Only those that a row of the step's chunks sees are read. How many these are is read on the
device, so the one launch of a layer is the same for every step and a captured graph may hold it. Called by
flashinfer.py.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.row_tiles import Rows

_ELEMENTS = 4096
"""Of K and of V each that a program reads at a time."""

_PROGRAMS_EACH = 4
"""Of a multiprocessor: they take the parts of pages in turn."""


@triton.jit(do_not_specialize=["num_requests"])  # type: ignore[untyped-decorator]  # triton has no types
def _fill_kernel(
    k_pages: "tl.tensor",
    v_pages: "tl.tensor",
    k_scales: "tl.tensor",
    v_scales: "tl.tensor",
    k_plain: "tl.tensor",
    v_plain: "tl.tensor",
    starts: "tl.tensor",
    kv_lens: "tl.tensor",
    page_starts: "tl.tensor",
    flat_pages: "tl.tensor",
    window: int,
    num_requests: int,
    PAGE: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    REQUESTS: tl.constexpr,
) -> None:
    """PAIRS: of a position and a head, that a program reads at a time."""
    PARTS: tl.constexpr = (PAGE * HKV + PAIRS - 1) // PAIRS
    BY_POSITION: tl.constexpr = k_pages.dtype.element_ty == tl.int8  # whether scales are of positions or of heads
    requests = tl.arange(0, REQUESTS)
    ends = tl.load(page_starts + 1 + requests, requests < num_requests, other=0)
    num_parts = tl.load(page_starts + num_requests) * PARTS
    dims = tl.arange(0, D)[None, :]
    for part in range(tl.program_id(0), num_parts, tl.num_programs(0)):
        number = part // PARTS
        seen = True
        if window > 0:
            request = tl.sum(((ends <= number) & (requests < num_requests)).to(tl.int32), 0)
            num_rows = tl.load(starts + request + 1) - tl.load(starts + request)
            first_position = tl.load(kv_lens + request) - num_rows - window + 1
            page_end = (number - tl.load(page_starts + request) + 1) * PAGE
            seen = page_end > first_position
        if seen:
            page = tl.load(flat_pages + number).to(tl.int64)
            pairs = part % PARTS * PAIRS + tl.arange(0, PAIRS)
            inside = (pairs < PAGE * HKV)[:, None]
            places = page * PAGE * HKV + pairs[:, None]
            plain_places = number.to(tl.int64) * PAGE * HKV + pairs[:, None]
            of_scales = places if BY_POSITION else places % HKV
            k = tl.load(k_pages + places * D + dims, inside, other=0.0).to(tl.float32)
            v = tl.load(v_pages + places * D + dims, inside, other=0.0).to(tl.float32)
            k *= tl.load(k_scales + of_scales, inside, other=0.0)
            v *= tl.load(v_scales + of_scales, inside, other=0.0)
            tl.store(k_plain + plain_places * D + dims, k.to(k_plain.dtype.element_ty), inside)
            tl.store(v_plain + plain_places * D + dims, v.to(v_plain.dtype.element_ty), inside)


def fill_plain_pages(
    plain_pages: Tensor, pages: LayerPages, chunks: Rows, page_starts: Tensor, flat_pages: Tensor, window: int
) -> None:
    """Reads every page in which a row of the chunks sees a position; those behind the window are left out.

    plain_pages: [2, at least as many as the chunks have, page_size, Hkv, D], of keys and of values. pages: contiguous
    and quantised. page_starts: [N + 1] int32, the first of each
    chunk's pages in `flat_pages`, int32, and the end. window: 0 is none.
    """
    assert chunks.starts is not None, "chunks have starts"
    page_size, num_kv_heads, head_dim = pages.k.shape[1:]
    num_requests = len(chunks.kv_lens)
    pairs = max(1, _ELEMENTS // head_dim)
    _fill_kernel[(_num_programs(pages.k.device),)](
        *pages,
        *plain_pages,
        chunks.starts,
        chunks.kv_lens,
        page_starts,
        flat_pages,
        window,
        num_requests,
        page_size,
        num_kv_heads,
        head_dim,
        pairs,
        max(32, triton.next_power_of_2(num_requests)),
        num_warps=4,
    )


@functools.cache
def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # interpreted
    return _PROGRAMS_EACH * int(torch.cuda.get_device_properties(device).multi_processor_count)
