"""A mixture of experts as a layer has it.

Owns its weights, the order of its arithmetic, and which tensors of a checkpoint it takes. Built and called by the
decoder layer from an Experts of spec/, like the dense MLP.

Shapes: `T` token rows, `K` experts a row, `E` experts, `I` inner columns, `H` hidden.
"""

import numpy as np
import torch
import torch.nn.functional as F
from msgspec.structs import replace
from torch import Tensor, nn

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.models.activations import ACTIVATIONS
from graphgen.models.experts.operator import run_experts
from graphgen.models.experts.routing import route
from graphgen.models.families.family import TensorNames
from graphgen.models.feed_forward import MLP
from graphgen.models.formats.fitting import fitted
from graphgen.models.formats.linear import Linear, LinearStack
from graphgen.models.orders import Order
from graphgen.models.spec import Experts, LinearFormat, Shard
from graphgen.models.targets import Target, Targets, linear_targets, pieces_of, stacked_bias_targets, stacked_targets


class MixtureOfExperts(nn.Module):
    """See spec.Experts. A rank of several holds some of the inner columns of every expert, and the ranks' results are
    added up; the router is everywhere."""

    def __init__(self, spec: Experts, hidden_size: int, dtype: torch.dtype, shard: Shard) -> None:
        super().__init__()
        if spec.activation not in ACTIVATIONS:
            raise UnsupportedModelError(f"experts have the activation {spec.activation}, which has weights of its own")
        self.spec = spec
        self.part = shard.part(spec.size, "inner columns of an expert")
        count, size, router = spec.num_experts, len(self.part), spec.router
        self.router = _empty((count, hidden_size), torch.float32)
        self.router_bias = _empty((count,), torch.float32) if router.bias else None
        self.correction = _empty((count,), torch.float32) if router.correction else None
        self.gate_up = LinearStack(count, hidden_size, 2 * size, dtype, self._gate_up_format)
        self.gate_up_bias = _empty((count, 2 * size), dtype) if spec.bias else None
        self.down = LinearStack(count, size, hidden_size, dtype, self._down_format(hidden_size))
        self.down_bias = _empty((count, hidden_size), dtype) if spec.bias and shard.rank == 0 else None
        self.shared = None if spec.shared is None else MLP(spec.shared, hidden_size, dtype, shard)
        self.shared_gate = Linear(hidden_size, 1, False, dtype) if spec.shared_gate else None

    def forward(self, x: Tensor, live: Tensor | None) -> Tensor:
        """x: [T, H]. live: [T] bool, rows that hold a token; the others go to no expert."""
        spec = self.spec
        logits = F.linear(x.float(), self.router, self.router_bias)
        weights, experts = route(logits, self.correction, spec.router, spec.top_k)
        if live is not None:
            experts = torch.where(live.unsqueeze(-1), experts, spec.num_experts)
        own = (x.unsqueeze(1) * weights.to(x.dtype).unsqueeze(-1)).flatten(0, 1) if spec.input_scaled else x
        matrices = self.gate_up.stored, self.gate_up_bias, self.down.stored, self.down_bias
        made = run_experts(own, experts, *matrices, spec.activation, spec.limit, spec.up_plus_one).float()
        if not spec.input_scaled:
            made = made * weights.unsqueeze(-1)
        made = torch.where((experts < spec.num_experts).unsqueeze(-1), made, 0.0)
        update: Tensor = made.sum(1).to(x.dtype)
        if self.shared is not None:
            shared = self.shared(x, live)
            update = update + (shared if self.shared_gate is None else F.sigmoid(self.shared_gate(x)) * shared)
        return update

    def weights(self, prefix: str, names: TensorNames) -> Targets:
        """Every tensor of a checkpoint that it takes."""
        own = names.experts
        for name, weight in (
            (own.router, self.router),
            (own.router_bias, self.router_bias),
            (own.correction, self.correction),
        ):
            if weight is not None:
                yield prefix + name, Target(weight.data, tuple(weight.shape))
        yield from self._expert_weights(prefix, names)
        if self.shared is not None:
            yield from self.shared.weights(prefix, replace(names, gate_up=own.shared_gate_up, down=own.shared_down))
        if self.shared_gate is not None:
            yield from linear_targets(self.shared_gate, pieces_of([prefix + own.shared_gate], np.arange(1), [1], [1]))

    def _expert_weights(self, prefix: str, names: TensorNames) -> Targets:
        spec, own, part = self.spec, names.experts, np.array(self.part)
        size, hidden_size = spec.size, self.down.each_rows
        rows = self._rows(own.alternating)
        parts, held = [size, size], [len(part), len(part)]
        both = pieces_of([prefix + name for name in own.gate_up], rows, parts, held)
        yield from stacked_targets(self.gate_up, both, None, own.transposed)
        whole = pieces_of([prefix + own.down], np.arange(hidden_size), [hidden_size], [hidden_size])
        yield from stacked_targets(self.down, whole, (size, part), own.transposed)
        if self.gate_up_bias is not None:
            biases = pieces_of([prefix + own.gate_up_bias], rows, parts, held)
            yield from stacked_bias_targets(self.gate_up_bias.data, biases)
            bias = Target(None if self.down_bias is None else self.down_bias.data, (spec.num_experts, hidden_size))
            yield prefix + own.down_bias, bias

    def _rows(self, alternating: bool) -> Order:
        """Of gate and up of an expert, this rank's, counted through both. alternating: as they are stored."""
        part = np.array(self.part)
        return np.concatenate((2 * part, 2 * part + 1) if alternating else (part, self.spec.size + part))

    @property
    def _gate_up_format(self) -> LinearFormat | None:
        # What holds for two experts, one below the other, holds for all. Alternating rows are not stored quantised.
        rows, size = self._rows(alternating=False), self.spec.size
        return fitted(self.spec.gate_up_format, np.concatenate((rows, rows + 2 * size)), [size] * 4)

    def _down_format(self, hidden_size: int) -> LinearFormat | None:
        both = np.arange(2 * hidden_size)
        return fitted(self.spec.down_format, both, [hidden_size] * 2, np.array(self.part), self.spec.size)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """Uninitialised memory: the loader fills it."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
