"""cos and sin of a step's positions in one Triton launch, where torch takes eight. CUDA only; called by rope.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice


@triton.jit(do_not_specialize=["positions"])  # type: ignore[untyped-decorator]  # triton has no types
def _angles_kernel(
    positions: "tl.tensor",
    frequencies: "tl.tensor",
    cos: "tl.tensor",
    sin: "tl.tensor",
    scale: float,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, BLOCK)
    inside = half < HALF
    angle = tl.load(positions + row).to(tl.float32) * tl.load(frequencies + half, inside, other=0.0)
    row_cos = (libdevice.cos(angle) * scale).to(cos.dtype.element_ty)
    row_sin = (libdevice.sin(angle) * scale).to(sin.dtype.element_ty)
    places = row * 2 * HALF + half
    tl.store(cos + places, row_cos, inside)
    tl.store(cos + places + HALF, row_cos, inside)
    tl.store(sin + places, row_sin, inside)
    tl.store(sin + places + HALF, row_sin, inside)


def angles(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin times `scale`, each [T, D] in `dtype`. positions: [T] int64. frequencies: [D / 2] float32."""
    half = frequencies.shape[0]
    cos, sin = (torch.empty((len(positions), 2 * half), dtype=dtype, device=positions.device) for _ in range(2))
    block = triton.next_power_of_2(half)
    _angles_kernel[(len(positions),)](positions, frequencies, cos, sin, scale, half, block, num_warps=1)
    return cos, sin
