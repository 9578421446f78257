"""From a tensor as a checkpoint stores it to the weight that it fills.

Owns the ways in which a weight's rows and columns are taken from a stored tensor: in another order, in part,
transposed, with zeros between them. Never reads a file and knows no family. The blocks of layers.py say with these
words which tensors they take; loader.py fills them."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from graphgen.models.formats.arranging import arranged_quantised
from graphgen.models.formats.layout import Quantised, dequantised
from graphgen.models.formats.linear import Linear, LinearStack, StoredWeight
from graphgen.models.formats.quantise import quantised
from graphgen.models.orders import EMPTY, Order, is_identity, taken
from graphgen.models.spec import GQA, RopeSpec
from graphgen.models.spec.formats import LinearFormat

Arrange = Callable[[Tensor], Tensor]
"""A stored tensor -> one of the weight's shape."""


Stored = Tensor | Quantised
"""A tensor as a checkpoint has it, or a weight whose tensors in a checkpoint mean one."""


class Target(NamedTuple):
    """What becomes of one stored tensor. One that is quantised and that no format takes is dequantised."""

    weight: Tensor | None  # all of a weight or some of its rows; None: another rank's
    shape: tuple[int, ...]  # as it is stored
    arrange: Arrange | None = None  # None: it lies as the weight does

    def fill(self, stored: Stored) -> None:
        if self.weight is not None:
            self.weight.copy_(self.as_weight(stored))

    def holds(self, stored: Stored) -> bool:
        """Whether the weight is filled with this tensor."""
        return self.weight is None or torch.equal(self.as_weight(stored).to(self.weight), self.weight)

    def as_weight(self, stored: Stored) -> Tensor:
        """The tensor as the weight lies, in its stored dtype."""
        if isinstance(stored, Quantised):
            stored = dequantised(stored, torch.float32 if self.weight is None else self.weight.dtype)
        return stored if self.arrange is None else self.arrange(stored)

    @property
    def num_bytes(self) -> int:
        return 0 if self.weight is None else self.weight.nbytes


class FormatTarget(NamedTuple):
    """The same of a weight that has a format in memory: a stored tensor is quantised some rows at a time, a stored
    quantised weight is arranged."""

    linear: StoredWeight
    format: LinearFormat
    first_row: int  # of the layer's
    shape: tuple[int, ...]  # of a tensor as it is stored
    rows: Order
    columns: Order
    transposed: bool

    def fill(self, stored: Stored) -> None:
        if isinstance(stored, Quantised):
            self.linear.fill(self.first_row, arranged_quantised(stored, self.format, self.rows, self.columns))
            return
        step = self._slab_rows
        for first in range(0, len(self.rows), step):
            self.linear.fill(self.first_row + first, self._quantised(stored, self.rows[first : first + step]))

    def holds(self, stored: Stored) -> bool:
        """Whether the layer's rows are filled with this."""
        held = self.linear.rows(self.first_row, len(self.rows))
        if isinstance(stored, Quantised):
            return held.equals(arranged_quantised(stored, self.format, self.rows, self.columns))
        return held.equals(self._quantised(stored, self.rows))

    @property
    def num_bytes(self) -> int:
        return self.format.num_bytes(len(self.rows), len(self.columns))

    @property
    def _slab_rows(self) -> int:
        blocks = _SLAB_ELEMENTS // (len(self.columns) * self.format.rows)
        return max(1, blocks) * self.format.rows

    def _quantised(self, stored: Tensor, rows: Order) -> Quantised:
        matrix = stored.t() if self.transposed else stored
        own = taken(matrix, rows, 0)
        return quantised(
            own if is_identity(self.columns, matrix.shape[1]) else taken(own, self.columns, 1), self.format
        )


