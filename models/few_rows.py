"""Decoder layers over a few token rows: five Triton kernels a layer, each launched while the one ahead still runs. CUDA
only.

With a few rows a step does little but read weights, and what it loses is the time between kernels, when memory is
idle: the smallest product reads for 8 us and takes 12. Here every kernel is launched under its predecessor
(programmatic dependent launch) and waits inside for its data, gate, up and activation are one kernel, and the norms
have none of their own. A product that ends in the residual stream adds to it, multiplies the sums by the next norm's
weight, and leaves the sum of squares of its columns; the product behind the norm divides its result by the root mean
square of each row. That is RMSNorm, with a factor that is the same for all inputs of a row taken out of the product.

The arithmetic of layers.py, but that the norm rounds once where layers.py rounds twice. Owns no weights. Called by the
decoder in place of all its layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from graphgen.models.attention.tables import RowTables
from graphgen.models.chaining import can_chain, launch_options
from graphgen.models.kv_cache import KVCache
from graphgen.models.layers import DecoderLayer, RMSNorm
from graphgen.models.spec import ModelSpec

MOST_ROWS = 64
"""With more rows a product is no longer a matter of reading weights, and cuBLAS is faster."""

_K_BLOCK = 128
_LEAST_COLUMNS = 32
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


def can_run(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels are written for this model and device; else the compiled layers serve few rows too.

    bfloat16 only: before its division a norm's product would leave float16's range.
    """
    sizes = (spec.hidden_size, spec.q_size, spec.ffn_size)
    return (
        device.type == "cuda"
        and can_chain()
        and dtype is torch.bfloat16
        and all(size % _K_BLOCK == 0 for size in sizes)
        and all(size % _LEAST_COLUMNS == 0 for size in (spec.q_size + 2 * spec.kv_size, spec.vocab_size))
    )


class Normed(NamedTuple):
    """RMSNorm of rows, but for the division by the root mean square, which falls to the reader."""

    scaled: Tensor
    """[T, hidden]: the rows times the norm's weight."""
    squares: Tensor
    """[T, parts] float32: sums of the squares of the rows, each over a part of the columns."""


