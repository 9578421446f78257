"""Rotates q and k, writes k and v into their pages and silences padded rows, in one Triton launch. CUDA only; called by
the attention op for steps with chunks: decode rows alone do it inside their attention kernel, see split_kv.py.

Left to the compiler, the same takes three kernels, each as long as its launch when a step has few rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.quantised import int8_scale, quantised
from graphgen.models.chaining import launch_options


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _rotate(
    row: "tl.tensor",
    heads: "tl.tensor",
    half: "tl.tensor",
    cos: "tl.tensor",
    sin: "tl.tensor",
    mask: "tl.tensor",
    head_stride: int,
    HALF: tl.constexpr,
) -> "tuple[tl.tensor, tl.tensor]":
    """Both halves of the heads of one row: dimension i turns with i + HALF."""
    places = row + heads * head_stride + half
    first = tl.load(places, mask).to(tl.float32)
    second = tl.load(places + HALF, mask).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _store_quantised(
    pages: "tl.tensor",
    scales: "tl.tensor",
    location: "tl.tensor",
    heads: "tl.tensor",
    offset: "tl.tensor",
    first: "tl.tensor",
    second: "tl.tensor",
    mask: "tl.tensor",
    HKV: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """Both halves of the heads of one row, rounded to the model's dtype. offset: where the first halves go."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    if pages.dtype.element_ty == tl.int8:
        peak = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))[:, None]
        scale = int8_scale(peak)
        tl.store(scales + location * HKV + heads, scale, heads < HKV)
    else:
        scale = tl.load(scales + heads, heads < HKV, other=1.0)
    scale = tl.broadcast_to(scale, first.shape)
    tl.store(pages + offset, quantised(first, scale, pages.dtype.element_ty), mask)
    tl.store(pages + offset + HALF, quantised(second, scale, pages.dtype.element_ty), mask)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _rotate_and_store_kernel(
    q: "tl.tensor",
    k: "tl.tensor",
    v: "tl.tensor",
    cos: "tl.tensor",
    sin: "tl.tensor",
    q_out: "tl.tensor",
    k_pages: "tl.tensor",
    v_pages: "tl.tensor",
    locations: "tl.tensor",
    attended: "tl.tensor",
    k_scales: "tl.tensor | None",
    v_scales: "tl.tensor | None",
    temperatures: "tl.tensor | None",
    trash_start: int,
    q_stride: int,
    q_head_stride: int,
    k_stride: int,
    k_head_stride: int,
    v_stride: int,
    v_head_stride: int,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    HALF: tl.constexpr,
    HQ_BLOCK: tl.constexpr,
    HKV_BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    if CHAINED:
        gdc_wait()
    half = tl.arange(0, HALF)[None, :]
    # The tables repeat: cos[i] == cos[i + HALF].
    row_cos = tl.load(cos + row * 2 * HALF + half).to(tl.float32)
    row_sin = tl.load(sin + row * 2 * HALF + half).to(tl.float32)

    heads = tl.arange(0, HQ_BLOCK)[:, None]
    mask = (heads < HQ) & (half < HALF)
    first, second = _rotate(q + row * q_stride, heads, half, row_cos, row_sin, mask, q_head_stride, HALF)
    if temperatures is not None:
        temperature = tl.load(temperatures + row)
        first, second = first * temperature, second * temperature
    places = q_out + (row * HQ + heads) * 2 * HALF + half
    tl.store(places, first.to(q_out.dtype.element_ty), mask)
    tl.store(places + HALF, second.to(q_out.dtype.element_ty), mask)

    location = tl.load(locations + row)
    if location >= trash_start:
        silent = tl.zeros([HQ_BLOCK, HALF], attended.dtype.element_ty)
        places = attended + (row * HQ + heads) * 2 * HALF + half
        tl.store(places, silent, mask)
        tl.store(places + HALF, silent, mask)

    heads = tl.arange(0, HKV_BLOCK)[:, None]
    mask = (heads < HKV) & (half < HALF)
    first, second = _rotate(k + row * k_stride, heads, half, row_cos, row_sin, mask, k_head_stride, HALF)
    offset = (location * HKV + heads) * 2 * HALF + half
    if k_scales is not None:
        first, second = first.to(k.dtype.element_ty), second.to(k.dtype.element_ty)
        _store_quantised(k_pages, k_scales, location, heads, offset, first, second, mask, HKV, HALF)
    else:
        tl.store(k_pages + offset, first.to(k_pages.dtype.element_ty), mask)
        tl.store(k_pages + offset + HALF, second.to(k_pages.dtype.element_ty), mask)
    source = v + row * v_stride + heads * v_head_stride + half
    if v_scales is not None:
        first, second = tl.load(source, mask, other=0.0), tl.load(source + HALF, mask, other=0.0)
        _store_quantised(v_pages, v_scales, location, heads, offset, first, second, mask, HKV, HALF)
    else:
        tl.store(v_pages + offset, tl.load(source, mask), mask)
        tl.store(v_pages + offset + HALF, tl.load(source + HALF, mask), mask)
    if CHAINED:
        gdc_launch_dependents()


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    pages: LayerPages,
    locations: Tensor,
    attended: Tensor,
    temperatures: Tensor | None,
    chained: bool,
) -> Tensor:
    """The rotated q, [T, Hq, D] contiguous; rotated k and plain v are stored in the pages.

    attended, [T, Hq, D], becomes zero in the rows that write to the trash page, the last one: no attention kernel
    writes the padded rows behind the last chunk. temperatures: [T] float32, by which the rotated q is multiplied.

    q: [T, Hq, D]; k, v: [T, Hkv, D], any strides but 1 in the last dimension, D a power of two. cos, sin: [T, D]
    contiguous. locations: [T] int64. chained: launch before the kernel ahead
    is done, and wait inside (programmatic dependent launch; SM90 on).
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    q_out = torch.empty((num_rows, num_heads, head_dim), dtype=q.dtype, device=q.device)
    _rotate_and_store_kernel[(num_rows,)](
        q,
        k,
        v,
        cos,
        sin,
        q_out,
        pages.k,
        pages.v,
        locations,
        attended,
        pages.k_scales,
        pages.v_scales,
        temperatures,
        (pages.k.shape[0] - 1) * pages.k.shape[1],
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        num_heads,
        num_kv_heads,
        head_dim // 2,
        triton.next_power_of_2(num_heads),
        triton.next_power_of_2(num_kv_heads),
        chained,
        **launch_options(chained),
    )
    return q_out
