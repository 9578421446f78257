"""A decoder layer over a few token rows: eight Triton kernels, each launched while the one ahead still runs. CUDA only.

With a few rows a step does little but read weights, and what it loses is the time between kernels, when memory is
idle: the smallest product reads for 8 us and takes 12. Here every kernel is launched under its predecessor
(programmatic dependent launch) and waits inside for its data, and gate, up and activation are one kernel. On an H200
with an 8B model products and norms of a layer take 111 us at one row, where cuBLAS and separate kernels take 130.

Same arithmetic as layers.py, roundings included. Owns no weights. Called by the decoder in place of the compiled layer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from graphgen.models.attention.tables import RowTables
from graphgen.models.chaining import can_chain, launch_options
from graphgen.models.compilation import RunLayer
from graphgen.models.layers import DecoderLayer, RMSNorm
from graphgen.models.spec import ModelSpec

MOST_ROWS = 64
"""With more rows a product is no longer a matter of reading weights, and cuBLAS is faster."""

_K_BLOCK = 128
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


def can_run(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels are written for this model and device; else the compiled layers serve few rows too."""
    sizes = (spec.hidden_size, spec.q_size, spec.ffn_size)
    return (
        device.type == "cuda"
        and can_chain()
        and dtype in (torch.bfloat16, torch.float16)
        and all(size % _K_BLOCK == 0 for size in sizes)
        and (spec.q_size + 2 * spec.kv_size) % 32 == 0
    )


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


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # triton has no types
def _linear_kernel(
    x: "tl.tensor",
    weight: "tl.tensor",
    bias: "tl.tensor",
    out: "tl.tensor",
    num_rows: int,
    N: int,
    K: int,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    if CHAINED:
        gdc_wait()
    result = _product(x, weight + columns.to(tl.int64)[None, :] * K, num_rows, K, BM, BN, BK)
    if CHAINED:
        gdc_launch_dependents()
    if HAS_BIAS:
        result += tl.load(bias + columns).to(tl.float32)[None, :]
    rows = tl.arange(0, BM)[:, None]
    tl.store(out + rows * N + columns[None, :], result.to(out.dtype.element_ty), rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # triton has no types
def _gated_kernel(
    x: "tl.tensor",
    weight: "tl.tensor",
    bias: "tl.tensor",
    out: "tl.tensor",
    num_rows: int,
    F: int,
    K: int,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """activation(x @ gate.T) * (x @ up.T); the weight is gate's F rows, then up's."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    gate_rows = weight + columns.to(tl.int64)[None, :] * K
    up_rows = gate_rows + tl.full([1], F, tl.int64) * K
    if CHAINED:
        gdc_wait()
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
def _add_norm_kernel(
    residual: "tl.tensor",
    update: "tl.tensor",
    weight: "tl.tensor",
    sums: "tl.tensor",
    normed: "tl.tensor",
    size: int,
    eps: float,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """sums = residual + update; normed = RMSNorm(sums). One program a row."""
    places = tl.program_id(0).to(tl.int64) * size + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < size
    scale = tl.load(weight + tl.arange(0, BLOCK), inside, other=0.0).to(tl.float32)
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.load(residual + places, inside, other=0.0).to(tl.float32)
    total += tl.load(update + places, inside, other=0.0).to(tl.float32)
    rounded = total.to(sums.dtype.element_ty)
    tl.store(sums + places, rounded, inside)
    wide = rounded.to(tl.float32)
    unit = (wide * tl.rsqrt(tl.sum(wide * wide) / size + eps)).to(sums.dtype.element_ty)
    tl.store(normed + places, (unit.to(tl.float32) * scale).to(sums.dtype.element_ty), inside)


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


def _row_block(num_rows: int) -> int:
    """Rows a program multiplies: what one tensor core takes at least, or what a group of four does."""
    return 16 if num_rows <= 16 else 64


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, chained: bool) -> Tensor:
    """x @ weight.T + bias for at most MOST_ROWS rows. x: [T, K] contiguous, K a multiple of 128; weight: [N, K]."""
    num_rows, depth = x.shape
    size = weight.shape[0]
    out = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
    # Two thirds of the multiprocessors with 16 KiB stages beat all of them with 8 KiB ones.
    wide = size % 64 == 0 and size // 64 >= 88
    rows = _row_block(num_rows)
    block, stages = (64, 6 if rows == 16 else 5) if wide else (32, 8)
    _linear_kernel[(size // block,)](
        x,
        weight,
        bias,
        out,
        num_rows,
        size,
        depth,
        bias is not None,
        rows,
        block,
        _K_BLOCK,
        chained,
        num_warps=4,
        num_stages=stages,
        **launch_options(chained),
    )
    return out


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, chained: bool) -> Tensor:
    """activation(x @ gate.T) * (x @ up.T), [T, F], for at most MOST_ROWS rows. weight: [2 F, K], gate before up."""
    num_rows, depth = x.shape
    size = weight.shape[0] // 2
    out = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
    rows = _row_block(num_rows)
    block = 64 if size % 64 == 0 else 32
    _gated_kernel[(size // block,)](
        x,
        weight,
        bias,
        out,
        num_rows,
        size,
        depth,
        _ACTIVATIONS[activation],
        bias is not None,
        rows,
        block,
        _K_BLOCK,
        chained,
        num_warps=4,
        num_stages=3 if rows == 16 else 4,
        **launch_options(chained),
    )
    return out


def add_norm(residual: Tensor, update: Tensor, norm: RMSNorm, chained: bool) -> tuple[Tensor, Tensor]:
    """(residual + update, RMSNorm of it), both [T, hidden]."""
    sums, normed = torch.empty_like(residual), torch.empty_like(residual)
    num_rows, size = residual.shape
    block = triton.next_power_of_2(size)
    _add_norm_kernel[(num_rows,)](
        residual,
        update,
        norm.weight,
        sums,
        normed,
        size,
        norm.eps,
        block,
        chained,
        num_warps=8,
        **launch_options(chained),
    )
    return sums, normed


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


def few_rows_layer(activation: str, chained: bool = True) -> RunLayer:
    """The layer for a model with this activation. chained=False launches every kernel after the one ahead."""

    def run(
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
        attention, mlp = layer.attention, layer.mlp
        num_heads, num_kv_heads = attention.num_heads, attention.num_kv_heads
        residual, normed = add_norm(residual, update, layer.input_norm, chained)
        qkv = linear(normed, attention.qkv.weight, attention.qkv.bias, chained)
        heads = qkv.view(-1, num_heads + 2 * num_kv_heads, attention.head_dim)
        q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        if attention.q_norm is not None and attention.k_norm is not None:
            norm_heads(q, attention.q_norm, chained)
            norm_heads(k, attention.k_norm, chained)
        mixed = attention.attend(q, k, v, cos, sin, k_pages, v_pages, *tables, extra, attention.window)
        attended = linear(mixed.flatten(1), attention.o.weight, attention.o.bias, chained)
        residual, normed = add_norm(residual, attended, layer.post_attention_norm, chained)
        gated = gated_linear(normed, mlp.gate_up.weight, mlp.gate_up.bias, activation, chained)
        return residual, linear(gated, mlp.down.weight, mlp.down.bias, chained)

    return run