class StackTarget(NamedTuple):
    """Of a stored tensor [E, ...]: what each of its parts fills."""

    parts: tuple[Target | FormatTarget, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    def fill(self, stored: Stored) -> None:
        for part, own in zip(self.parts, self._apart(stored), strict=True):
            part.fill(own)

    def holds(self, stored: Stored) -> bool:
        """See Target."""
        return all(part.holds(own) for part, own in zip(self.parts, self._apart(stored), strict=True))

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    @staticmethod
    def _apart(stored: Stored) -> Sequence[Tensor]:
        assert isinstance(stored, Tensor), "a quantised weight has two dimensions"
        return stored.unbind()


_SLAB_ELEMENTS = 2**23
"""Quantised at a time, of which there are several copies in float32 meanwhile."""

AnyTarget = Target | FormatTarget | StackTarget

Targets = Iterator[tuple[str, AnyTarget]]
"""(name in the checkpoint, target)"""


class Piece(NamedTuple):
    """A stored tensor that fills some rows of a linear layer."""

    name: str  # without ".weight" or ".bias"
    first_row: int  # of the layer's
    num_stored: int  # rows
    order: Order  # of the layer's rows from `first_row` on


def pieces_of(names: Sequence[str], rows: Order, stored: Sequence[int], held: Sequence[int]) -> list[Piece]:
    """A fused layer whose parts, q, k and v or gate and up, are one stored tensor or one each.

    rows: of all of the layer's rows, the stored ones being counted through all parts. stored: rows of each part in the
    checkpoint. held: rows of each part in the layer.
    """
    if len(names) == 1:
        return [Piece(names[0], 0, sum(stored), rows)]
    pieces, first, first_stored = [], 0, 0
    for name, num_stored, num_held in zip(names, stored, held, strict=True):
        own = rows[first : first + num_held]
        pieces.append(Piece(name, first, num_stored, np.where(own == EMPTY, EMPTY, own - first_stored)))
        first, first_stored = first + num_held, first_stored + num_stored
    return pieces


def row_parallel_targets(
    name: str, linear: Linear, columns: Order, num_stored: int, bias: bool, transposed: bool
) -> Targets:
    """A layer that reads what a rank's part of another made. columns: of `num_stored` that the checkpoint has. bias:
    whether one is stored, though only the first rank adds it."""
    piece = Piece(name, 0, linear.out_features, np.arange(linear.out_features))
    yield from linear_targets(linear, [piece], (num_stored, columns), transposed)
    if bias and linear.bias is None:
        yield f"{name}.bias", Target(None, (linear.out_features,))


def linear_targets(
    linear: Linear,
    pieces: Sequence[Piece],
    columns: tuple[int, Order] | None = None,
    transposed: bool = False,
) -> Targets:
    """The weight, and the bias where the layer has one. columns: (how many are stored, which of them the
    layer has). transposed: stored as [in, out]."""
    num_columns, column_order = columns or (linear.in_features, np.arange(linear.in_features))
    for name, first, num_stored, order in pieces:
        rows = slice(first, first + len(order))
        shape = (num_columns, num_stored) if transposed else (num_stored, num_columns)
        if linear.format is None:
            arrange = arranged(order, num_stored, column_order, num_columns, transposed)
            yield f"{name}.weight", Target(linear.weight.data[rows], shape, arrange)
        else:
            yield (
                f"{name}.weight",
                FormatTarget(linear, linear.format, first, shape, order, column_order, transposed),
            )
        if linear.bias is not None:
            yield f"{name}.bias", Target(linear.bias.data[rows], (num_stored,), arranged(order, num_stored))


def stacked_targets(
    stack: LinearStack,
    pieces: Sequence[Piece],
    columns: tuple[int, Order] | None = None,
    transposed: bool = False,
) -> Targets:
    """Matrices of experts. A piece whose name has `{expert}` is a stored tensor of each, another one is stored stacked,
    [E, rows, columns]. columns, transposed: see linear_targets."""
    num_columns, column_order = columns or (stack.in_features, np.arange(stack.in_features))
    for name, first, num_stored, order in pieces:
        shape = (num_columns, num_stored) if transposed else (num_stored, num_columns)
        own: list[Target | FormatTarget] = []
        for expert in range(stack.count):
            row = expert * stack.each_rows + first
            if stack.format is None:
                arrange = arranged(order, num_stored, column_order, num_columns, transposed)
                own.append(Target(stack.weight.data[row : row + len(order)], shape, arrange))
            else:
                own.append(FormatTarget(stack, stack.format, row, shape, order, column_order, transposed))
        yield from _of_experts(name, own)


def stacked_bias_targets(bias: Tensor, pieces: Sequence[Piece]) -> Targets:
    """The same of biases, [E, rows]."""
    for name, first, num_stored, order in pieces:
        arrange = arranged(order, num_stored)
        rows = slice(first, first + len(order))
        yield from _of_experts(name, [Target(own[rows], (num_stored,), arrange) for own in bias])


def _of_experts(name: str, own: "Sequence[Target | FormatTarget]") -> Targets:
    """own: of each expert."""
    if "{expert}" not in name:
        yield name, StackTarget(tuple(own))
        return
    for expert, target in enumerate(own):
        yield name.format(expert=expert), target


def in_turn(*steps: Arrange | None) -> Arrange | None:
    """One after the other; None does nothing."""
    present = [step for step in steps if step is not None]
    if len(present) < 2:
        return present[0] if present else None

    def arrange(stored: Tensor) -> Tensor:
        for step in present:
            stored = step(stored)
        return stored

    return arrange


def arranged(
    rows: Order,
    num_rows: int,
    columns: Order | None = None,
    num_columns: int = 0,
    transposed: bool = False,
) -> Arrange | None:
    """Takes rows, and columns of a matrix, in an order; None where that is the stored one. num_rows, num_columns: as
    they are stored."""
    return in_turn(
        torch.t if transposed else None,
        None if is_identity(rows, num_rows) else lambda stored: taken(stored, rows, 0),
        None if columns is None or is_identity(columns, num_columns) else lambda stored: taken(stored, columns, 1),
    )


# --- heads -----------------------------------------------------------------------------------------------------


def rotated_order(rope: RopeSpec, head_dim: int, width: int) -> Order:
    """Of the elements of a query's or key's head in memory.

    The kernels turn element i with i + width / 2. So the first half has the first of each pair that turns and then half
    of what does not turn, the second half their partners and the other half.
    """
    turning = 0 if rope.kind == "none" else rope.rotary_dim or head_dim
    pairs = np.arange(turning).reshape((-1, 2) if rope.interleaved else (2, -1))
    firsts, seconds = pairs.T if rope.interleaved else pairs
    rest, half = np.arange(turning, head_dim), width // 2
    room = half - len(firsts)
    order = np.full((2, half), EMPTY)
    for row, part in enumerate((np.append(firsts, rest[:room]), np.append(seconds, rest[room:]))):
        order[row, : len(part)] = part
    return order.ravel()


def plain_order(attention: GQA) -> Order:
    """The same of a value's head."""
    order = np.full(attention.width, EMPTY)
    order[: attention.head_dim] = np.arange(attention.head_dim)
    return order


def heads_order(starts: Order, order: Order) -> Order:
    """Of the elements of several heads, one behind the other. starts: where each head is stored."""
    return np.where(order == EMPTY, EMPTY, starts[:, None] + order).ravel()


def qkv_starts(attention: GQA, layout: str) -> tuple[Order, Order, Order]:
    """Where each query, key and value head begins in the rows of a fused tensor. layout: see TensorNames.qkv_order."""
    num_heads, num_kv_heads = attention.num_heads, attention.num_kv_heads
    match layout:
        case "blocks":
            heads = np.arange(num_heads + 2 * num_kv_heads)
            q, k, v = np.split(heads, (num_heads, num_heads + num_kv_heads))
        case "groups":  # of each KV head: its query heads, itself, its value
            groups = np.arange(num_heads + 2 * num_kv_heads).reshape(num_kv_heads, -1)
            q, k, v = groups[:, :-2].ravel(), groups[:, -2], groups[:, -1]
        case _:  # a quarter of the query heads, of the values, of the keys
            parts = np.arange(3 * num_heads).reshape(4, 3, -1)
            q, v, k = (parts[:, kind].ravel() for kind in range(3))
    return q * attention.head_dim, k * attention.head_dim, v * attention.head_dim
