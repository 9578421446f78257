"""Which format a layer's weight can have, given that it is made of some rows and columns of a stored one.

Owns that answer. A rank's part of a row may begin inside a group, padded heads move columns, and a rotation's order
moves rows: scales must still belong to neighbours. Called by the blocks when they are built, so that a layer's format
never depends on what a file holds; arranging.py then brings a stored weight into the format that was found here.
"""

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from graphgen.models.orders import EMPTY, Order, is_identity
from graphgen.models.spec.formats import LEAST_GROUP, LinearFormat


def fitted(
    format: LinearFormat | None,
    rows: Order | None = None,
    parts: Sequence[int] = (),
    columns: Order | None = None,
    num_columns: int = 0,
) -> LinearFormat | None:
    """The format nearest to a stored weight's that loses nothing of it; None: it has to be dequantised.

    rows, columns: what the layer has of those that are stored; None: all in their order. parts: rows of each of the
    stored tensors that `rows` counts through. num_columns: that are stored.
    """
    if format is None:
        return None
    if columns is not None and not is_identity(columns, num_columns):
        if format.permuted or (format.storage == "int4" and len(columns) % 2):
            return None
        if format.group is not None:
            group = common_group(columns, format.group)
            if group is None:
                return None
            format = replace(format, group=group)
    if format.rows > 1 and rows is not None and not _keeps_blocks(rows, parts, format.rows):
        return replace(format, rows=1)  # a scale for each row and group
    return format


def common_group(columns: Order, stored: int) -> int | None:
    """Columns of the widest group of the layer's whose elements lie in one group of `stored` columns each."""
    group = stored
    while group >= LEAST_GROUP:
        if source_groups(columns, group, stored) is not None:
            return group
        if group % 2:
            break
        group //= 2
    return None


def source_groups(columns: Order, group: int, stored: int) -> Order | None:
    """Of each group of the layer's columns, the stored one; None where one has elements of several. A group of empty
    columns alone takes any."""
    sources = np.where(columns == EMPTY, EMPTY, columns // stored)
    padded = np.append(sources, np.full(-len(columns) % group, EMPTY)).reshape(-1, group)
    most = padded.max(axis=1)
    agrees = (padded == EMPTY) | (padded == most[:, None])
    return np.maximum(most, 0) if agrees.all() else None


def _keeps_blocks(rows: Order, parts: Sequence[int], block: int) -> bool:
    """Whether every block of the layer's rows lies in one block of one stored tensor. No block spans two of them."""
    starts = np.cumsum([0, *parts])
    if any(part % block for part in parts[:-1]):
        return False
    owners = np.searchsorted(starts, rows, side="right") - 1
    inside = rows - starts[owners]
    blocks = np.where(rows == EMPTY, EMPTY, owners * (int(starts[-1]) + 1) + inside // block)
    padded = np.append(blocks, np.full(-len(rows) % block, EMPTY)).reshape(-1, block)
    return bool(((padded == EMPTY) | (padded == padded.max(axis=1, keepdims=True))).all())
