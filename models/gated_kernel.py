"""The kernel behind gated.py: gate and up in, their product in e4m3 out. Needs Triton; its interpreter will do.

A program has a whole row in its registers and reads it once. For rows of 14 336, of steps with 16, 64, 256 and 1024 of
them, an H200 takes 3.4, 3.5, 5.7 and 22 us, and 4.9, 5.1, 9.6 and 33 for what the compiler makes of the same lines.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from graphgen.models.chaining import launch_options
from graphgen.models.few_rows_kernels import gated
from graphgen.models.formats.layout import E4M3_MOST
from graphgen.models.formats.products import LEAST_SCALE

_COLUMNS_OF_WARP = 1024
_MOST_WARPS = 16


def gated_rows(
    inner: Tensor, activation: int, chained: bool, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """(activation(gate) * up in e4m3 [T, K], the scale of each row [T, 1] float32), as products.quantise_rows has it.

    A row that has an element which is not finite has NaN alone. inner: [T, 2 K], contiguous. activation: its number in
    few_rows_kernels.gated. chained: launch before the kernel ahead is done, and wait inside. dtype: float32 leaves out
    the last rounding.
    """
    assert inner.is_contiguous(), "a product's result"
    num_rows, columns = inner.shape[0], inner.shape[1] // 2
    codes = inner.new_empty(num_rows, columns, dtype=dtype)
    scale = inner.new_empty(num_rows, 1, dtype=torch.float32)
    width = triton.next_power_of_2(columns)
    gated_rows_kernel[(num_rows,)](
        inner,
        codes,
        scale,
        columns,
        E4M3_MOST,
        LEAST_SCALE,
        width,
        activation,
        chained,
        num_warps=min(max(width // _COLUMNS_OF_WARP, 1), _MOST_WARPS),
        **launch_options(chained),
    )
    return codes, scale


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def gated_rows_kernel(
    inner: "tl.tensor",
    codes: "tl.tensor",
    scales: "tl.tensor",
    K: int,
    MOST: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """One row. WIDTH: a power of two, at least K."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < K
    if CHAINED:
        gdc_wait()
    gate = tl.load(inner + row * 2 * K + columns, inside, other=0.0)
    up = tl.load(inner + row * 2 * K + K + columns, inside, other=0.0)
    if CHAINED:
        gdc_launch_dependents()
    result = gated(gate.to(tl.float32), up.to(tl.float32), ACTIVATION, gate.dtype).to(tl.float32)
    # A row with what is not finite has neither a largest element nor codes: maximum and minimum would pass it over.
    broken = tl.sum(result * 0.0, 0)
    scale = tl.maximum(tl.max(tl.abs(result), 0) * (1.0 / MOST), LEAST_SCALE) + broken
    fitting = tl.minimum(tl.maximum(result * (1.0 / scale), -MOST), MOST) + broken
    tl.store(scales + row, scale)
    tl.store(codes + row * K + columns, fitting.to(codes.dtype.element_ty), inside)
