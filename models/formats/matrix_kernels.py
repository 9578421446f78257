"""The kernel behind matrices.py: codes, scales and zeros in, a matrix out. Needs Triton; its interpreter will do."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphgen.models.formats.layout import E4M3_MOST
from graphgen.models.formats.matrices import largest_code
from graphgen.models.spec.formats import PACKED_BLOCK, Storage

_STORAGES: dict[torch.dtype, Storage] = {torch.float8_e4m3fn: "e4m3", torch.int8: "int8", torch.uint8: "int4"}
ROWS, BYTES = 8, 512
"""Of a weight, that a program reads."""


def make_matrix(
    codes: Tensor, scale: Tensor, zeros: Tensor | None, group: int, rows: int, dtype: torch.dtype, scaled: bool
) -> tuple[Tensor, Tensor]:
    """([N, K] in `dtype`, [N, 1] float32). scaled: each row was divided by a number, the second result, so that it fits
    the range of e4m3; else that is not written."""
    storage = _STORAGES[codes.dtype]
    num_rows, row_bytes = codes.shape
    depth = row_bytes * (2 if storage == "int4" else 1)
    num_groups = scale.shape[1]
    matrix = torch.empty(num_rows, depth, dtype=dtype, device=codes.device)
    of_rows = torch.empty(num_rows, 1, dtype=torch.float32, device=codes.device)
    matrix_kernel[(triton.cdiv(num_rows, ROWS), triton.cdiv(row_bytes, BYTES))](
        codes.view(torch.uint8) if storage == "e4m3" else codes,
        scale,
        zeros,
        matrix,
        of_rows,
        num_rows,
        row_bytes,
        num_groups,
        largest_code(storage, zeros is not None) / E4M3_MOST if scaled else 0.0,
        storage == "e4m3",
        storage == "int4",
        group or depth,
        rows,
        zeros is not None,
        scaled,
        PACKED_BLOCK // 2,
        ROWS,
        BYTES,
        triton.next_power_of_2(num_groups),
    )
    return matrix, of_rows


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def matrix_kernel(
    codes: "tl.tensor",
    scales: "tl.tensor",
    zeros: "tl.tensor",
    matrix: "tl.tensor",
    of_rows: "tl.tensor",
    num_rows: int,
    row_bytes: int,
    num_groups: int,
    largest: float,
    IS_E4M3: tl.constexpr,
    PACKED: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCALED: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """SCALED: what is stored was divided by a scale of its row, `largest` times the largest scale of the row."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    exists, inside = rows < num_rows, (rows < num_rows)[:, None] & (byte < row_bytes)[None, :]
    raw = tl.load(codes + rows[:, None] * row_bytes + byte[None, :], inside, other=0)
    first_group = rows // SCALE_ROWS * num_groups
    factor = tl.full((ROWS,), 1.0, tl.float32)
    if SCALED:
        numbers = tl.arange(0, GROUPS)
        all_scales = tl.load(
            scales + first_group[:, None] + numbers[None, :],
            exists[:, None] & (numbers < num_groups)[None, :],
            other=0.0,
        )
        of_row = tl.max(all_scales.to(tl.float32), 1) * largest
        factor = tl.where(of_row > 0.0, 1.0 / of_row, 0.0)
        if tl.program_id(1) == 0:
            tl.store(of_rows + rows, of_row, exists)
    if PACKED:
        columns = byte // HALF * (2 * HALF) + byte % HALF
        for half in tl.static_range(2):
            code = (raw >> 4 if half else raw & 15).to(tl.float32)
            places = columns + half * HALF
            group = first_group[:, None] + (places // GROUP)[None, :]
            zero = tl.load(zeros + group, inside, other=0).to(tl.float32) if HAS_ZEROS else 8.0
            value = (code - zero) * tl.load(scales + group, inside, other=0.0).to(tl.float32) * factor[:, None]
            whole = matrix + rows[:, None] * (2 * row_bytes) + places[None, :]
            tl.store(whole, value.to(matrix.dtype.element_ty), inside)
    else:
        group = first_group[:, None] + (byte // GROUP)[None, :]
        if IS_E4M3:  # its bits where a float32 has them are 2**-120 of it; not every device has the type
            wide = raw.to(tl.int32)
            value = ((wide & 127) << 20 | (wide & 128) << 24).to(tl.float32, bitcast=True) * 1.329227995784916e36
        else:
            value = raw.to(tl.float32)
        if HAS_ZEROS:
            value -= tl.load(zeros + group, inside, other=0).to(tl.float32)
        value = value * tl.load(scales + group, inside, other=0.0).to(tl.float32) * factor[:, None]
        tl.store(matrix + rows[:, None] * row_bytes + byte[None, :], value.to(matrix.dtype.element_ty), inside)
