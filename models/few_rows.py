"""The parts of a layer over a few token rows: Triton kernels, each launched while the one ahead still runs. CUDA only.

With a few rows a step does little but read weights, and what it loses is the time between kernels, when memory is
idle: the smallest product reads for 8 us and takes 12. Here every kernel is launched under its predecessor
(programmatic dependent launch) and waits inside for its data, gate, up and activation are one kernel, and the norms
have none of their own: the division by a row's root mean square comes after the product that reads the row.

The arithmetic of layers.py, but that the norm rounds once where layers.py rounds twice. Owns no weights. Called by
few_rows_step.py, which puts them in order; experts/few_rows.py has those of experts.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from graphgen.models.chaining import can_chain, launch_options
from graphgen.models.few_rows_kernels import (
    adding_linear_kernel,
    embed_kernel,
    gated_kernel,
    norm_heads_kernel,
    normed_linear_kernel,
)
from graphgen.models.few_rows_layers import ACTIVATIONS, LEAST_COLUMNS, LEAST_DEPTH
from graphgen.models.few_rows_tiles import Cut, Shape, cut_stored, tensors_of
from graphgen.models.formats.products import Weight
from graphgen.models.norms import RMSNorm
from graphgen.models.one_row_int4 import packed
from graphgen.models.one_row_kernels import adding_row_kernel, gated_row_kernel, normed_row_kernel

Stored = tuple[Tensor, Tensor | None, Tensor | None]
"""few_rows_tiles.tensors_of a weight."""


class Normed(NamedTuple):
    """RMSNorm of rows, but for the division by the root mean square, which falls to the reader."""

    scaled: Tensor
    """[T, hidden]: the rows times the norm's weight."""
    squares: Tensor
    """[T, parts] float32: sums of the squares of the rows, each over a part of the columns."""


# --- one kernel each -------------------------------------------------------------------------------------------


def _row_block(num_rows: int) -> int:
    """Rows a program multiplies: what one tensor core takes at least, or what a group of four does."""
    return 16 if num_rows <= 16 else 64


_NARROW = 88
"""Programs of LEAST_COLUMNS that leave a third of the multiprocessors idle."""


def _column_block(size: int) -> int:
    """Columns of a program that makes a product `size` wide."""
    # Two thirds of the multiprocessors with 16 KiB stages beat all of them with 8 KiB ones.
    return 64 if size % 64 == 0 and size // 64 >= _NARROW else LEAST_COLUMNS


