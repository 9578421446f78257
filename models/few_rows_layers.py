"""Which layers the kernels of few_rows.py compute: those made of the parts that are listed here, and no others.

A layer is compared part by part: the class of every module, every attribute, the dtype and shape of every weight. What
is not listed is refused. A trait that layers.py learns is therefore left to the compiled layers, which are slower but
right, until the kernels have it and it is listed here.

Needs no Triton and no GPU. Called by the decoder when it is built.
"""

from collections.abc import Mapping, Set
from typing import NamedTuple

import torch
from msgspec import structs
from torch import nn

from graphgen.models.layers import MLP, Attention, DecoderLayer, Linear, RMSNorm
from graphgen.models.spec import ModelSpec

K_BLOCK = 128
"""Columns of a weight that a kernel reads at a time: a product's depth is a multiple of it."""
LEAST_COLUMNS = 32
"""Columns of the narrowest program: a product's width is a multiple of it."""
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
"""Their numbers in gated_kernel."""

_DTYPE = torch.bfloat16  # in float16 a norm's product would leave the range, since its division comes last


class _Part(NamedTuple):
    """What a module must be. Attributes of `any_value` are read by the kernels, or do not matter to them."""

    kind: type[nn.Module]
    any_value: Set[str] = frozenset()
    values: Mapping[str, tuple[object, ...]] = {}
    weights: Set[str] = frozenset()
    bias: bool = False  # may have one


_NORM = _Part(RMSNorm, any_value={"eps"}, weights={"weight"})
_LINEAR = _Part(Linear, any_value={"in_features", "out_features"}, weights={"weight"}, bias=True)
_LAYER: Mapping[str, _Part] = {
    "": _Part(DecoderLayer),
    "input_norm": _NORM,
    "attention": _Part(
        Attention,
        any_value={"num_heads", "num_kv_heads", "head_dim", "window"},
        values={"q_norm": (None,), "k_norm": (None,)},  # where the layer has none
    ),
    "attention.qkv": _LINEAR,
    "attention.q_norm": _NORM,
    "attention.k_norm": _NORM,
    "attention.o": _LINEAR,
    "post_attention_norm": _NORM,
    "mlp": _Part(MLP, values={"activation": tuple(ACTIVATIONS)}),
    "mlp.gate_up": _LINEAR,
    "mlp.down": _LINEAR,
}
_HEAD_NORMS = {"attention.q_norm", "attention.k_norm"}  # a layer has both or neither
_ENDS: Mapping[str, _Part] = {
    "embedding": _Part(
        nn.Embedding,
        any_value={"num_embeddings", "embedding_dim", "padding_idx", "norm_type", "scale_grad_by_freq", "sparse"},
        values={"max_norm": (None,)},
        weights={"weight"},
    ),
    "final_norm": _NORM,
    "head": _LINEAR._replace(bias=False),
}
_SPEC_FIELDS = {
    *("architecture", "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size"),
    *("norm_eps", "activation", "qkv_bias", "o_bias", "mlp_bias", "qk_norm", "tie_embeddings", "rope", "windows"),
    *("max_position_embeddings", "bos_token_id", "eos_token_ids", "dtype", "initializer_std"),
}
_ATTRIBUTES_OF_ALL_MODULES = frozenset(vars(nn.Module()))


def serves_model(decoder: nn.Module, spec: ModelSpec) -> bool:
    """Whether the kernels compute all of it: its layers, and what comes before and behind them."""
    parts = dict(decoder.named_children())
    layers = parts.pop("layers")
    return (
        _is_known(spec)
        and set(_ENDS) - set(parts) <= {"head"}
        and _are_made_of(parts, _ENDS)
        and spec.vocab_size % LEAST_COLUMNS == 0
        and all(serves(layer) for layer in layers.children())
    )


def serves(layer: nn.Module) -> bool:
    """Whether the kernels compute this layer."""
    parts = dict(layer.named_modules())
    absent = set(_LAYER) - set(parts)
    return (
        absent in (set(), _HEAD_NORMS)
        and _are_made_of(parts, _LAYER)
        and isinstance(layer, DecoderLayer)
        and _fits(layer)
    )


def _are_made_of(parts: Mapping[str, nn.Module], expected: Mapping[str, _Part]) -> bool:
    return all(path in expected and _is_made_as(expected[path], part) for path, part in parts.items())


def _is_made_as(expected: _Part, part: nn.Module) -> bool:
    attributes = {name: value for name, value in vars(part).items() if name not in _ATTRIBUTES_OF_ALL_MODULES}
    weights = dict(part.named_parameters(recurse=False))
    return (
        type(part) is expected.kind
        and all(
            name in expected.any_value or value in expected.values.get(name, ()) for name, value in attributes.items()
        )
        and expected.weights <= set(weights) <= expected.weights | ({"bias"} if expected.bias else set())
        and all(weight.dtype is _DTYPE for weight in weights.values())
        and not list(part.buffers(recurse=False))
    )


def _fits(layer: DecoderLayer) -> bool:
    """Whether the weights have the shapes that belong together, in whole blocks."""
    attention, mlp = layer.attention, layer.mlp
    hidden_size, ffn_size = attention.qkv.in_features, mlp.down.in_features
    q_size, kv_size = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    shapes: Mapping[str, tuple[int, ...]] = {
        "input_norm": (hidden_size,),
        "attention.qkv": (q_size + 2 * kv_size, hidden_size),
        "attention.q_norm": (attention.head_dim,),
        "attention.k_norm": (attention.head_dim,),
        "attention.o": (hidden_size, q_size),
        "post_attention_norm": (hidden_size,),
        "mlp.gate_up": (2 * ffn_size, hidden_size),
        "mlp.down": (hidden_size, ffn_size),
    }
    weights = {path: weight for path, weight in layer.named_parameters() if not path.endswith(".bias")}
    return (
        all(tuple(weight.shape) == shapes[path.removesuffix(".weight")] for path, weight in weights.items())
        and all(size % K_BLOCK == 0 for size in (hidden_size, q_size, ffn_size))
        and (q_size + 2 * kv_size) % LEAST_COLUMNS == 0
    )


def _is_known(spec: ModelSpec) -> bool:
    """Whether every field is listed, or says nothing. Layers are compared themselves."""
    return all(
        field.name in _SPEC_FIELDS or getattr(spec, field.name) == field.default for field in structs.fields(spec)
    )
