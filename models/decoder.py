"""The decoder-only transformer: token ids and positions in, logits out.

Owns the weights and the order of the layers, and the compilation of a layer. Never samples, never chooses
pages and knows neither requests nor buckets. Built by loader.py; called by the worker inside a bucket's
graph.

Shapes: `T` token rows, `N` drawing rows, `V` vocabulary.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphgen.models.attention.backend import StepAttention, StepTensors
from graphgen.models.chaining import can_chain
from graphgen.models.compilation import Attend, CompiledHalves, FeedForward
from graphgen.models.few_rows_layers import serves_model
from graphgen.models.kv_cache import KVCache
from graphgen.models.layers import DecoderLayer, Linear, RMSNorm
from graphgen.models.rope import Rope
from graphgen.models.spec import ModelSpec


class Decoder(nn.Module):
    """Embedding, layers, final norm, LM head. Fresh from the constructor its weights are uninitialised
    memory."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device, fused: bool = False) -> None:
        """fused: steps of a few decode rows may run in the kernels of few_rows.py, where those serve this model."""
        super().__init__()
        self.spec = spec
        with device:
            # From a table of weights: the plain constructor would initialise them.
            self.embedding = nn.Embedding.from_pretrained(torch.empty(spec.vocab_size, spec.hidden_size, dtype=dtype))
            self.layers = nn.ModuleList(DecoderLayer(spec, window, dtype) for window in spec.windows)
            self.final_norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype)
            self.head = None if spec.tie_embeddings else Linear(spec.hidden_size, spec.vocab_size, False, dtype)
        self.requires_grad_(False)
        self.rope = Rope(spec.rope, spec.head_dim, device)
        self._attend: Attend = DecoderLayer.attend
        self._feed_forward: FeedForward = DecoderLayer.feed_forward
        self._compiled: CompiledHalves | None = None
        self._most_few_rows = _most_few_rows(self, device) if fused else 0

    @torch.no_grad()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        sequence_lens: Tensor,
        kv_cache: KVCache,
        attention: StepAttention,
        drawing_rows: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits, [N, V] in the weights' dtype; K and V of every row are in the cache afterwards.

        token_ids, positions: [T] int64. sequence_lens: [T] int64, max(prompt length of the row's request,
        position + 1). drawing_rows: [N] int64, whose logits are computed; all rows if None.
        """
        cos, sin = self.rope(positions, sequence_lens, self.embedding.weight.dtype)
        step = StepTensors(cos, sin, attention)
        num_rows, num_decode_rows = token_ids.shape[0], attention.tables.decode_kv_lens.shape[0]
        if drawing_rows is None and num_rows == num_decode_rows <= self._most_few_rows:
            return self._run_few_rows(token_ids, kv_cache, step)
        update: Tensor = self.embedding(token_ids)
        residual = torch.zeros_like(update)
        layers = self._decoder_layers
        for layer, k_pages, v_pages in zip(layers, kv_cache.k_pages, kv_cache.v_pages, strict=True):
            residual, gathered = self._attend(layer, residual, update, k_pages, v_pages, step)
            if layer is layers[-1] and drawing_rows is not None:
                residual, gathered = residual[drawing_rows], gathered[drawing_rows]
            residual, update = self._feed_forward(layer, residual, gathered)
        return F.linear(self.final_norm(residual + update), self._head_weight)

    def _run_few_rows(self, token_ids: Tensor, kv_cache: KVCache, step: StepTensors) -> Tensor:
        from graphgen.models import few_rows

        ends = few_rows.Ends(self.embedding.weight, self.final_norm, self._head_weight)
        return few_rows.next_logits(ends, self._decoder_layers, token_ids, kv_cache, step, chained=True)

    @property
    def _decoder_layers(self) -> Sequence[DecoderLayer]:
        return cast(Sequence[DecoderLayer], self.layers)  # what a ModuleList holds is untyped

    @property
    def _head_weight(self) -> Tensor:
        """[V, hidden]"""
        return (self.embedding if self.head is None else self.head).weight

    def compile_layers(self) -> None:
        """From now on layers run compiled: a graph for each half, made at the first call, for all layers and all
        shapes, but for steps of a few decode rows where those have kernels of their own.

        Each distinct attention window makes one more.
        """
        self._compiled = CompiledHalves()
        self._attend, self._feed_forward = self._compiled.attend, self._compiled.feed_forward

    def num_compiled_graphs(self) -> int:
        """Graphs made of halves of layers so far: 2 for a model of one window, when every bucket has run."""
        return 0 if self._compiled is None else self._compiled.num_graphs


def _most_few_rows(decoder: Decoder, device: torch.device) -> int:
    """Decode rows up to which a step runs in the kernels of few_rows.py; 0 where those do not serve."""
    if device.type != "cuda" or not can_chain() or not serves_model(decoder, decoder.spec):
        return 0
    from graphgen.models import few_rows  # needs Triton

    return few_rows.MOST_ROWS
