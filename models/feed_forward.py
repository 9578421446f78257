"""The dense feed-forward of a layer.

Owns its arithmetic, and which tensors of a checkpoint it takes. Built from a Dense of spec/ by layers.py, and by
experts/ for experts that see every row.
"""

import numpy as np
import torch
from torch import Tensor, nn

from graphgen.models.activations import ACTIVATIONS, XIELU
from graphgen.models.families.family import TensorNames
from graphgen.models.formats.fitting import fitted
from graphgen.models.formats.linear import Linear
from graphgen.models.gated import gated_product
from graphgen.models.orders import Order
from graphgen.models.spec import Dense, Shard
from graphgen.models.targets import Targets, linear_targets, pieces_of, row_parallel_targets


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (arXiv 2002.05202), or down(activation(up(x))). A rank of several holds some of
    the inner columns, and the ranks' results are added up."""

    def __init__(self, spec: Dense, hidden_size: int, dtype: torch.dtype, shard: Shard) -> None:
        super().__init__()
        self.activation, self.gated = spec.activation, spec.gated
        self.part = shard.part(spec.size, "inner columns of a feed-forward")
        size, rows = len(self.part), self._rows(spec)
        gate_up = fitted(spec.gate_up_format, rows, [spec.size] * (1 + spec.gated))
        self.gate_up = Linear(hidden_size, len(rows), spec.bias, dtype, gate_up)
        down = fitted(spec.down_format, columns=np.array(self.part), num_columns=spec.size)
        self.down = Linear(size, hidden_size, spec.bias and shard.rank == 0, dtype, down)
        self.learned = XIELU(dtype) if spec.activation == "xielu" else None
        self.spec = spec

    def forward(self, x: Tensor, live: Tensor | None = None) -> Tensor:
        """x: [T, hidden]. live: which rows hold a token, for experts; here each row is treated alike."""
        inner = self.gate_up(x)
        if self.gated and self.learned is None:
            return gated_product(inner, self.activation, self.down)
        activate = ACTIVATIONS[self.activation] if self.learned is None else self.learned
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = activate(gate) * up
        else:
            inner = activate(inner)
        out: Tensor = self.down(inner)
        return out

    def weights(self, prefix: str, names: TensorNames) -> Targets:
        """Every tensor of a checkpoint that it takes."""
        size, num_parts, part = self.spec.size, 1 + self.gated, np.array(self.part)
        held = [len(part)] * num_parts
        pieces = pieces_of([prefix + name for name in names.gate_up], self._rows(self.spec), [size] * num_parts, held)
        yield from linear_targets(self.gate_up, pieces, transposed=names.transposed)
        yield from row_parallel_targets(prefix + names.down, self.down, part, size, self.spec.bias, names.transposed)
        if self.learned is not None:
            yield from self.learned.weights(prefix + names.activation)

    def _rows(self, spec: Dense) -> Order:
        """This rank's of gate and up, of those that the checkpoint has."""
        part = np.array(self.part)
        return np.concatenate([number * spec.size + part for number in range(1 + spec.gated)])
