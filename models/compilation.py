"""One compiled graph for every layer of a decoder and every shape of a step.

Owns how a layer is handed to torch.compile and the count of graphs that came out. Knows nothing of what a layer
computes. Called by the decoder for each layer of each step; compilation happens in the first calls.

Which sizes may vary, and how the compiler is told:
    token rows         a symbol with an example value, so that a norm's reduction and what follows it become one
                       kernel; without an example value (an unbacked symbol) the compiler splits them into two.
                       Oblivious to 0 and 1: a step of one row runs the same graph.
    pages, row tables  unbacked symbols: they only pass through to the attention operator, and no two of them are to
                       be taken for equal because they happen to be equal in the first step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as symbolic_shapes_config

from graphgen.models.attention.tables import RowTables
from graphgen.models.layers import DecoderLayer

RunLayer = Callable[
    [DecoderLayer, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, RowTables, list[Tensor]],
    tuple[Tensor, Tensor],
]
"""(layer, residual, update, cos, sin, k_pages, v_pages, tables, extra) -> (residual, update)."""


def run_layer(
    layer: DecoderLayer,
    residual: Tensor,
    update: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tables: RowTables,
    extra: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """The layer as it is. A function of the layer, not its method: what is compiled belongs to no one layer."""
    new: tuple[Tensor, Tensor] = layer(residual, update, cos, sin, k_pages, v_pages, tables, extra)
    return new


class CompiledLayers:
    """A RunLayer that compiles the layer at the first call, and once more for each distinct attention window."""

    def __init__(self) -> None:
        self.num_graphs = 0
        self._inductor = torch._dynamo.lookup_backend("inductor")
        self._compiled: RunLayer = torch.compile(run_layer, fullgraph=True, backend=self._compile)

    def __call__(
        self,
        layer: DecoderLayer,
        residual: Tensor,
        update: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        tables: RowTables,
        extra: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        for tensor in (residual, update, cos, sin):
            torch._dynamo.mark_dynamic(tensor, 0)
        for tensor in (k_pages, v_pages):
            torch._dynamo.decorators.mark_unbacked(tensor, 0)
        for tensor in (*tables, *extra):
            torch._dynamo.decorators.mark_unbacked(tensor, tuple(range(tensor.ndim)))
        with symbolic_shapes_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # made at import
            return self._compiled(layer, residual, update, cos, sin, k_pages, v_pages, tables, extra)

    def _compile(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        """The inductor backend, counted. Untyped in torch: the inputs are tensors and symbolic ints."""
        self.num_graphs += 1
        return self._inductor(graph, example_inputs)
