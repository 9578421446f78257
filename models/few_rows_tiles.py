"""How the products of few_rows.py with a quantised weight are cut among programs.

Owns the table of it; few_rows.py cuts products of weights that are not quantised, few_rows_layers.py says which weights
the kernels read. Times: benchmarks/linear.py.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from graphgen.models.few_rows_layers import LEAST_DEPTH
from graphgen.models.few_rows_weights import E4M3, INT4, INT8, Reading
from graphgen.models.formats.products import Weight
from graphgen.models.spec.formats import PACKED_BLOCK

STORAGES = {"e4m3": E4M3.value, "int8": INT8.value, "int4": INT4.value}
"""Their numbers in the kernels."""


class Cut(NamedTuple):
    """How a product is cut, and how a program reads its weight."""

    rows: int
    """Of a program; those beyond the step's are computed and dropped."""
    columns: int
    """Of a program. Where gate and up are one product it makes as many of both."""
    depth: int
    """Columns of the weight, that a program reads in one turn."""
    early: int
    """Of these, how many it reads while the kernel ahead still runs: 0 or `depth`."""
    warps: int
    stages: int
    """Turns whose parts of the weight are on their way at a time."""
    reading: Reading | None
    """None: the weight is no quantised one."""


class Shape(NamedTuple):
    """What is tuned of a Cut; the rest follows from the weight."""

    columns: int
    turn: int
    """Columns of the weight that a slice reads in one turn."""
    slices: int
    """See Reading.slices; 0 has `warps` warps."""
    warps: int
    stages: int
    early: bool
    conversion: int = 1


_SLICED = Shape(columns=32, turn=128, slices=4, warps=4, stages=5, early=True)
_SLICED_INT4 = _SLICED._replace(stages=6)
_WHOLE = Shape(columns=64, turn=128, slices=0, warps=4, stages=5, early=False)

SHAPES: dict[tuple[str, bool, int], Shape] = {
    ("e4m3", False, 8): _SLICED,
    ("e4m3", False, 16): _SLICED._replace(stages=4),
    ("e4m3", False, 64): _WHOLE,
    ("e4m3", True, 8): _SLICED._replace(columns=16),
    ("e4m3", True, 16): _SLICED._replace(columns=16, stages=4),
    ("e4m3", True, 64): _WHOLE,
    ("int8", False, 8): _SLICED,
    ("int8", False, 16): _SLICED._replace(stages=4),
    ("int8", False, 64): _WHOLE,
    ("int8", True, 8): _SLICED._replace(columns=16),
    ("int8", True, 16): _SLICED._replace(columns=16, stages=4),
    ("int8", True, 64): _WHOLE,
    ("int4", False, 8): _SLICED_INT4,
    ("int4", False, 16): _SLICED_INT4._replace(stages=5),
    ("int4", False, 64): _WHOLE,
    ("int4", True, 8): _SLICED_INT4._replace(columns=16),
    ("int4", True, 16): _SLICED_INT4._replace(columns=16, stages=5),
    ("int4", True, 64): _WHOLE,
}
"""(storage, whether gate and up are one product, rows of a program) -> what is best."""


def tensors_of(weight: Tensor | Weight) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(weight, scales, zeros) as the kernels take them."""
    if isinstance(weight, Tensor):
        return weight, None, None
    # Of e4m3 the bytes: SM80 has no type of that name.
    codes = weight.codes.view(torch.uint8) if weight.format.storage == "e4m3" else weight.codes
    return codes, weight.scale, weight.zeros


def in_input_order(x: Tensor, weight: Tensor | Weight) -> Tensor:
    """The columns of x as the weight's are."""
    if isinstance(weight, Tensor) or weight.permutation is None:
        return x
    return x.index_select(1, weight.permutation)


def depth_block(depth: int, most: int = 128) -> int:
    """Columns of a weight that a program reads at a time: the most that divide the depth."""
    return next(block for block in (most, most // 2, most // 4, LEAST_DEPTH) if depth % block == 0)


def cut_stored(
    weight: Weight, num_rows: int, num_columns: int, depth: int, paired: bool, shape: Shape | None = None
) -> Cut:
    """The cut of a product [num_rows, num_columns] over `depth` columns of a quantised weight that is nearest to a
    shape and fits. paired: see Cut.columns. shape: None takes that of the table."""
    rows, form = 8 if num_rows <= 8 else 16 if num_rows <= 16 else 64, weight.format
    shape = shape or SHAPES[form.storage, paired, rows]
    slices = shape.slices
    while slices > 1 and depth % (slices * shape.turn):
        slices //= 2
    slices = 0 if slices <= 1 else slices
    rows = rows if slices else max(rows, 16)
    turn = shape.turn if depth % (shape.turn * (slices or 1)) == 0 else PACKED_BLOCK
    most_bytes = PACKED_BLOCK // 2 if form.storage == "int4" else turn
    tile_bytes = min(form.group or most_bytes, most_bytes)
    one_tile = tile_bytes * (2 if form.storage == "int4" else 1) == turn
    columns = shape.columns
    while num_columns % columns:
        columns //= 2
    reading = Reading(
        STORAGES[form.storage],
        0 if form.group is None or form.group >= depth else form.group,
        form.rows,
        form.zeros,
        turn * (slices or 1),
        tile_bytes,
        0 if triton.knobs.runtime.interpret else shape.conversion,
        slices,
    )
    early = reading.depth if shape.early and one_tile else 0
    return Cut(rows, columns, reading.depth, early, slices or shape.warps, shape.stages, reading)
