"""The decoder-only transformer: token ids and positions in, hidden states and logits out.

Owns the weights and the order of the layers, and the compilation of a layer. Never samples, never chooses
pages and knows neither requests nor buckets. Built by loader.py; called by the worker inside a bucket's
graph.

Shapes: `T` token rows, `N` rows that sample, `V` vocabulary.
"""

import importlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphgen.ipc.errors import ConfigError
from graphgen.models.attention.tables import RowTables
from graphgen.models.compilation import CompiledLayers, RunLayer, run_layer
from graphgen.models.kv_cache import KVCache
from graphgen.models.layers import AttentionOp, DecoderLayer, Linear, RMSNorm
from graphgen.models.rope import Rope
from graphgen.models.spec import ModelSpec

ATTENTION_BACKENDS: Mapping[str, tuple[str, str]] = {
    "torch": ("graphgen.models.attention.reference", "paged_attention_torch"),
    "flashinfer": ("graphgen.models.attention.flashinfer", "paged_attention_flashinfer"),
}
"""Name of a backend -> the module that registers its operator, and the operator in the `graphgen`
namespace."""


def attention_op(name: str) -> AttentionOp:
    """The operator of a backend; its module is imported only when it is asked for. ConfigError for others."""
    if name not in ATTENTION_BACKENDS:
        raise ConfigError(f"attention is {name!r}, supported are {', '.join(ATTENTION_BACKENDS)}: choose one of them")
    module, operator = ATTENTION_BACKENDS[name]
    importlib.import_module(module)
    overload: AttentionOp = getattr(torch.ops.graphgen, operator).default
    return overload


class Decoder(nn.Module):
    """Embedding, layers, final norm, LM head. Fresh from the constructor its weights are uninitialised
    memory."""

    def __init__(self, spec: ModelSpec, attention: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        attend = attention_op(attention)
        with device:
            # From a table of weights: the plain constructor would initialise them.
            self.embedding = nn.Embedding.from_pretrained(torch.empty(spec.vocab_size, spec.hidden_size, dtype=dtype))
            self.layers = nn.ModuleList(DecoderLayer(spec, window, attend, dtype) for window in spec.windows)
            self.final_norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype)
            self.head = None if spec.tie_embeddings else Linear(spec.hidden_size, spec.vocab_size, False, dtype)
        self.requires_grad_(False)
        self.rope = Rope(spec.rope, spec.head_dim, device)
        self._run_layer: RunLayer = run_layer
        self._few_rows = _few_rows(spec, attention, dtype, device)
        self._compiled: CompiledLayers | None = None

    @torch.no_grad()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        sequence_lens: Tensor,
        kv_cache: KVCache,
        tables: RowTables,
        extra: list[Tensor],
    ) -> Tensor:
        """Hidden states [T, hidden] before the final norm; K and V of every row are in the cache afterwards.

        token_ids, positions: [T] int64. sequence_lens: [T] int64, max(prompt length of the row's request,
        position + 1). extra: what the attention backend needs beside the tables.
        """
        cos, sin = self.rope(positions, sequence_lens, self.embedding.weight.dtype)
        update: Tensor = self.embedding(token_ids)
        residual = torch.zeros_like(update)
        run = self._runner(token_ids.shape[0], tables.decode_kv_lens.shape[0])
        for layer, k_pages, v_pages in zip(self.layers, kv_cache.k_pages, kv_cache.v_pages, strict=True):
            assert isinstance(layer, DecoderLayer)
            residual, update = run(layer, residual, update, cos, sin, k_pages, v_pages, tables, extra)
        return residual + update

    def _runner(self, num_rows: int, num_decode_rows: int) -> RunLayer:
        """What runs the layers of a step."""
        few_rows, most_rows = self._few_rows
        return few_rows if few_rows is not None and num_rows == num_decode_rows <= most_rows else self._run_layer

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits, [N, V] in the weights' dtype, of rows of forward's result, [N, hidden]."""
        head = self.embedding if self.head is None else self.head
        return F.linear(self.final_norm(hidden), head.weight)

    def compile_layers(self) -> None:
        """From now on layers run compiled: one graph, made at the first call, for all layers and all shapes, but
        for steps of a few decode rows where those have kernels of their own.

        Each distinct attention window makes a graph of its own.
        """
        self._compiled = CompiledLayers()
        self._run_layer = self._compiled

    def num_compiled_graphs(self) -> int:
        """How often a layer was compiled so far: once for each distinct window, when every bucket has run."""
        return 0 if self._compiled is None else self._compiled.num_graphs


def _few_rows(spec: ModelSpec, attention: str, dtype: torch.dtype, device: torch.device) -> tuple[RunLayer | None, int]:
    """What runs the layers of a step of a few decode rows, and how many those are; None where nothing special does."""
    if attention != "flashinfer" or device.type != "cuda":
        return None, 0
    from graphgen.models import few_rows

    if not few_rows.can_run(spec, dtype, device):
        return None, 0
    return few_rows.few_rows_layer(spec.activation), few_rows.MOST_ROWS
