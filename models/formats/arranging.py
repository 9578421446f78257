"""From a stored quantised weight to some of its rows and columns, in the format that fitting.py found for them.

Owns that way, which changes no value: codes are moved, scales are moved and repeated. Called by targets.py.
"""

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from graphgen.models.formats.fitting import source_groups
from graphgen.models.formats.layout import ZERO_CODES, Quantised, scale_shape
from graphgen.models.orders import EMPTY, Order, taken
from graphgen.models.spec.formats import LinearFormat


def arranged_quantised(stored: Quantised, format: LinearFormat, rows: Order, columns: Order) -> Quantised:
    """rows, columns: of the stored weight, or EMPTY. Raises ValueError where `stored` is in a format of which `format`
    is no arrangement, or where blocks of rows would have several scales."""
    given = stored.format
    if replace(given, group=format.group, rows=format.rows) != format or (given.group is None) != (
        format.group is None
    ):
        raise ValueError(f"a weight in {given.name} is to become one in {format.name}")
    codes = _moved(stored.codes, rows, columns, ZERO_CODES[format.storage])
    scale = _arranged_scale(stored.scale, stored, format, rows, columns)
    zeros = stored.zeros
    if zeros is not None:
        # Elements that nothing fills are worth nothing: their code is their zero.
        zeros = _arranged_scale(zeros, stored, format, rows, columns)
        empty = torch.from_numpy((rows == EMPTY)[:, None] | (columns == EMPTY)[None, :]).to(codes.device)
        made = Quantised(format, codes, scale, zeros)
        codes = torch.where(empty, made.spread(zeros), codes)
    return Quantised(format, codes, scale, zeros, stored.permutation)


def _moved(codes: Tensor, rows: Order, columns: Order, empty: int) -> Tensor:
    bits = codes.view(torch.uint8)  # e4m3 has no index_select
    num_rows, num_columns = bits.shape
    if not np.array_equal(rows, np.arange(num_rows)):
        bits = taken(bits, rows, 0, empty)
    if not np.array_equal(columns, np.arange(num_columns)):
        bits = taken(bits, columns, 1, empty)
    return bits.view(codes.dtype)


def _arranged_scale(values: Tensor, stored: Quantised, format: LinearFormat, rows: Order, columns: Order) -> Tensor:
    """Scales or zeros of the rows and groups that the layer has."""
    given = stored.format
    values = taken(values, np.where(rows == EMPTY, EMPTY, rows // given.rows), 0)
    if given.group is not None and format.group is not None:
        groups = source_groups(columns, format.group, given.group)
        if groups is None:
            raise ValueError(f"groups of {given.group} columns cannot be cut into such of {format.group}")
        values = taken(values, groups, 1)
    if format.rows == 1:
        return values
    shape = scale_shape(format, len(rows), len(columns))
    first = values[:: format.rows]
    blocks = first.repeat_interleave(format.rows, dim=0)[: len(rows)]
    empty = torch.from_numpy(rows == EMPTY).to(values.device)[:, None]
    if not torch.equal(torch.where(empty, blocks, values), blocks):
        raise ValueError(f"blocks of {format.rows} rows have several scales once the rows are in the layer's order")
    assert first.shape == shape
    return first
