"""The arithmetic of pages.py inside Triton kernels: values into quantised pages and back. CUDA only.

Owns what is done to a value between a register and a page. A kernel whose `scales` are None is for pages that are not
quantised, and nothing of this is in its code. Called by the kernels of split_kv.py, row_tiles.py and store.py.
"""

import torch
import triton
import triton.language as tl

from graphgen.models.attention.pages import FP8, FP8_MOST, INT8_LEAST_PEAK, INT8_MOST

_FP8_MOST = tl.constexpr(FP8_MOST)
_INT8_MOST = tl.constexpr(INT8_MOST)
_INT8_LEAST_PEAK = tl.constexpr(INT8_LEAST_PEAK)
_FLOAT16_MOST = tl.constexpr(65504.0)


def product_dtype(rows: torch.dtype, pages: torch.dtype) -> tl.dtype:
    """In which keys and values of such pages are multiplied with rows of such a dtype.

    float16 holds e4m3 exactly and comes of it by one instruction. bfloat16 holds the integers exactly, and weights that
    were multiplied by small scales.
    """
    if rows == torch.float32:
        return tl.float32
    return tl.float16 if pages == FP8 else tl.bfloat16


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def as_factor(queries: "tl.tensor", NUMBERS: tl.constexpr) -> "tl.tensor":
    """Queries in a product_dtype."""
    if tl.float16 == NUMBERS:
        queries = tl.clamp(queries.to(tl.float32), -_FLOAT16_MOST, _FLOAT16_MOST)
    return queries.to(NUMBERS)


# Two positions of one pair of dimensions come as a register of four e4m3; each dimension goes as a register of its own,
# with both positions, which is how a tensor core takes them.
_OF_PAIRS = tl.constexpr(
    """
    {
    .reg .b16 first, second;
    .reg .b32 a, b;
    mov.b32 {first, second}, $2;
    cvt.rn.f16x2.e4m3x2 a, first;
    cvt.rn.f16x2.e4m3x2 b, second;
    prmt.b32 $0, a, b, 0x5410;
    prmt.b32 $1, a, b, 0x7632;
    }
    """
)


def reads_pairs(rows: torch.dtype, pages: torch.dtype) -> bool:
    """Whether values of such pages are read by two and taken apart by of_pairs, which is PTX."""
    return pages == FP8 and product_dtype(rows, pages) is tl.float16 and not triton.knobs.runtime.interpret


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def of_pairs(pairs: "tl.tensor") -> "tuple[tl.tensor, tl.tensor]":
    """(the first, the second) of two e4m3 in each int16, as float16.

    Values are multiplied along positions, of which a tensor core takes two at a time, and lie along dimensions. What
    has 16 bits is loaded the other way round by one instruction (ldmatrix.trans), single bytes are loaded one by one.
    """
    first, second = tl.inline_asm_elementwise(
        _OF_PAIRS, "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
    )
    return first, second


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def int8_scale(peak: "tl.tensor") -> "tl.tensor":
    """peak: max|x|."""
    return tl.div_rn(tl.maximum(peak, _INT8_LEAST_PEAK), tl.full(peak.shape, _INT8_MOST, tl.float32))


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def quantised(values: "tl.tensor", scale: "tl.tensor", STORED: tl.constexpr) -> "tl.tensor":
    """values: float32, rounded to the model's dtype. scale: float32 of their shape. STORED: the pages' dtype."""
    stored = tl.div_rn(values, scale)
    if tl.int8 == STORED:
        return tl.floor(stored + 0.5).to(STORED)
    return tl.clamp(stored, -_FP8_MOST, _FP8_MOST).to(STORED)
