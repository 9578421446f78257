"""The parts of a layer over a few token rows: Triton kernels, each launched while the one ahead still runs. CUDA only.

With a few rows a step does little but read weights, and what it loses is the time between kernels, when memory is
idle: the smallest product reads for 8 us and takes 12. Here every kernel is launched under its predecessor
(programmatic dependent launch) and waits inside for its data, gate, up and activation are one kernel, and the norms
have none of their own: the division by a row's root mean square comes after the product that reads the row.

The arithmetic of layers.py, but that the norm rounds once where layers.py rounds twice. Owns no weights. Called by
few_rows_step.py, which puts them in order; experts/few_rows.py has those of experts.
"""

import torch
import triton
from torch import Tensor

from graphgen.models.chaining import launch_options
from graphgen.models.collectives.exchange import (
    NUMBERS_OF_A_STEP,
    Exchange,
    Meeting,
    meeting_sizes,
    meeting_tensors,
)
from graphgen.models.few_rows_kernels import (
    adding_linear_kernel,
    embed_kernel,
    gated_kernel,
    norm_heads_kernel,
    normed_linear_kernel,
)
from graphgen.models.few_rows_layers import IN_KERNELS, LEAST_COLUMNS
from graphgen.models.few_rows_tiles import Cut, Shape, cut_stored, depth_block, in_input_order, tensors_of
from graphgen.models.formats.products import Weight
from graphgen.models.normed import Normed, open_normed
from graphgen.models.norms import RMSNorm
from graphgen.models.one_row import MOST_OF_ROW, adding_row, adds_up, gated_row, normed_row

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


def embed(token_ids: Tensor, table: Tensor, norm: RMSNorm, exchange: Exchange | None = None) -> tuple[Tensor, Normed]:
    """(rows of the table, [T, hidden], and their norm). token_ids: [T] int64. exchange: whose sums of the step begin
    behind this."""
    num_rows, size = token_ids.shape[0], table.shape[1]
    block = _column_block(size)
    sums, normed = open_normed(table, num_rows, size, block)
    embed_kernel[(size // block,)](
        token_ids,
        table,
        norm.weight,
        sums,
        *normed,
        None if exchange is None else exchange.numbers,
        num_rows,
        NUMBERS_OF_A_STEP,
        size,
        _row_block(num_rows),
        block,
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
    if num_rows == 1 and shape is None and size <= MOST_OF_ROW and adds_up(weight):
        normed_row(x, eps, weight, bias, out, chained)
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
    meeting: Meeting | None = None,
) -> tuple[Tensor, Normed]:
    """(residual + x @ weight.T + bias, [T, N], and its norm) for at most MOST_ROWS rows. x: [T, K] contiguous. weight,
    shape: see normed_linear. meeting: of ranks, the sum of whose products is added."""
    num_rows, depth = x.shape
    stored = tensors_of(weight)
    size = stored[0].shape[0]
    if num_rows == 1 and shape is None and adds_up(weight):
        return adding_row(x, weight, bias, residual, norm, meeting, chained)
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
        *meeting_tensors(meeting),
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
        *meeting_sizes(meeting),
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
        gated_row(x, eps, weight, bias, activation, out, chained)
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
        IN_KERNELS[activation],
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
