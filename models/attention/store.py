"""Writes the K and V rows of a step into their pages, in one Triton launch. CUDA only; called by the attention op."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _store_kernel(
    k: "tl.tensor",
    v: "tl.tensor",
    k_pages: "tl.tensor",
    v_pages: "tl.tensor",
    locations: "tl.tensor",
    k_stride: int,
    v_stride: int,
    row_elements: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    location = tl.load(locations + row)
    columns = tl.arange(0, block)
    mask = columns < row_elements
    tl.store(k_pages + location * row_elements + columns, tl.load(k + row * k_stride + columns, mask), mask)
    tl.store(v_pages + location * row_elements + columns, tl.load(v + row * v_stride + columns, mask), mask)


def store_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, locations: Tensor) -> None:
    """k, v: [T, Hkv, D], contiguous within a row; pages: [P, page_size, Hkv, D]; locations: [T] int64."""
    num_rows, num_heads, head_dim = k.shape
    elements = num_heads * head_dim
    _store_kernel[(num_rows,)](
        k,
        v,
        k_pages,
        v_pages,
        locations,
        k.stride(0),
        v.stride(0),
        elements,
        triton.next_power_of_2(elements),
    )
