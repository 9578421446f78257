"""The decoder-only transformer: token ids and positions in, logits out.

Owns the weights and the order of the layers, what comes before the first and behind the last, and the compilation of a
layer. Never samples, never chooses pages and knows neither requests nor buckets. Built by loader.py; called by the
worker inside a bucket's graph.

Shapes: `T` token rows, `N` drawing rows, `V` vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphgen.models.attention.backend import StepAttention, StepTensors
from graphgen.models.chaining import can_chain
from graphgen.models.collectives import Exchange, Ranks
from graphgen.models.compilation import Attend, CompiledHalves, FeedForward
from graphgen.models.families.family import TensorNames
from graphgen.models.few_rows_layers import most_rows, reads_fitted, serves_model, serves_rank
from graphgen.models.formats.linear import Linear, StoredWeight
from graphgen.models.formats.products import has_kernels_of_few_rows, matrix_product
from graphgen.models.kv_cache import HeadScales, KVCache
from graphgen.models.layers import Attention, DecoderLayer
from graphgen.models.norms import make_norm, norm_targets
from graphgen.models.orders import EMPTY
from graphgen.models.rope import Rope
from graphgen.models.spec import WHOLE, Experts, Layer, ModelSpec
from graphgen.models.targets import Target, Targets, arranged


class KeptRows(NamedTuple):
    """Rows that a step leaves behind the last layer's attention, whose logits `Decoder.logits_of` computes after it."""

    rows: Tensor
    """[S] int32, of the step's."""
    residual: Tensor
    """[S, hidden]: what `DecoderLayer.attend` returns of them is written here,"""
    gathered: Tensor
    """[S, Hq * D]: and here."""


