"""What a kernel of few rows leaves of the residual stream for the next one: the sums, and their norm begun.

Called by few_rows.py, one_row.py and experts/few_rows.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Normed(NamedTuple):
    """RMSNorm of rows, but for the division by the root mean square, which falls to the reader."""

    scaled: Tensor
    """[T, hidden]: the rows times the norm's weight."""
    squares: Tensor
    """[T, parts] float32: sums of the squares of the rows, each over a part of the columns."""


def open_normed(like: Tensor, num_rows: int, size: int, block: int) -> tuple[Tensor, Normed]:
    """Where a kernel that ends in the residual stream writes: (sums, their norm). block: columns of a program."""
    sums, scaled = (torch.empty((num_rows, size), dtype=like.dtype, device=like.device) for _ in range(2))
    squares = torch.empty((num_rows, size // block), dtype=torch.float32, device=like.device)
    return sums, Normed(scaled, squares)
