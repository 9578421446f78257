"""The dense feed-forward of a layer, and the linear layer that all blocks are made of.

Owns their arithmetic, and which tensors of a checkpoint they take. Built from a Dense of spec/ by layers.py, and by
experts/ for experts that see every row.
"""

import numpy as np
import torch
from torch import Tensor, nn

from graphgen.models.activations import ACTIVATIONS, XIELU
from graphgen.models.families.family import TensorNames
from graphgen.models.spec import Dense, Shard
from graphgen.models.targets import Targets, linear_targets, pieces_of, row_parallel_targets


class Linear(nn.Linear):
    """A linear layer whose weights are uninitialised memory: the loader fills them."""

    def __init__(self, in_size: int, out_size: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_size, out_size, bias=bias, dtype=dtype)
        self.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Called by nn.Linear to initialise."""


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (arXiv 2002.05202), or down(activation(up(x))). A rank of several holds some of
    the inner columns, and the ranks' results are added up."""

    def __init__(self, spec: Dense, hidden_size: int, dtype: torch.dtype, shard: Shard) -> None:
        super().__init__()
        self.activation, self.gated = spec.activation, spec.gated
        self.part = shard.part(spec.size, "inner columns of a feed-forward")
        size = len(self.part)
        self.gate_up = Linear(hidden_size, 2 * size if spec.gated else size, spec.bias, dtype)
        self.down = Linear(size, hidden_size, spec.bias and shard.rank == 0, dtype)
        self.learned = XIELU(dtype) if spec.activation == "xielu" else None
        self.spec = spec

    def forward(self, x: Tensor, live: Tensor | None = None) -> Tensor:
        """x: [T, hidden]. live: which rows hold a token, for experts; here each row is treated alike."""
        inner = self.gate_up(x)
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
        size, num_parts = self.spec.size, 1 + self.gated
        part = np.array(self.part)
        rows = np.concatenate([number * size + part for number in range(num_parts)])
        held = [len(self.part)] * num_parts
        pieces = pieces_of([prefix + name for name in names.gate_up], rows, [size] * num_parts, held)
        yield from linear_targets(self.gate_up, pieces, transposed=names.transposed)
        yield from row_parallel_targets(prefix + names.down, self.down, part, size, self.spec.bias, names.transposed)
        if self.learned is not None:
            yield from self.learned.weights(prefix + names.activation)