def depth_block(depth: int, most: int = 128) -> int:
    """Columns of a weight that a program reads at a time: the most that divide the depth."""
    return next(block for block in (most, most // 2, most // 4, LEAST_DEPTH) if depth % block == 0)


def _cut(weight: Tensor | Weight, num_rows: int, size: int, depth: int, shape: Shape | None) -> Cut:
    """How a product [num_rows, size] over `depth` columns of a weight is cut."""
    if isinstance(weight, Weight):
        return cut_stored(weight, num_rows, size, depth, paired=False, shape=shape)
    columns, block, rows = _column_block(size), depth_block(depth), _row_block(num_rows)
    stages = 8 if columns == LEAST_COLUMNS else 6 if rows == 16 else 5
    # 64 rows need the room that early columns would take.
    return Cut(rows, columns, block, block if rows == 16 else 0, 4, stages * 128 // block, None)


def _cut_gated(weight: Tensor | Weight, num_rows: int, size: int, depth: int, shape: Shape | None) -> Cut:
    """The same of gate and up, each `size` wide."""
    if isinstance(weight, Weight):
        return cut_stored(weight, num_rows, size, depth, paired=True, shape=shape)
    columns, block, rows = 64 if size % 64 == 0 else LEAST_COLUMNS, depth_block(depth), _row_block(num_rows)
    stages = 3 if rows == 16 else 4
    return Cut(rows, columns, block, block if rows == 16 else 0, 4, stages * 128 // block, None)


def in_input_order(x: Tensor, weight: Tensor | Weight) -> Tensor:
    """The columns of x as the weight's are."""
    if isinstance(weight, Tensor) or weight.permutation is None:
        return x
    return x.index_select(1, weight.permutation)


def open_normed(like: Tensor, num_rows: int, size: int, block: int) -> tuple[Tensor, Normed]:
    """Where a kernel that ends in the residual stream writes: (sums, their norm). block: columns of a program."""
    sums, scaled = (torch.empty((num_rows, size), dtype=like.dtype, device=like.device) for _ in range(2))
    squares = torch.empty((num_rows, size // block), dtype=torch.float32, device=like.device)
    return sums, Normed(scaled, squares)


def embed(token_ids: Tensor, table: Tensor, norm: RMSNorm) -> tuple[Tensor, Normed]:
    """(rows of the table, [T, hidden], and their norm). token_ids: [T] int64."""
    num_rows, size = token_ids.shape[0], table.shape[1]
    block = _column_block(size)
    sums, normed = open_normed(table, num_rows, size, block)
    embed_kernel[(size // block,)](
        token_ids, table, norm.weight, sums, *normed, num_rows, size, _row_block(num_rows), block
    )
    return sums, normed


def normed_linear(
    x: Normed, eps: float, weight: Tensor | Weight, bias: Tensor | None, chained: bool, shape: Shape | None = None
) -> Tensor:
    """RMSNorm @ weight.T + bias, [T, N], for at most MOST_ROWS rows. weight: [N, K], K a multiple of 64, or a quantised
    one that few_rows_layers.py reads. shape: how it is read then; None: in the best way that is known."""
    num_rows, depth = x.scaled.shape
    stored = tensors_of(weight)
    size, num_parts = stored[0].shape[0], x.squares.shape[1]
    out = torch.empty((num_rows, size), dtype=x.scaled.dtype, device=x.scaled.device)
    if num_rows == 1 and shape is None and size <= _MOST_OF_ROW and adds_up(weight):
        _normed_row(x, eps, weight, bias, out, chained)
        return out
    cut = _cut(weight, num_rows, size, depth, shape)
    normed_linear_kernel[(size // cut.columns,)](
        in_input_order(x.scaled, weight),
        x.squares,
        *stored,
        bias,
        out,
        num_rows,
        num_parts,
        eps,
        size,
        depth,
        bias is not None,
        cut.rows,
        cut.columns,
        cut.depth,
        cut.early,
        triton.next_power_of_2(num_parts),
        chained,
        cut.reading,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **launch_options(chained),
    )
    return out


def adding_linear(
    x: Tensor,
    weight: Tensor | Weight,
    bias: Tensor | None,
    residual: Tensor,
    norm: RMSNorm,
    chained: bool,
    shape: Shape | None = None,
) -> tuple[Tensor, Normed]:
    """(residual + x @ weight.T + bias, [T, N], and its norm) for at most MOST_ROWS rows. x: [T, K] contiguous. weight,
    shape: see normed_linear."""
    num_rows, depth = x.shape
    stored = tensors_of(weight)
    size = stored[0].shape[0]
    if num_rows == 1 and shape is None and adds_up(weight):
        return _adding_row(x, weight, bias, residual, norm, chained)
    cut = _cut(weight, num_rows, size, depth, shape)
    sums, normed = open_normed(residual, num_rows, size, cut.columns)
    adding_linear_kernel[(size // cut.columns,)](
        in_input_order(x, weight),
        *stored,
        bias,
        residual,
        norm.weight,
        sums,
        *normed,
        num_rows,
        size,
        depth,
        bias is not None,
        cut.rows,
        cut.columns,
        cut.depth,
        cut.early,
        chained,
        cut.reading,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **launch_options(chained),
    )
    return sums, normed


def gated_linear(
    x: Normed,
    eps: float,
    weight: Tensor | Weight,
    bias: Tensor | None,
    activation: str,
    chained: bool,
    shape: Shape | None = None,
) -> Tensor:
    """activation(RMSNorm @ gate.T) * (RMSNorm @ up.T), [T, F], for at most MOST_ROWS rows. weight: [2 F, K], gate
    before up. weight, shape: see normed_linear."""
    num_rows, depth = x.scaled.shape
    stored = tensors_of(weight)
    size, num_parts = stored[0].shape[0] // 2, x.squares.shape[1]
    out = torch.empty((num_rows, size), dtype=x.scaled.dtype, device=x.scaled.device)
    if num_rows == 1 and shape is None and adds_up(weight):
        _gated_row(x, eps, weight, bias, activation, out, chained)
        return out
    cut = _cut_gated(weight, num_rows, size, depth, shape)
    gated_kernel[(size // cut.columns,)](
        in_input_order(x.scaled, weight),
        x.squares,
        *stored,
        bias,
        out,
        num_rows,
        num_parts,
        eps,
        size,
        depth,
        ACTIVATIONS[activation],
        bias is not None,
        cut.rows,
        cut.columns,
        cut.depth,
        cut.early,
        triton.next_power_of_2(num_parts),
        chained,
        cut.reading,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **launch_options(chained),
    )
    return out


# --- the same of one row ---------------------------------------------------------------------------------------


class RowCut(NamedTuple):
    """How a product of one row is cut, and how a program reads its weight."""

    columns: int
    """Of a program."""
    depth: int
    """Of a bfloat16 weight, that a program reads at a time, at most."""
    early: int
    """Times that depth, that it reads while the kernel ahead still runs."""
    stages: int
    """Parts of that depth that are on their way at a time."""
    warps: int = 4
    registers: int | None = None
    """Of a thread, at most."""

    def fitted(self, weight: Tensor) -> "RowCut":
        """To a weight: about as many bytes on their way."""
        depth, early = weight.shape[1], self.early
        block = depth_block(depth, self.depth * 2 // weight.itemsize)
        while early > 1 and depth < 2 * early * block:
            early //= 2
        return self._replace(
            depth=block,
            early=early,
            stages=min(self.stages * self.depth * 2 // (block * weight.itemsize), _MOST_STAGES),
        )


_MOST_STAGES = 8
NORMED_ROW = RowCut(columns=16, depth=256, early=1, stages=7)
ADDING_ROW = RowCut(columns=16, depth=256, early=2, stages=7)
GATED_ROW = RowCut(columns=8, depth=256, early=1, stages=5)
NORMED_INT4 = RowCut(columns=16, depth=256, early=1, stages=7)
ADDING_INT4 = RowCut(columns=16, depth=256, early=1, stages=7)
GATED_INT4 = RowCut(columns=8, depth=256, early=1, stages=5)
_MOST_OF_ROW = 32768
"""Columns of a product that these kernels make. With 128 256 of them, a head, one takes 273 us of an H200 and tensor
cores 253."""


def adds_up(weight: Tensor | Weight) -> bool:
    """Whether the kernels of one row read it: one that lies in the model's dtype, in int4, or with one scale a row."""
    if isinstance(weight, Tensor) or weight.format.storage == "int4":
        return True
    form = weight.format
    whole = form.group is None and form.rows == 1 and not form.zeros and weight.permutation is None
    return whole and (form.storage == "int8" or (form.storage == "e4m3" and _has_e4m3()))


def _has_e4m3() -> bool:
    """Whether Triton converts the type for this device: SM80 has none. What can chain kernels has it."""
    return triton.knobs.runtime.interpret or can_chain()


def _normed_row(
    x: Normed, eps: float, weight: Tensor | Weight, bias: Tensor | None, out: Tensor, chained: bool
) -> None:
    stored, depth, num_parts = tensors_of(weight), x.scaled.shape[1], x.squares.shape[1]
    reading = packed(weight, depth)
    cut = (NORMED_ROW if reading is None else NORMED_INT4).fitted(stored[0])
    normed_row_kernel[(out.shape[1] // cut.columns,)](
        in_input_order(x.scaled, weight),
        x.squares,
        *stored,
        bias,
        out,
        num_parts,
        eps,
        depth,
        cut.columns,
        cut.depth,
        cut.depth * cut.early,
        cut.stages,
        triton.next_power_of_2(num_parts),
        chained,
        reading,
        num_warps=cut.warps,
        maxnreg=cut.registers,
        **launch_options(chained),
    )


def _adding_row(
    x: Tensor, weight: Tensor | Weight, bias: Tensor | None, residual: Tensor, norm: RMSNorm, chained: bool
) -> tuple[Tensor, Normed]:
    stored, depth, size = tensors_of(weight), x.shape[1], residual.shape[1]
    reading = packed(weight, depth)
    cut = (ADDING_ROW if reading is None else ADDING_INT4).fitted(stored[0])
    sums, normed = open_normed(residual, 1, size, cut.columns)
    adding_row_kernel[(size // cut.columns,)](
        in_input_order(x, weight),
        *stored,
        bias,
        residual,
        norm.weight,
        sums,
        *normed,
        depth,
        cut.columns,
        cut.depth,
        cut.depth * cut.early,
        cut.stages,
        chained,
        reading,
        num_warps=cut.warps,
        maxnreg=cut.registers,
        **launch_options(chained),
    )
    return sums, normed


def _gated_row(
    x: Normed,
    eps: float,
    weight: Tensor | Weight,
    bias: Tensor | None,
    activation: str,
    out: Tensor,
    chained: bool,
) -> None:
    stored, size, depth, num_parts = tensors_of(weight), out.shape[1], x.scaled.shape[1], x.squares.shape[1]
    reading = packed(weight, depth)
    cut = (GATED_ROW if reading is None else GATED_INT4).fitted(stored[0])
    gated_row_kernel[(size // cut.columns,)](
        in_input_order(x.scaled, weight),
        x.squares,
        *stored,
        bias,
        out,
        num_parts,
        eps,
        size,
        depth,
        ACTIVATIONS[activation],
        cut.columns,
        cut.depth,
        cut.depth * cut.early,
        cut.stages,
        triton.next_power_of_2(num_parts),
        chained,
        reading,
        num_warps=cut.warps,
        maxnreg=cut.registers,
        **launch_options(chained),
    )


# --- heads -----------------------------------------------------------------------------------------------------


def norm_queries_and_keys(
    qkv: Tensor, q_norm: RMSNorm, k_norm: RMSNorm, q_size: int, k_size: int, chained: bool
) -> None:
    """RMSNorm of queries and keys in place: of each head or of all at once, as wide as the weights are. qkv: [T, N],
    q_size columns of queries, k_size of keys, then values."""
    assert q_norm.weight is not None, "few_rows_layers.py lets no other through"
    assert k_norm.weight is not None, "few_rows_layers.py lets no other through"
    q_width, k_width = q_norm.weight.shape[0], k_norm.weight.shape[0]
    block = triton.next_power_of_2(max(q_width, k_width))
    num_queries = q_size // q_width
    norm_heads_kernel[(qkv.shape[0], num_queries + k_size // k_width)](
        qkv,
        q_norm.weight,
        k_norm.weight,
        qkv.stride(0),
        num_queries,
        q_width,
        k_width,
        q_norm.eps,
        block,
        chained,
        num_warps=1 if block <= 256 else 8,
        **launch_options(chained),
    )
