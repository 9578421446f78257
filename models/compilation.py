"""torch.compile for the halves of a layer, so that all layers and all shapes share their graphs.

Owns the way a layer is handed to torch.compile and the count of graphs that came out. Knows nothing of what a layer
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
from torch.utils._pytree import tree_leaves

from graphgen.models.attention.backend import StepTensors
from graphgen.models.attention.pages import LayerPages
from graphgen.models.layers import DecoderLayer

Attend = Callable[[DecoderLayer, Tensor, Tensor, LayerPages, StepTensors], tuple[Tensor, Tensor]]
"""(layer, residual, update, pages, step): what DecoderLayer.attend returns of a layer."""

FeedForward = Callable[[DecoderLayer, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(layer, residual, gathered, live): what DecoderLayer.feed_forward returns of a layer."""


class CompiledHalves:
    """Compiles each half at its first call.

    Compiled are the functions of the class, to which a layer is an argument, not the methods of any one layer.
    """

    def __init__(self) -> None:
        self.num_graphs = 0
        self._inductor = torch._dynamo.lookup_backend("inductor")
        self._attend: Attend = self._compiled(DecoderLayer.attend)
        self._feed_forward: FeedForward = self._compiled(DecoderLayer.feed_forward)

    def attend(
        self,
        layer: DecoderLayer,
        residual: Tensor,
        update: Tensor,
        pages: LayerPages,
        step: StepTensors,
    ) -> tuple[Tensor, Tensor]:
        for tensor in (residual, update, step.cos, step.sin, step.temperatures):
            if tensor is not None:
                torch._dynamo.mark_dynamic(tensor, 0)
        for tensor in tree_leaves(pages):
            if tensor is not None and tensor.ndim > 1:  # has a dimension of pages
                torch._dynamo.decorators.mark_unbacked(tensor, 0)
        for tensor in tree_leaves(step.attention):
            torch._dynamo.decorators.mark_unbacked(tensor, tuple(range(tensor.ndim)))
        with symbolic_shapes_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # made at import
            return self._attend(layer, residual, update, pages, step)

    def feed_forward(
        self, layer: DecoderLayer, residual: Tensor, gathered: Tensor, live: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        for tensor in (residual, gathered) if live is None else (residual, gathered, live):
            torch._dynamo.mark_dynamic(tensor, 0)
        with symbolic_shapes_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # made at import
            return self._feed_forward(layer, residual, gathered, live)

    def _compiled(self, half: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        return torch.compile(half, fullgraph=True, backend=self._compile)

    def _compile(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        """The inductor backend, counted. Untyped in torch: the inputs are tensors and symbolic ints."""
        self.num_graphs += 1
        return self._inductor(graph, example_inputs)
