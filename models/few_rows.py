"""Decoder layers over a few token rows: five Triton kernels a layer, each launched while the one ahead still runs. CUDA
only.

With a few rows a step does little but read weights, and what it loses is the time between kernels, when memory is
idle: the smallest product reads for 8 us and takes 12. Here every kernel is launched under its predecessor
(programmatic dependent launch) and waits inside for its data, gate, up and activation are one kernel, and the norms
have none of their own: the division by a row's root mean square comes after the product that reads the row.

The arithmetic of layers.py, but that the norm rounds once where layers.py rounds twice; for the layers that
few_rows_layers.py knows. Owns no weights. Called by the decoder in place of all its layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor, nn

from graphgen.models.attention.backend import StepTensors
from graphgen.models.chaining import launch_options
from graphgen.models.feed_forward import MLP
from graphgen.models.few_rows_kernels import (
    adding_linear_kernel,
    embed_kernel,
    gated_kernel,
    norm_heads_kernel,
    normed_linear_kernel,
)
from graphgen.models.few_rows_layers import ACTIVATIONS, K_BLOCK, LEAST_COLUMNS
from graphgen.models.kv_cache import KVCache
from graphgen.models.layers import Attention, DecoderLayer
from graphgen.models.norms import RMSNorm

MOST_ROWS = 64
"""With more rows a product is no longer a matter of reading weights, and cuBLAS is faster."""


class Normed(NamedTuple):
    """RMSNorm of rows, but for the division by the root mean square, which falls to the reader."""

    scaled: Tensor
    """[T, hidden]: the rows times the norm's weight."""
    squares: Tensor
    """[T, parts] float32: sums of the squares of the rows, each over a part of the columns."""


# --- one kernel each -------------------------------------------------------------------------------------------


def _row_block(num_rows: int) -> int:
    """Rows a program multiplies: what one tensor core takes at least, or what a group of four does."""
    return 16 if num_rows <= 16 else 64


def _column_block(size: int) -> int:
    """Columns of a program that makes a product `size` wide."""
    # Two thirds of the multiprocessors with 16 KiB stages beat all of them with 8 KiB ones.
    return 64 if size % 64 == 0 and size // 64 >= 88 else LEAST_COLUMNS


def _early_columns(num_rows: int) -> int:
    """Columns of a weight that are read before the kernel ahead is done: a block, unless 64 rows need the room."""
    return K_BLOCK if num_rows <= 16 else 0


def _product_options(num_rows: int, size: int, chained: bool) -> dict[str, int | bool]:
    stages = 8 if _column_block(size) == LEAST_COLUMNS else 6 if num_rows <= 16 else 5
    return {"num_warps": 4, "num_stages": stages, **launch_options(chained)}


