"""The building blocks of a decoder: RMSNorm, attention, gated MLP, and the layer of
them.

Owns the arithmetic, in the order of operations of Hugging Face, so that bfloat16 rounds alike. Knows no layer
number, no checkpoint name and no bucket: every layer of a model traces to the same graph, except that each
distinct attention window is a graph of its own. Built and called by decoder.py.

Shapes: `T` token rows, `Hq`/`Hkv` heads, `D` head size.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphgen.models.attention.backend import FULL_ATTENTION, StepTensors
from graphgen.models.spec import ModelSpec

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467), in float32, rounded before the
    weight."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Linear(nn.Linear):
    """A linear layer whose weights are uninitialised memory: the loader fills them."""

    def __init__(self, in_size: int, out_size: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_size, out_size, bias=bias, dtype=dtype)
        self.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Called by nn.Linear to initialise."""


class Attention(nn.Module):
    """Grouped-query attention over the paged KV cache."""

    def __init__(self, spec: ModelSpec, window: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.window = FULL_ATTENTION if window is None else window
        self.qkv = Linear(spec.hidden_size, spec.q_size + 2 * spec.kv_size, spec.qkv_bias, dtype)
        self.o = Linear(spec.q_size, spec.hidden_size, spec.o_bias, dtype)
        self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps, dtype) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps, dtype) if spec.qk_norm else None

    def forward(
        self,
        x: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        step: StepTensors,
    ) -> Tensor:
        """What each head of each row gathered, [T, Hq * D]: the input of the output projection `o`."""
        qkv = self.qkv(x).unflatten(-1, (self.num_heads + 2 * self.num_kv_heads, self.head_dim))
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        gathered = step.attention.attend(q, k, v, step.cos, step.sin, k_pages, v_pages, self.window)
        return gathered.flatten(1)


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation = spec.activation
        self.gate_up = Linear(spec.hidden_size, 2 * spec.ffn_size, spec.mlp_bias, dtype)
        self.down = Linear(spec.ffn_size, spec.hidden_size, spec.mlp_bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(ACTIVATIONS[self.activation](gate) * up)
        return out


class DecoderLayer(nn.Module):
    """One pre-norm block, in two halves with nothing between them that a compiler could fuse.

    Attention needs every row of a step, since later rows read its keys and values; what follows treats each row
    alone, so after the last layer's attention the rows whose result nobody reads can be left out.

    Takes and returns the residual stream as two terms, `residual + update`: their sum is formed where the
    next norm reads it, so a compiled layer has one kernel for both instead of two around the layer's edge.
    """

    def __init__(self, spec: ModelSpec, window: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype)
        self.attention = Attention(spec, window, dtype)
        self.post_attention_norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype)
        self.mlp = MLP(spec, dtype)

    def attend(
        self,
        residual: Tensor,
        update: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        step: StepTensors,
    ) -> tuple[Tensor, Tensor]:
        """residual, update: [T, hidden]. Returns their sum and what attention gathered, [T, Hq * D]."""
        residual = residual + update
        return residual, self.attention(self.input_norm(residual), k_pages, v_pages, step)

    def feed_forward(self, residual: Tensor, gathered: Tensor) -> tuple[Tensor, Tensor]:
        """The rest, over any rows of attend's result: the new (residual, update)."""
        attended = self.attention.o(gathered)
        # In float32 the sum rounds as it would in bfloat16, and the compiler leaves it to the norm that reads it;
        # an addition in the matrices' own dtype it would move into the product, at the price of a copy kernel.
        residual = (residual.float() + attended.float()).to(residual.dtype)
        return residual, self.mlp(self.post_attention_norm(residual))
