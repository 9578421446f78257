"""The kernel behind matrices.py: codes, scales and zeros in, a matrix out. Needs Triton; its interpreter will do."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphgen.models.few_rows_tiles import STORAGES as NUMBERS
from graphgen.models.few_rows_weights import INT4, Reading, of_bytes, of_nibbles
from graphgen.models.formats.layout import STORAGES
from graphgen.models.formats.matrices import code_in_e4m3
from graphgen.models.spec.formats import PACKED_BLOCK

ROWS, BYTES = 8, 1024
"""Of a weight, that a program reads."""


def make_matrix(
    codes: Tensor, scale: Tensor, zeros: Tensor | None, group: int, rows: int, dtype: torch.dtype, scaled: bool
) -> tuple[Tensor, Tensor]:
    """([N, K] in `dtype`, [N, 1] float32). scaled: each row was divided by a number, the second result, so that it fits
    the range of e4m3; else that is not written."""
    storage = STORAGES[codes.dtype]
    num_rows, row_bytes = codes.shape
    depth = row_bytes * (2 if storage == "int4" else 1)
    num_groups = scale.shape[1]
    matrix = torch.empty(num_rows, depth, dtype=dtype, device=codes.device)
    of_rows = torch.empty(num_rows, 1, dtype=torch.float32, device=codes.device)
    most = PACKED_BLOCK // 2 if storage == "int4" else PACKED_BLOCK
    reading = Reading(
        NUMBERS[storage],
        group,
        rows,
        zeros is not None,
        depth=0,
        tile_bytes=min(group or most, most),
        conversion=0 if triton.knobs.runtime.interpret else 1,
        slices=0,
    )
    matrix_kernel[(triton.cdiv(num_rows, ROWS), triton.cdiv(row_bytes, BYTES))](
        codes.view(torch.uint8) if storage == "e4m3" else codes,
        scale,
        zeros,
        matrix,
        of_rows,
        num_rows,
        row_bytes,
        num_groups,
        1.0 / code_in_e4m3(storage, zeros is not None) if scaled else 1.0,
        scaled,
        ROWS,
        BYTES // reading.tile_bytes,
        triton.next_power_of_2(num_groups),
        reading,
    )
    return matrix, of_rows


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _of_groups(
    numbers: "tl.tensor", first: "tl.tensor", column: "tl.tensor", inside: "tl.tensor", HOW: tl.constexpr
) -> "tl.tensor":
    """[ROWS, UNITS] float32: scales or zeros of the groups that columns, [UNITS], are in. first: [ROWS]."""
    group = (column // HOW.group if HOW.group else column * 0)[None, :]
    return tl.load(numbers + first[:, None] + group, inside, other=0).to(tl.float32)


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
    of_largest: float,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    GROUPS: tl.constexpr,
    HOW: tl.constexpr,
) -> None:
    """A program reads ROWS x UNITS x HOW.tile_bytes bytes, each unit of which has one scale, or of int4 one for its low
    halves and one for its high ones. SCALED: what is stored was divided by a scale of its row, `of_largest` times the
    largest scale of the row, whatever its sign."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    byte = (tl.program_id(1) * UNITS + tl.arange(0, UNITS)) * HOW.tile_bytes
    exists, inside = rows < num_rows, (rows < num_rows)[:, None] & (byte < row_bytes)[None, :]
    along = tl.arange(0, HOW.tile_bytes)[None, None, :]
    stored = inside[:, :, None] & (along >= 0)
    raw = tl.load(codes + (rows[:, None] * row_bytes + byte[None, :])[:, :, None] + along, stored, other=0)
    first_group = rows // HOW.scale_rows * num_groups
    of_row = tl.full((ROWS,), 1.0, tl.float32)
    if SCALED:
        numbers = tl.arange(0, GROUPS)[None, :]
        all_scales = tl.load(
            scales + first_group[:, None] + numbers, exists[:, None] & (numbers < num_groups), other=0.0
        )
        of_row = tl.max(tl.abs(all_scales.to(tl.float32)), 1) * of_largest
        if tl.program_id(1) == 0:
            tl.store(of_rows + rows, of_row, exists)
        of_row = tl.where(of_row > 0.0, of_row, 1.0)  # where all scales are 0
    if HOW.storage == INT4:
        column = byte // 64 * 128 + byte % 64
        for half in tl.static_range(2):
            place = column + 64 * half
            zero = _of_groups(zeros, first_group, place, inside, HOW) if HOW.zeros else tl.full((1, 1), 8.0, tl.float32)
            scale = tl.div_rn(_of_groups(scales, first_group, place, inside, HOW), of_row[:, None])
            value = of_nibbles(raw, zero[:, :, None], half, tl.float32, HOW) * scale[:, :, None]
            value = value.to(matrix.dtype.element_ty)
            tl.store(matrix + (rows[:, None] * 2 * row_bytes + place[None, :])[:, :, None] + along, value, stored)
    else:
        value = of_bytes(raw, tl.float32, HOW)
        if HOW.zeros:
            value -= _of_groups(zeros, first_group, byte, inside, HOW)[:, :, None]
        scale = tl.div_rn(_of_groups(scales, first_group, byte, inside, HOW), of_row[:, None])
        value = (value * scale[:, :, None]).to(matrix.dtype.element_ty)
        tl.store(matrix + (rows[:, None] * row_bytes + byte[None, :])[:, :, None] + along, value, stored)