def _open_normed(like: Tensor, num_rows: int, size: int) -> tuple[Tensor, Normed]:
    """Where a kernel that ends in the residual stream writes: (sums, their norm)."""
    sums, scaled = (torch.empty((num_rows, size), dtype=like.dtype, device=like.device) for _ in range(2))
    squares = torch.empty((num_rows, size // _column_block(size)), dtype=torch.float32, device=like.device)
    return sums, Normed(scaled, squares)


def embed(token_ids: Tensor, table: Tensor, norm: RMSNorm) -> tuple[Tensor, Normed]:
    """(rows of the table, [T, hidden], and their norm). token_ids: [T] int64."""
    num_rows, size = token_ids.shape[0], table.shape[1]
    sums, normed = _open_normed(table, num_rows, size)
    block = _column_block(size)
    embed_kernel[(size // block,)](
        token_ids, table, norm.weight, sums, *normed, num_rows, size, _row_block(num_rows), block
    )
    return sums, normed


def normed_linear(x: Normed, eps: float, weight: Tensor, bias: Tensor | None, chained: bool) -> Tensor:
    """RMSNorm @ weight.T + bias, [T, N], for at most MOST_ROWS rows. weight: [N, K], K a multiple of 128."""
    num_rows, depth = x.scaled.shape
    size, num_parts = weight.shape[0], x.squares.shape[1]
    out = torch.empty((num_rows, size), dtype=x.scaled.dtype, device=x.scaled.device)
    block = _column_block(size)
    normed_linear_kernel[(size // block,)](
        x.scaled,
        x.squares,
        weight,
        bias,
        out,
        num_rows,
        num_parts,
        eps,
        size,
        depth,
        bias is not None,
        _row_block(num_rows),
        block,
        K_BLOCK,
        _early_columns(num_rows),
        triton.next_power_of_2(num_parts),
        chained,
        **_product_options(num_rows, size, chained),
    )
    return out


def adding_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm: RMSNorm, chained: bool
) -> tuple[Tensor, Normed]:
    """(residual + x @ weight.T + bias, [T, N], and its norm) for at most MOST_ROWS rows. x: [T, K] contiguous, K a
    multiple of 128; weight: [N, K]."""
    num_rows, depth = x.shape
    size = weight.shape[0]
    sums, normed = _open_normed(residual, num_rows, size)
    block = _column_block(size)
    adding_linear_kernel[(size // block,)](
        x,
        weight,
        bias,
        residual,
        norm.weight,
        sums,
        *normed,
        num_rows,
        size,
        depth,
        bias is not None,
        _row_block(num_rows),
        block,
        K_BLOCK,
        _early_columns(num_rows),
        chained,
        **_product_options(num_rows, size, chained),
    )
    return sums, normed


def gated_linear(x: Normed, eps: float, weight: Tensor, bias: Tensor | None, activation: str, chained: bool) -> Tensor:
    """activation(RMSNorm @ gate.T) * (RMSNorm @ up.T), [T, F], for at most MOST_ROWS rows. weight: [2 F, K], gate
    before up."""
    num_rows, depth = x.scaled.shape
    size, num_parts = weight.shape[0] // 2, x.squares.shape[1]
    out = torch.empty((num_rows, size), dtype=x.scaled.dtype, device=x.scaled.device)
    rows = _row_block(num_rows)
    block = 64 if size % 64 == 0 else LEAST_COLUMNS
    gated_kernel[(size // block,)](
        x.scaled,
        x.squares,
        weight,
        bias,
        out,
        num_rows,
        num_parts,
        eps,
        size,
        depth,
        ACTIVATIONS[activation],
        bias is not None,
        rows,
        block,
        K_BLOCK,
        _early_columns(num_rows),
        triton.next_power_of_2(num_parts),
        chained,
        num_warps=4,
        num_stages=3 if rows == 16 else 4,
        **launch_options(chained),
    )
    return out


def norm_heads(heads: Tensor, norm: RMSNorm, chained: bool) -> None:
    """RMSNorm of each head in place. heads: [T, H, D], the heads of a row one behind the other."""
    num_rows, num_heads, size = heads.shape
    block = triton.next_power_of_2(size)
    norm_heads_kernel[(num_rows, num_heads)](
        heads,
        norm.weight,
        heads.stride(0),
        size,
        norm.eps,
        block,
        chained,
        num_warps=1 if block <= 256 else 8,
        **launch_options(chained),
    )


# --- all layers ------------------------------------------------------------------------------------------------


class Ends(NamedTuple):
    """What comes before and behind the layers."""

    embedding: Tensor  # [V, hidden]
    norm: nn.Module | None  # an RMSNorm
    head: Tensor  # [V, hidden]


def next_logits(
    ends: Ends,
    layers: Sequence[DecoderLayer],
    token_ids: Tensor,
    kv_cache: KVCache,
    steps: Sequence[StepTensors],
    chained: bool,
) -> Tensor:
    """Logits, [T, V], of at most MOST_ROWS decode rows. token_ids: [T] int64. steps: of each page group.

    chained=False launches every kernel after the one ahead.
    """
    norms = [_plain(norm) for norm in (*(layer.input_norm for layer in layers), ends.norm)]
    sums, normed = embed(token_ids, ends.embedding, norms[0])
    for number, layer in enumerate(layers):
        attention, mlp, norm = _grouped(layer.attention), _dense(layer.mlp), _plain(layer.ff_norm)
        qkv = normed_linear(normed, norms[number].eps, attention.qkv.weight, attention.qkv.bias, chained)
        num_heads, num_kv_heads = attention.num_heads, attention.num_kv_heads
        heads = qkv.view(-1, num_heads + 2 * num_kv_heads, attention.head_dim)
        q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        if attention.q_norm is not None and attention.k_norm is not None:
            norm_heads(q, _plain(attention.q_norm), chained)
            norm_heads(k, _plain(attention.k_norm), chained)
        k_pages, v_pages, step = kv_cache.k_pages[number], kv_cache.v_pages[number], steps[kv_cache.groups[number]]
        gathered = step.attention.attend(q, k, v, step.cos, step.sin, k_pages, v_pages, attention.variant).flatten(1)
        sums, normed = adding_linear(gathered, attention.o.weight, attention.o.bias, sums, norm, chained)
        gated = gated_linear(normed, norm.eps, mlp.gate_up.weight, mlp.gate_up.bias, mlp.activation, chained)
        sums, normed = adding_linear(gated, mlp.down.weight, mlp.down.bias, sums, norms[number + 1], chained)
    return normed_linear(normed, norms[-1].eps, ends.head, None, chained)


def _grouped(block: nn.Module) -> Attention:
    assert isinstance(block, Attention), "few_rows_layers.py serves no other"
    return block


def _dense(feed_forward: nn.Module) -> MLP:
    assert isinstance(feed_forward, MLP), "few_rows_layers.py serves no other"
    return feed_forward


def _plain(norm: nn.Module | None) -> RMSNorm:
    assert isinstance(norm, RMSNorm), "few_rows_layers.py lets no other through"
    return norm