class Decoder(nn.Module):
    """Embedding, layers, final norm, LM head. Fresh from the constructor its weights are uninitialised
    memory."""

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device,
        fused: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        """fused: steps of a few decode rows may run in the kernels of few_rows.py, where those serve this model. ranks:
        that share the weights: each has its part of every block and of the head's rows, and the whole embedding."""
        super().__init__()
        self._ranks = ranks
        shard = WHOLE if ranks is None else ranks.shard
        self._head_rows = -(-spec.vocab_size // shard.size)
        self._first_head_row = shard.rank * self._head_rows
        self.spec = spec
        hidden_size, num_positions = spec.hidden_size, spec.embedding.num_positions
        width = spec.embedding.size or hidden_size
        with device:
            self.embedding = _table(spec.vocab_size, width, dtype)
            self.positions = (
                _table(num_positions + spec.embedding.position_offset, hidden_size, dtype) if num_positions else None
            )
            self.project_in = Linear(width, hidden_size, False, dtype) if width != hidden_size else None
            self.embedding_norm = make_norm(spec.embedding.norm, hidden_size, dtype)
            self.layers = nn.ModuleList(
                DecoderLayer(layer, spec.ropes, hidden_size, dtype, ranks) for layer in spec.layers
            )
            self.final_norm = make_norm(spec.final_norm, hidden_size, dtype)
            self.project_out = Linear(hidden_size, width, False, dtype) if width != hidden_size else None
            self.head = None if spec.head.tied else Linear(width, self._head_rows, False, dtype)
            self.head_bias = nn.Parameter(torch.empty(self._head_rows, dtype=dtype)) if spec.head.bias else None
        self.requires_grad_(False)
        scale = spec.embedding.scale
        self._embedding_scale = torch.tensor(scale, dtype=dtype).item() if spec.embedding.round_scale else scale
        mixers = {layer.mixer.rope: layer.mixer for layer in reversed(spec.layers)}
        of_rope = [mixers.get(number, spec.layers[0].mixer) for number in range(len(spec.ropes))]
        self.ropes = [
            Rope(rope, head_dim, device, width)
            for rope, (head_dim, width) in zip(spec.ropes, (mixer.rotated for mixer in of_rope), strict=True)
        ]
        self._has_experts = any(isinstance(layer.feed_forward, Experts) for layer in spec.layers)
        self._running_layers = list(self.decoder_layers)
        self._attend: Attend = DecoderLayer.attend
        self._feed_forward: FeedForward = DecoderLayer.feed_forward
        self._compiled: CompiledHalves | None = None
        self._most_few_rows = _most_few_rows(self, device, ranks) if fused else 0
        self._exchange: Exchange | None = None
        if self._most_few_rows and ranks is not None:
            self._exchange = ranks.open_exchange(self._most_few_rows, hidden_size)
            self._most_few_rows = 0 if self._exchange is None else self._most_few_rows

    @torch.no_grad()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        sequence_lens: Tensor,
        kv_cache: KVCache,
        attention: Sequence[StepAttention],
        drawing_rows: Tensor | None = None,
        kept: KeptRows | None = None,
    ) -> Tensor:
        """Next-token logits, [N, V] in the weights' dtype; K and V of every row are in the cache afterwards.

        token_ids, positions: [T] int64. sequence_lens: [T] int64, from which rotations may follow, see Rope.
        attention: of each page group. drawing_rows: [N] int64, whose logits are computed; all rows if None. kept: rows
        that are left for `logits_of`; given only with drawing_rows.
        """
        dtype = self.embedding.weight.dtype
        steps = [
            _steps(rope(positions, sequence_lens, dtype), rope.temperatures(positions), attention)
            for rope in self.ropes
        ]
        num_rows, num_decode_rows = token_ids.shape[0], attention[0].tables.decode_kv_lens.shape[0]
        live = self._live_rows(kv_cache, attention[0])
        if drawing_rows is None and num_rows == num_decode_rows <= self._most_few_rows:
            return self._run_few_rows(token_ids, kv_cache, steps, live)
        update = self._embed(token_ids, positions)
        residual = torch.zeros_like(update)
        layers = self._running_layers
        places = zip(layers, kv_cache.groups[: len(layers)], kv_cache.pages[: len(layers)], strict=True)
        for layer, group, pages in places:
            residual, gathered = self._attend(layer, residual, update, pages, steps[layer.rope][group])
            if kept is not None and layer is layers[-1]:
                torch.index_select(residual, 0, kept.rows, out=kept.residual)
                torch.index_select(gathered, 0, kept.rows, out=kept.gathered)
            if layer is layers[-1] and drawing_rows is not None:
                residual, gathered = residual[drawing_rows], gathered[drawing_rows]
                live = None if live is None else live[drawing_rows]
            residual, update = self._feed_forward(layer, residual, gathered, live)
        return self._logits(residual + update)

    def allocate_kept(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Room for the residual and the gathered part of so many KeptRows."""
        like = self.embedding.weight
        widths = self.spec.hidden_size, self.decoder_layers[-1].attention.o.in_features
        residual, gathered = (torch.zeros(num_rows, width, dtype=like.dtype, device=like.device) for width in widths)
        return residual, gathered

    @torch.no_grad()
    def logits_of(self, residual: Tensor, gathered: Tensor) -> Tensor:
        """Next-token logits, [S, V], of rows that a step kept."""
        live = torch.ones(len(residual), dtype=torch.bool, device=residual.device) if self._has_experts else None
        residual, update = self._feed_forward(self.decoder_layers[-1], residual, gathered, live)
        return self._logits(residual + update)

    def _live_rows(self, kv_cache: KVCache, attention: StepAttention) -> Tensor | None:
        """[T] bool: which rows hold a token, for the experts of layers that have some. Padded rows write to the trash
        page, which is the last."""
        if not self._has_experts:
            return None
        return attention.tables.kv_locations < kv_cache.trash_page * kv_cache.page_size

    def _embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """[T, hidden]"""
        x: Tensor = self.embedding(token_ids)
        if self._embedding_scale != 1.0:
            x = x * self._embedding_scale
        if self.project_in is not None:
            x = self.project_in(x)
        if self.positions is not None:
            x = x + self.positions(positions + self.spec.embedding.position_offset)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _logits(self, x: Tensor) -> Tensor:
        """x: [N, hidden], what the last layer left."""
        if self.final_norm is not None:
            x = self.final_norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        weight = self._head_weight
        logits = matrix_product(x, weight, None if self.head_bias is None else self.head_bias[: len(weight)])
        scale, softcap = self.spec.head.scale, self.spec.head.softcap
        if scale != 1.0:
            logits = logits * scale
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        return self._of_all_ranks(logits)

    def _of_all_ranks(self, logits: Tensor) -> Tensor:
        """[N, V] of a rank's columns."""
        if self._ranks is None:
            return logits
        missing = self._head_rows - logits.shape[1]  # the last rank has fewer where they do not divide the vocabulary
        return self._ranks.all_gather(F.pad(logits, (0, missing)))[:, : self.spec.vocab_size]

    def _run_few_rows(
        self, token_ids: Tensor, kv_cache: KVCache, steps: Sequence[Sequence[StepTensors]], live: Tensor | None
    ) -> Tensor:
        from graphgen.models import few_rows_step

        ends = few_rows_step.Ends(self.embedding.weight, self.final_norm, self._head_weight)
        layers = self._running_layers
        logits = few_rows_step.next_logits(
            ends, layers, token_ids, kv_cache, steps, live, self._attend, chained=True, exchange=self._exchange
        )
        return self._of_all_ranks(logits)

    @property
    def decoder_layers(self) -> Sequence[DecoderLayer]:
        return cast(Sequence[DecoderLayer], self.layers)  # what a ModuleList holds is untyped

    @property
    def head_scales(self) -> list[HeadScales] | None:
        """Of each layer, see KVCache; None where values are parts of keys."""
        mixers = [layer.attention for layer in self.decoder_layers]
        scales = [(mixer.k_scales, mixer.v_scales) for mixer in mixers if isinstance(mixer, Attention)]
        return scales if len(scales) == len(mixers) else None

    @property
    def _head_weight(self) -> Tensor:
        """[V, hidden]; a rank's rows of it."""
        if self.head is not None:
            return self.head.weight
        weight = self.embedding.weight
        if self._ranks is None:
            return weight
        return weight[self._first_head_row : self._first_head_row + self._head_rows]

    def weights(self, names: TensorNames) -> Targets:
        """Every tensor that a checkpoint must have, and what becomes of it."""
        for name, module in (
            (names.embedding, self.embedding),
            (names.positions, self.positions),
            (names.project_in, self.project_in),
            (names.project_out, self.project_out),
        ):
            if module is not None:
                yield name, Target(module.weight.data, tuple(module.weight.shape))
        num_stored, own = self.spec.vocab_size, np.arange(self._head_rows) + self._first_head_row
        of_head = arranged(np.where(own < num_stored, own, EMPTY), num_stored)
        if self.head is not None:
            yield names.head, Target(self.head.weight.data, (num_stored, self.head.in_features), of_head)
        if self.head_bias is not None:
            yield names.head_bias, Target(self.head_bias.data, (num_stored,), of_head)
        yield from norm_targets(names.embedding_norm, self.embedding_norm, self.spec.embedding.norm)
        yield from norm_targets(names.final_norm, self.final_norm, self.spec.final_norm)
        for number, layer in enumerate(self.decoder_layers):
            yield from layer.weights(names.layer.format(layer=number), names)

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """Meanwhile `forward` leaves out the layers behind the first ones of every kind: it runs every kernel that it
        runs otherwise, and its logits mean nothing. Two layers at least, since a layer ends in the norm of the next."""
        every = self._running_layers
        self._running_layers = every[: num_unlike(self.spec.layers)]
        try:
            yield
        finally:
            self._running_layers = every

    def compile_layers(self) -> None:
        """From now on layers run compiled: a graph for each half, made at the first call, for all layers and all
        shapes, but for steps of a few decode rows where those have kernels of their own."""
        self._compiled = CompiledHalves()
        self._attend, self._feed_forward = self._compiled.attend, self._compiled.feed_forward

    def num_compiled_graphs(self) -> int:
        """Graphs made of halves of layers so far: 2, when every bucket has run."""
        return 0 if self._compiled is None else self._compiled.num_graphs


def num_unlike(layers: Sequence[Layer]) -> int:
    """As few layers from the first on as have one of every kind, and two at least, if there are two."""
    kinds = set(layers)
    length = next(length for length in range(1, len(layers) + 1) if set(layers[:length]) == kinds)
    return max(length, min(2, len(layers)))


def _steps(
    angles: tuple[Tensor, Tensor], temperatures: Tensor | None, attention: Sequence[StepAttention]
) -> list[StepTensors]:
    """What layers of one rotation read, in each page group."""
    return [StepTensors(*angles, of_group, temperatures) for of_group in attention]


def _table(num_rows: int, width: int, dtype: torch.dtype) -> nn.Embedding:
    # From a table of weights: the plain constructor would initialise them.
    table: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(num_rows, width, dtype=dtype))
    return table


def _most_few_rows(decoder: Decoder, device: torch.device, ranks: Ranks | None) -> int:
    """Decode rows up to which a step runs in the kernels of few_rows.py; 0 where those do not serve."""
    spec, dtype = decoder.spec, decoder.embedding.weight.dtype
    if device.type != "cuda" or not can_chain() or not serves_model(spec, dtype):
        return 0
    if ranks is not None and not serves_rank(spec.shared_by(ranks.shard.size), dtype, ranks.shard.size):
        return 0
    linears = (module for module in decoder.modules() if isinstance(module, StoredWeight))
    if not reads_fitted(spec, ((linear.format, linear.in_features) for linear in linears)):
        return 0
    return most_rows(spec, 1 if ranks is None else ranks.shard.size, has_kernels_of_few_rows())
