"""A mixture of experts over a few rows: three Triton kernels, or four with a shared expert, each launched while the one
ahead still runs.

Such a step costs the reading of the chosen experts' weights, and the time between kernels. Each pair of a row and an
expert has programs of its own, which read the expert's weights once; nothing is sorted, and nothing waits for the host.
Sums have a fixed order. The arithmetic of block.py, but that an expert's inner columns are weighted instead of what it
makes of them.

Owns no weights. Called by models/few_rows_step.py for the blocks that models/few_rows_layers.py serves.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from graphgen.models.chaining import launch_options
from graphgen.models.experts.block import MixtureOfExperts
from graphgen.models.experts.few_rows_kernels import down_kernel, gate_up_kernel, router_kernel
from graphgen.models.experts.few_rows_stored import reading_of
from graphgen.models.experts.tiles import ACTIVATIONS
from graphgen.models.few_rows import gated_linear
from graphgen.models.few_rows_tiles import depth_block, in_input_order, tensors_of
from graphgen.models.few_rows_weights import Reading
from graphgen.models.formats.products import Weight
from graphgen.models.normed import Normed, open_normed
from graphgen.models.norms import RMSNorm


class Blocks(NamedTuple):
    """How a product is cut, and how a program reads."""

    columns: int
    """Of a program."""
    depth: int
    """Of the weight, that a program reads at a time, at most."""
    warps: int
    parts: int
    """Of that depth, that are on their way at a time; more of a smaller one."""

    def parts_of(self, depth: int) -> int:
        """Of another depth: about as many bytes."""
        return min(self.parts * self.depth // depth, _MOST_PARTS)


_MOST_PARTS = 12
"""Each is code of its own."""
GATE_UP = Blocks(columns=8, depth=256, warps=2, parts=4)
DOWN = Blocks(columns=16, depth=256, warps=4, parts=7)
"""Columns: 128 programs where the residual stream is 2048 wide, so that each multiprocessor has one."""
STORED_GATE_UP = Blocks(columns=16, depth=128, warps=4, parts=2)
STORED_DOWN = Blocks(columns=16, depth=128, warps=4, parts=6)
"""Of quantised weights: each warp reads `depth` columns at a time, of its own part of them."""


class Routed(NamedTuple):
    """Where the rows go: written by the first two kernels."""

    logits: Tensor
    """[T, E] float32, or [T, E + 1] with that of the shared expert's gate."""
    experts: Tensor
    """[T, K] int32; E for a row that holds no token."""
    weights: Tensor
    """[T, K] float32"""


def run_experts(
    block: MixtureOfExperts,
    residual: Tensor,
    x: Normed,
    eps: float,
    norm: RMSNorm,
    live: Tensor | None,
    chained: bool,
    blocks: tuple[Blocks, Blocks] | None = None,
) -> tuple[Tensor, Normed]:
    """(residual + the mixture's update of RMSNorm, [T, hidden], and its norm begun). residual: [T, hidden]. x, eps: its
    norm. norm: the next one. live: [T] bool, which rows hold a token; None: all. blocks: of gate-up and down; None: the
    best that are known."""
    of_gate_up, of_down = blocks or (
        GATE_UP if block.gate_up.format is None else STORED_GATE_UP,
        DOWN if block.down.format is None else STORED_DOWN,
    )
    spec, shared = block.spec, block.shared
    num_rows, num_pairs = len(residual), len(residual) * spec.top_k
    logits = _score(block, x, eps, chained)
    new = residual.new_empty
    routed = Routed(logits, new((num_rows, spec.top_k), dtype=torch.int32), new(num_pairs, dtype=torch.float32))
    inner = new((num_pairs, block.down.in_features))
    _gate_up(block, x, eps, live, routed, inner, of_gate_up, chained)
    shared_inner = None
    if shared is not None:
        gate_up = shared.gate_up
        shared_inner = gated_linear(x, eps, gate_up.stored, gate_up.bias, shared.activation, chained)
    return _down(block, routed, inner, shared_inner, residual, norm, of_down, chained)


