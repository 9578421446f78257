"""Rows or columns of a weight in an order: which of a stored tensor's they are. Used wherever weights are arranged."""

import numpy as np
import torch
from torch import Tensor

Order = np.ndarray[tuple[int], np.dtype[np.int64]]
"""Of each row or column of a weight: the stored one, or EMPTY."""

EMPTY = -1
"""In an order: a place that no stored row or column fills. It is zero."""


def is_identity(order: Order, num_stored: int) -> bool:
    """Whether it is all of them as they are stored."""
    return len(order) == num_stored and np.array_equal(order, np.arange(num_stored))


def taken(stored: Tensor, order: Order, dim: int, empty: int = 0) -> Tensor:
    """The stored rows (dim 0) or columns in that order. empty: what fills places that no stored one does."""
    index = torch.from_numpy(order).to(stored.device)
    found = stored.index_select(dim, index.clamp(min=0))
    return found.index_fill_(dim, (index == EMPTY).nonzero().flatten(), empty)
