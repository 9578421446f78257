"""Whole pages copied in every layer's K and V tensor by one launch. CUDA only.

With torch's own operations a page is 2 x layers launches, which would keep the host busy for longer than the copy of
the pages takes. Called by `graphgen.models.kv_cache`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
"""Words of eight bytes that a program moves."""


@triton.jit(do_not_specialize=["copies"])  # type: ignore[untyped-decorator]  # triton has no types
def _copy_kernel(addresses: "tl.tensor", copies: "tl.tensor", WORDS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """One program per BLOCK words of a page, copy, and tensor. WORDS: of a page in one tensor."""
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    copy, tensor = tl.program_id(1), tl.program_id(2)
    pages = tl.multiple_of(tl.load(addresses + tensor).to(tl.pointer_type(tl.int64)), 16)
    source = tl.load(copies + 2 * copy).to(tl.int64)
    destination = tl.load(copies + 2 * copy + 1).to(tl.int64)
    inside = word < WORDS
    tl.store(pages + destination * WORDS + word, tl.load(pages + source * WORDS + word, inside), inside)


def copy_pages(addresses: Tensor, copies: Tensor, page_bytes: int) -> None:
    """addresses: [tensors] int64 on the device, where each begins. copies: [N, 2] int32 on the device, (source,
    destination). page_bytes: of one page in one tensor, a multiple of 8."""
    words = page_bytes // 8
    grid = (triton.cdiv(words, _BLOCK), copies.shape[0], addresses.shape[0])
    _copy_kernel[grid](addresses, copies, words, _BLOCK)


def addresses_of(tensors: list[Tensor]) -> Tensor:
    """For `copy_pages`: valid as long as the tensors live."""
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device=tensors[0].device)
