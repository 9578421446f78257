"""Which models the kernels of few_rows.py compute: those made of the parts that are written here, and no others.

A layer is compared with one that has its sizes and nothing else that is particular. A trait that layers learn is
therefore left to the compiled layers, which are slower but right, until the kernels have it and it is written here.

Needs no Triton and no GPU. Called by the decoder when it is built.
"""

import torch

from graphgen.models.spec import GQA, Dense, Embedding, Head, Layer, ModelSpec, Norm, QKNorm

K_BLOCK = 128
"""Columns of a weight that a kernel reads at a time: a product's depth is a multiple of it."""
LEAST_COLUMNS = 32
"""Columns of the narrowest program: a product's width is a multiple of it."""
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
"""Their numbers in gated_kernel."""

_DTYPE = torch.bfloat16  # in float16 a norm's product would leave the range, since its division comes last


def serves_model(spec: ModelSpec, dtype: torch.dtype) -> bool:
    """Whether the kernels compute all of it: its layers, and what comes before and behind them."""
    return (
        dtype is _DTYPE
        and spec.embedding == Embedding()
        and spec.head == Head(tied=spec.head.tied)
        and _is_plain(spec.final_norm)
        and len(spec.ropes) == 1
        and spec.ropes[0].temperature is None
        and spec.vocab_size % LEAST_COLUMNS == 0
        and all(serves(layer, spec.hidden_size) for layer in spec.layers)
    )


def serves(layer: Layer, hidden_size: int) -> bool:
    """Whether the kernels compute this layer."""
    mixer, feed_forward = layer.mixer, layer.feed_forward
    if type(mixer) is not GQA or type(feed_forward) is not Dense:
        return False
    known = Layer(
        mixer=GQA(
            num_heads=mixer.num_heads,
            num_kv_heads=mixer.num_kv_heads,
            head_dim=mixer.head_dim,
            padded_head_dim=mixer.padded_head_dim,
            scale=mixer.scale,
            qkv_bias=mixer.qkv_bias,
            o_bias=mixer.o_bias,
            qk_norm=mixer.qk_norm,
            window=mixer.window,
        ),
        feed_forward=Dense(size=feed_forward.size, activation=feed_forward.activation, bias=feed_forward.bias),
        input_norm=layer.input_norm,
        ff_norm=layer.ff_norm,
    )
    return (
        layer == known
        and _is_plain(layer.input_norm)
        and _is_plain(layer.ff_norm)
        and _norms_heads_plainly(mixer)
        and feed_forward.activation in ACTIVATIONS
        and all(size % K_BLOCK == 0 for size in (hidden_size, mixer.q_size, feed_forward.size))
        and (mixer.q_size + 2 * mixer.kv_size) % LEAST_COLUMNS == 0
    )


def _is_plain(norm: Norm | None) -> bool:
    return norm is not None and norm == Norm(eps=norm.eps)


def _norms_heads_plainly(mixer: GQA) -> bool:
    norm = mixer.qk_norm
    return norm is None or (norm == QKNorm(norm.norm) and _is_plain(norm.norm) and mixer.padded_head_dim is None)