# --- kernels ---------------------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _product(
    x: "tl.tensor",
    weight_rows: "tl.tensor",
    num_rows: int,
    K: int,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> "tl.tensor":
    """[BM, BN] float32: rows of x, [num_rows, K], times BN rows of a weight."""
    rows = tl.arange(0, BM)[:, None]
    depth = tl.arange(0, BK)
    result = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        left = tl.load(x + rows * K + k + depth[None, :], rows < num_rows, other=0.0)
        result = tl.dot(left, tl.load(weight_rows + k + depth[:, None]), result)
    return result


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _over_rms(
    squares: "tl.tensor",
    num_rows: int,
    num_parts: int,
    size: int,
    eps: float,
    BM: tl.constexpr,
    PARTS: tl.constexpr,
) -> "tl.tensor":
    """[BM, 1] float32: one over the root mean square of each row of `size` elements."""
    rows = tl.arange(0, BM)[:, None]
    parts = tl.arange(0, PARTS)[None, :]
    inside = (rows < num_rows) & (parts < num_parts)
    total = tl.sum(tl.load(squares + rows * num_parts + parts, inside, other=0.0), 1)
    return tl.rsqrt(total / size + eps)[:, None]


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _store_normed(
    sums: "tl.tensor",
    places: "tl.tensor",
    columns: "tl.tensor",
    rows: "tl.tensor",
    num_rows: int,
    norm_weight: "tl.tensor",
    out: "tl.tensor",
    scaled: "tl.tensor",
    squares: "tl.tensor",
) -> None:
    """Stores a block of the residual stream, and what the norm's reader needs of it. sums: [BM, BN], rounded."""
    tl.store(out + places, sums, rows < num_rows)
    wide = sums.to(tl.float32)
    weight = tl.load(norm_weight + columns).to(tl.float32)[None, :]
    tl.store(scaled + places, (wide * weight).to(scaled.dtype.element_ty), rows < num_rows)
    part = rows * tl.num_programs(0) + tl.program_id(0)
    tl.store(squares + part, tl.sum(wide * wide, 1)[:, None], rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # triton has no types
def _embed_kernel(
    token_ids: "tl.tensor",
    table: "tl.tensor",
    norm_weight: "tl.tensor",
    out: "tl.tensor",
    scaled: "tl.tensor",
    squares: "tl.tensor",
    num_rows: int,
    N: int,
    BM: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.arange(0, BM)[:, None]
    token = tl.load(token_ids + rows, rows < num_rows, other=0)
    embedded = tl.load(table + token * N + columns[None, :], rows < num_rows, other=0.0)
    _store_normed(embedded, rows * N + columns[None, :], columns, rows, num_rows, norm_weight, out, scaled, squares)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # triton has no types
def _normed_linear_kernel(
    x: "tl.tensor",
    squares: "tl.tensor",
    weight: "tl.tensor",
    bias: "tl.tensor",
    out: "tl.tensor",
    num_rows: int,
    num_parts: int,
    eps: float,
    N: int,
    K: int,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """out = x / rms @ weight.T + bias."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    if CHAINED:
        gdc_wait()
    over_rms = _over_rms(squares, num_rows, num_parts, K, eps, BM, PARTS)
    result = _product(x, weight + columns.to(tl.int64)[None, :] * K, num_rows, K, BM, BN, BK)
    if CHAINED:
        gdc_launch_dependents()
    result *= over_rms
    if HAS_BIAS:
        result += tl.load(bias + columns).to(tl.float32)[None, :]
    rows = tl.arange(0, BM)[:, None]
    tl.store(out + rows * N + columns[None, :], result.to(out.dtype.element_ty), rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # triton has no types
def _adding_linear_kernel(
    x: "tl.tensor",
    weight: "tl.tensor",
    bias: "tl.tensor",
    residual: "tl.tensor",
    norm_weight: "tl.tensor",
    out: "tl.tensor",
    scaled: "tl.tensor",
    squares: "tl.tensor",
    num_rows: int,
    N: int,
    K: int,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """out = residual + x @ weight.T + bias, and its norm begun."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.arange(0, BM)[:, None]
    places = rows * N + columns[None, :]
    if CHAINED:
        gdc_wait()
    before = tl.load(residual + places, rows < num_rows, other=0.0)
    result = _product(x, weight + columns.to(tl.int64)[None, :] * K, num_rows, K, BM, BN, BK)
    if CHAINED:
        gdc_launch_dependents()
    if HAS_BIAS:
        result += tl.load(bias + columns).to(tl.float32)[None, :]
    # As where the product is stored and read again.
    sums = (before.to(tl.float32) + result.to(before.dtype).to(tl.float32)).to(before.dtype)
    _store_normed(sums, places, columns, rows, num_rows, norm_weight, out, scaled, squares)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # triton has no types
def _gated_kernel(
    x: "tl.tensor",
    squares: "tl.tensor",
    weight: "tl.tensor",
    bias: "tl.tensor",
    out: "tl.tensor",
    num_rows: int,
    num_parts: int,
    eps: float,
    F: int,
    K: int,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """activation(x / rms @ gate.T) * (x / rms @ up.T); the weight is gate's F rows, then up's."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    gate_rows = weight + columns.to(tl.int64)[None, :] * K
    up_rows = gate_rows + tl.full([1], F, tl.int64) * K
    if CHAINED:
        gdc_wait()
    over_rms = _over_rms(squares, num_rows, num_parts, K, eps, BM, PARTS)
    rows = tl.arange(0, BM)[:, None]
    depth = tl.arange(0, BK)
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        left = tl.load(x + rows * K + k + depth[None, :], rows < num_rows, other=0.0)
        gate = tl.dot(left, tl.load(gate_rows + k + depth[:, None]), gate)
        up = tl.dot(left, tl.load(up_rows + k + depth[:, None]), up)
    if CHAINED:
        gdc_launch_dependents()
    gate *= over_rms
    up *= over_rms
    if HAS_BIAS:
        gate += tl.load(bias + columns).to(tl.float32)[None, :]
        up += tl.load(bias + F + columns).to(tl.float32)[None, :]
    # As where gate and up are stored and read again: both are rounded, and so is the activation.
    gate = gate.to(out.dtype.element_ty).to(tl.float32)
    up = up.to(out.dtype.element_ty).to(tl.float32)
    if ACTIVATION == 0:
        active = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == 1:
        active = 0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = gate / (1.0 + tl.exp(-2.0 * inner))
    result = active.to(out.dtype.element_ty).to(tl.float32) * up
    tl.store(out + rows * F + columns[None, :], result.to(out.dtype.element_ty), rows < num_rows)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _norm_heads_kernel(
    heads: "tl.tensor",
    weight: "tl.tensor",
    row_stride: int,
    size: int,
    eps: float,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """RMSNorm of every head, in place. One program a row and head."""
    dims = tl.arange(0, BLOCK)
    places = tl.program_id(0).to(tl.int64) * row_stride + tl.program_id(1) * size + dims
    inside = dims < size
    scale = tl.load(weight + dims, inside, other=0.0).to(tl.float32)
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.load(heads + places, inside, other=0.0).to(tl.float32)
    unit = (head * tl.rsqrt(tl.sum(head * head) / size + eps)).to(heads.dtype.element_ty)
    tl.store(heads + places, (unit.to(tl.float32) * scale).to(heads.dtype.element_ty), inside)


# --- launches --------------------------------------------------------------------------------------------------


def _row_block(num_rows: int) -> int:
    """Rows a program multiplies: what one tensor core takes at least, or what a group of four does."""
    return 16 if num_rows <= 16 else 64


def _column_block(size: int) -> int:
    """Columns of a program that makes a product `size` wide."""
    # Two thirds of the multiprocessors with 16 KiB stages beat all of them with 8 KiB ones.
    return 64 if size % 64 == 0 and size // 64 >= 88 else _LEAST_COLUMNS


def _product_options(num_rows: int, size: int, chained: bool) -> dict[str, int | bool]:
    stages = 8 if _column_block(size) == _LEAST_COLUMNS else 6 if num_rows <= 16 else 5
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
    _embed_kernel[(size // block,)](
        token_ids, table, norm.weight, sums, *normed, num_rows, size, _row_block(num_rows), block
    )
    return sums, normed


def normed_linear(x: Normed, eps: float, weight: Tensor, bias: Tensor | None, chained: bool) -> Tensor:
    """RMSNorm @ weight.T + bias, [T, N], for at most MOST_ROWS rows. weight: [N, K], K a multiple of 128."""
    num_rows, depth = x.scaled.shape
    size, num_parts = weight.shape[0], x.squares.shape[1]
    out = torch.empty((num_rows, size), dtype=x.scaled.dtype, device=x.scaled.device)
    block = _column_block(size)
    _normed_linear_kernel[(size // block,)](
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
        _K_BLOCK,
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
    _adding_linear_kernel[(size // block,)](
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
        _K_BLOCK,
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
    block = 64 if size % 64 == 0 else _LEAST_COLUMNS
    _gated_kernel[(size // block,)](
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
        _ACTIVATIONS[activation],
        bias is not None,
        rows,
        block,
        _K_BLOCK,
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
    _norm_heads_kernel[(num_rows, num_heads)](
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


# --- the layers ------------------------------------------------------------------------------------------------


class Ends(NamedTuple):
    """What comes before and behind the layers."""

    embedding: Tensor  # [V, hidden]
    norm: RMSNorm
    head: Tensor  # [V, hidden]


def next_logits(
    ends: Ends,
    layers: Sequence[DecoderLayer],
    activation: str,
    token_ids: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_cache: KVCache,
    tables: RowTables,
    extra: list[Tensor],
    chained: bool,
) -> Tensor:
    """Logits, [T, V], of at most MOST_ROWS decode rows. token_ids: [T] int64; cos, sin: [T, D].

    chained=False launches every kernel after the one ahead.
    """
    next_norms = [*(layer.input_norm for layer in layers[1:]), ends.norm]
    sums, normed = embed(token_ids, ends.embedding, layers[0].input_norm)
    for number, (layer, next_norm) in enumerate(zip(layers, next_norms, strict=True)):
        attention, mlp, norm = layer.attention, layer.mlp, layer.post_attention_norm
        qkv = normed_linear(normed, layer.input_norm.eps, attention.qkv.weight, attention.qkv.bias, chained)
        num_heads, num_kv_heads = attention.num_heads, attention.num_kv_heads
        heads = qkv.view(-1, num_heads + 2 * num_kv_heads, attention.head_dim)
        q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        if attention.q_norm is not None and attention.k_norm is not None:
            norm_heads(q, attention.q_norm, chained)
            norm_heads(k, attention.k_norm, chained)
        k_pages, v_pages = kv_cache.k_pages[number], kv_cache.v_pages[number]
        gathered = attention.attend(q, k, v, cos, sin, k_pages, v_pages, *tables, extra, attention.window).flatten(1)
        sums, normed = adding_linear(gathered, attention.o.weight, attention.o.bias, sums, norm, chained)
        gated = gated_linear(normed, norm.eps, mlp.gate_up.weight, mlp.gate_up.bias, activation, chained)
        sums, normed = adding_linear(gated, mlp.down.weight, mlp.down.bias, sums, next_norm, chained)
    return normed_linear(normed, ends.norm.eps, ends.head, None, chained)
