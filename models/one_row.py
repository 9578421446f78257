"""few_rows.py for a step of one row: the same products, by kernels that leave the tensor cores alone. CUDA only."""

from typing import NamedTuple

import triton
from torch import Tensor

from graphgen.models.chaining import can_chain, launch_options
from graphgen.models.collectives.exchange import Meeting, meeting_sizes, meeting_tensors
from graphgen.models.few_rows_layers import IN_KERNELS
from graphgen.models.few_rows_tiles import depth_block, in_input_order, tensors_of
from graphgen.models.formats.products import Weight
from graphgen.models.normed import Normed, open_normed
from graphgen.models.norms import RMSNorm
from graphgen.models.one_row_int4 import packed
from graphgen.models.one_row_kernels import adding_row_kernel, gated_row_kernel, normed_row_kernel


class RowCut(NamedTuple):
    """How a product of one row is cut, and how a program reads its weight."""

    columns: int
    """Of a program."""
    depth: int
    """Of a bfloat16 weight, that a program reads at a time, at most; of int4 a byte of a row is one."""
    early: int
    """Times that depth, that it reads while the kernel ahead still runs; of int4: once."""
    stages: int
    """Parts of that depth that are on their way at a time; of int4: beside the one that is multiplied, one in registers
    and the others into the L2 cache."""
    warps: int = 4

    def fitted(self, weight: Tensor, is_int4: bool) -> "RowCut":
        """To a weight: about as many bytes on their way."""
        depth, early = weight.shape[1], self.early
        if is_int4:
            block, warps = self.depth, self.warps
            while warps > 1 and -(-depth // block) * block > _MOST_PADDED * depth:
                block, warps = block // 2, warps // 2
            return self._replace(depth=block, warps=warps)
        block = depth_block(depth, self.depth * 2 // weight.itemsize)
        while early > 1 and depth < 2 * early * block:
            early //= 2
        return self._replace(
            depth=block,
            early=early,
            stages=min(self.stages * self.depth * 2 // (block * weight.itemsize), _MOST_STAGES),
        )


_MOST_STAGES = 8
_MOST_PADDED = 1.15
"""Bytes of a row in int4 that the parts of it have room for, for each that it has."""
NORMED_ROW = RowCut(columns=16, depth=256, early=1, stages=7)
ADDING_ROW = RowCut(columns=16, depth=256, early=2, stages=7)
GATED_ROW = RowCut(columns=8, depth=256, early=1, stages=5)
NORMED_INT4 = RowCut(columns=8, depth=1024, early=1, stages=1, warps=2)
ADDING_INT4 = RowCut(columns=16, depth=2048, early=1, stages=1)
GATED_INT4 = RowCut(columns=4, depth=1024, early=1, stages=1, warps=2)
MOST_OF_ROW = 32768
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


def normed_row(x: Normed, eps: float, weight: Tensor | Weight, bias: Tensor | None, out: Tensor, chained: bool) -> None:
    stored, depth, num_parts = tensors_of(weight), x.scaled.shape[1], x.squares.shape[1]
    reading = packed(weight, depth)
    cut = (NORMED_ROW if reading is None else NORMED_INT4).fitted(stored[0], reading is not None)
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
        **launch_options(chained),
    )


def adding_row(
    x: Tensor,
    weight: Tensor | Weight,
    bias: Tensor | None,
    residual: Tensor,
    norm: RMSNorm,
    meeting: Meeting | None,
    chained: bool,
) -> tuple[Tensor, Normed]:
    stored, depth, size = tensors_of(weight), x.shape[1], residual.shape[1]
    reading = packed(weight, depth)
    cut = (ADDING_ROW if reading is None else ADDING_INT4).fitted(stored[0], reading is not None)
    sums, normed = open_normed(residual, 1, size, cut.columns)
    adding_row_kernel[(size // cut.columns,)](
        in_input_order(x, weight),
        *stored,
        bias,
        residual,
        norm.weight,
        sums,
        *normed,
        *meeting_tensors(meeting),
        size,
        depth,
        cut.columns,
        cut.depth,
        cut.depth * cut.early,
        cut.stages,
        chained,
        reading,
        *meeting_sizes(meeting),
        num_warps=cut.warps,
        **launch_options(chained),
    )
    return sums, normed


def gated_row(
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
    cut = (GATED_ROW if reading is None else GATED_INT4).fitted(stored[0], reading is not None)
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
        IN_KERNELS[activation],
        cut.columns,
        cut.depth,
        cut.depth * cut.early,
        cut.stages,
        triton.next_power_of_2(num_parts),
        chained,
        reading,
        num_warps=cut.warps,
        **launch_options(chained),
    )