def _score(block: MixtureOfExperts, x: Normed, eps: float, chained: bool) -> Tensor:
    """[T, E] logits, see Routed."""
    num_rows, hidden_size = x.scaled.shape
    num_experts, num_parts = len(block.router), x.squares.shape[1]
    num_logits = num_experts + (block.shared_gate is not None)
    logits = x.squares.new_empty((num_rows, num_logits))
    router_kernel[(num_logits, num_rows)](
        x.scaled,
        x.squares,
        block.router,
        block.router_bias,
        None if block.shared_gate is None else block.shared_gate.weight,
        logits,
        num_parts,
        eps,
        num_experts,
        hidden_size,
        triton.next_power_of_2(hidden_size),
        triton.next_power_of_2(num_parts),
        chained,
        num_warps=4,
        **launch_options(chained),
    )
    return logits


def _gate_up(
    block: MixtureOfExperts,
    x: Normed,
    eps: float,
    live: Tensor | None,
    routed: Routed,
    inner: Tensor,
    blocks: Blocks,
    chained: bool,
) -> None:
    """Writes what `routed` has beside the logits, and the inner columns of each pair, [T * K, I]."""
    spec, router = block.spec, block.spec.router
    hidden_size, num_parts = x.scaled.shape[1], x.squares.shape[1]
    num_pairs, size = inner.shape
    weight, depth = block.gate_up.stored, depth_block(hidden_size, blocks.depth)
    reading = _reading(weight, hidden_size, blocks)
    gate_up_kernel[(num_pairs, size // blocks.columns)](
        x.scaled,
        x.squares,
        routed.logits,
        block.correction,
        live,
        *tensors_of(weight),
        block.gate_up_bias,
        inner,
        routed.experts,
        routed.weights,
        num_parts,
        eps,
        router.scale,
        spec.limit,
        routed.logits.stride(0),
        size,
        hidden_size,
        spec.num_experts,
        triton.next_power_of_2(spec.num_experts),
        spec.top_k,
        router.score == "softmax",
        router.renormalise,
        ACTIVATIONS[spec.activation],
        spec.up_plus_one,
        blocks.columns,
        depth,
        blocks.parts_of(depth) + 1,
        triton.next_power_of_2(num_parts),
        chained,
        reading,
        num_warps=blocks.warps,
        **launch_options(chained),
    )


def _down(
    block: MixtureOfExperts,
    routed: Routed,
    inner: Tensor,
    shared_inner: Tensor | None,
    residual: Tensor,
    norm: RMSNorm,
    blocks: Blocks,
    chained: bool,
) -> tuple[Tensor, Normed]:
    """See run_experts. shared_inner: [T, inner columns of the shared expert]."""
    spec, shared = block.spec, block.shared
    num_rows, hidden_size = residual.shape
    size = inner.shape[1]
    weight = block.down.stored
    shared_size = 0 if shared_inner is None else shared_inner.shape[1]
    depth, shared_depth = depth_block(size, blocks.depth), depth_block(shared_size, blocks.depth)
    sums, normed = open_normed(residual, num_rows, hidden_size, blocks.columns)
    down_kernel[(hidden_size // blocks.columns, num_rows)](
        inner,
        routed.experts,
        routed.weights,
        *tensors_of(weight),
        block.down_bias,
        None if shared is None or shared_inner is None else in_input_order(shared_inner, shared.down.stored),
        *((None, None, None) if shared is None else tensors_of(shared.down.stored)),
        None if shared is None else shared.down.bias,
        None if block.shared_gate is None else routed.logits[:, spec.num_experts :],
        residual,
        norm.weight,
        sums,
        *normed,
        routed.logits.stride(0),
        hidden_size,
        shared_size,
        size,
        spec.num_experts,
        spec.top_k,
        triton.next_power_of_2(spec.top_k),
        blocks.columns,
        depth,
        shared_depth,
        blocks.parts_of(depth) + 1,
        blocks.parts_of(shared_depth) + 1,
        chained,
        _reading(weight, size, blocks),
        None if shared is None else _reading(shared.down.stored, shared_size, blocks),
        num_warps=blocks.warps,
        **launch_options(chained),
    )
    return sums, normed


def _reading(weight: Tensor | Weight, num_columns: int, blocks: Blocks) -> Reading | None:
    """None: the weight is not quantised."""
    return reading_of(weight.format, num_columns, blocks.depth, blocks.warps) if isinstance(weight, Weight) else None
