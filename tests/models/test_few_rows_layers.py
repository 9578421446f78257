"""The fused kernels of few rows serve the layers that they compute, and refuse a layer that differs in any trait."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from graphgen.models.decoder import Decoder
from graphgen.models.few_rows_layers import serves, serves_model
from graphgen.models.layers import DecoderLayer, Linear, RMSNorm
from graphgen.models.spec import ModelSpec, RopeSpec

EPS = 1e-5
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 256, 4, 2, 64, 384


def spec_with(**changes: Any) -> ModelSpec:
    """Of the least sizes that the kernels take; any field may differ, hence Any."""
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 96,
        "hidden_size": HIDDEN,
        "num_layers": 2,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "ffn_size": FFN,
        "norm_eps": EPS,
        "activation": "silu",
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "tie_embeddings": False,
        "rope": RopeSpec(),
        "windows": (None, None),
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_ids": (),
        "dtype": "bfloat16",
        "initializer_std": 0.02,
    }
    return ModelSpec(**fields | changes)


def make_decoder(spec: ModelSpec, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    return Decoder(spec, dtype, torch.device("cpu"))


def make_layer(**changes: Any) -> DecoderLayer:
    layer = make_decoder(spec_with(**changes)).layers[0]
    assert isinstance(layer, DecoderLayer)
    return layer


SERVED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "tie_embeddings": True},
    "qwen3": {"qk_norm": True},
    "mistral": {"windows": (4096, 4096)},
    "windows_by_layer": {"windows": (None, 512)},
    "all_biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "rope_scaled": {"rope": RopeSpec("llama3", 5e5, 8.0, 256)},
    "head_dim_32": {"num_heads": 8, "head_dim": 32},
    "wide_heads": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 256},
}


@pytest.mark.parametrize("case", SERVED)
def test_models_of_the_kernels_traits_are_served(case: str) -> None:
    spec = spec_with(**SERVED[case])
    decoder = make_decoder(spec)
    assert serves_model(decoder, spec)
    assert all(serves(layer) for layer in decoder.layers)


# --- one trait at a time -------------------------------------------------------------------------------------------


class ShiftedNorm(RMSNorm):
    """Gemma's (1 + weight)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x


class OtherLayer(DecoderLayer):
    """Any other order of the same parts: parallel, sandwich, post-norm."""


def bf16(module: nn.Module) -> nn.Module:
    return module.to(torch.bfloat16)


def set_part(path: str, make: Callable[[], object]) -> Callable[[DecoderLayer], None]:
    """Sets an attribute of a part, which may be a part or a weight itself."""

    def change(layer: DecoderLayer) -> None:
        parent, _, name = path.rpartition(".")
        setattr(layer.get_submodule(parent), name, make())

    return change


def to(dtype: torch.dtype) -> Callable[[DecoderLayer], None]:
    def change(layer: DecoderLayer) -> None:
        layer.to(dtype)

    return change


def retype(layer: DecoderLayer) -> None:
    layer.__class__ = OtherLayer


def add_mask_buffer(layer: DecoderLayer) -> None:
    layer.attention.register_buffer("bias_table", torch.zeros(2))


def plain_feed_forward(layer: DecoderLayer) -> None:
    """Without a gate: up alone."""
    layer.mlp.gate_up = Linear(HIDDEN, FFN, False, torch.bfloat16)


TRAITS: dict[str, Callable[[DecoderLayer], None]] = {
    "float16": to(torch.float16),
    "float32": to(torch.float32),
    "one weight of float32": set_part("input_norm.weight", lambda: nn.Parameter(torch.ones(HIDDEN))),
    "a norm's mean": set_part("input_norm", lambda: bf16(nn.LayerNorm(HIDDEN))),
    "a norm's bias": set_part("input_norm.bias", lambda: nn.Parameter(torch.ones(HIDDEN, dtype=torch.bfloat16))),
    "a norm without weight": set_part("input_norm.weight", lambda: None),
    "a norm with another formula": set_part("post_attention_norm", lambda: ShiftedNorm(HIDDEN, EPS, torch.bfloat16)),
    "a norm's flag": set_part("post_attention_norm.rounds_first", lambda: False),
    "a third norm": set_part("post_mlp_norm", lambda: RMSNorm(HIDDEN, EPS, torch.bfloat16)),
    "no second norm": lambda layer: delattr(layer, "post_attention_norm"),
    "the order of the parts": retype,
    "a residual's factor": set_part("residual_scale", lambda: 0.22),
    "a forward of its own": set_part("mlp.forward", lambda: nn.Identity.forward),
    "a norm of q alone": set_part("attention.q_norm", lambda: RMSNorm(HEAD_DIM, EPS, torch.bfloat16)),
    "an attention scale": set_part("attention.scale", lambda: 0.1),
    "a soft cap": set_part("attention.softcap", lambda: 50.0),
    "sinks": set_part("attention.sinks", lambda: nn.Parameter(torch.zeros(HEADS, dtype=torch.bfloat16))),
    "a table of biases": add_mask_buffer,
    "a gate of attention": set_part("attention.gate", lambda: Linear(HIDDEN, HIDDEN, False, torch.bfloat16)),
    "weights of another format": set_part("mlp.down", lambda: bf16(nn.Linear(FFN, HIDDEN, bias=False))),
    "clipped qkv": set_part("attention.qkv.clip", lambda: 8.0),
    "an activation of its own": set_part("mlp.activation", lambda: "relu2"),
    "a limit of the activation": set_part("mlp.limit", lambda: 7.0),
    "no gate": plain_feed_forward,
    "experts": set_part("mlp", lambda: nn.ModuleList([nn.Identity()])),
    "a hidden size off the blocks": lambda layer: resize(layer, hidden_size=192),
    "a feed-forward off the blocks": lambda layer: resize(layer, ffn_size=320),
    "heads off the blocks": lambda layer: resize(layer, num_heads=3, num_kv_heads=1),
    "kv heads off the blocks": lambda layer: resize(layer, num_heads=16, num_kv_heads=1, head_dim=8),
}


def resize(layer: DecoderLayer, **sizes: int) -> None:
    layer.__dict__.update(make_layer(**sizes).__dict__)


@pytest.mark.parametrize("trait", TRAITS)
def test_a_layer_with_another_trait_is_refused(trait: str) -> None:
    layer = make_layer()
    assert serves(layer)
    TRAITS[trait](layer)
    assert not serves(layer)


def test_head_norms_over_the_whole_width_are_refused() -> None:
    layer = make_layer(qk_norm=True)
    assert serves(layer)
    for name, width in (("q_norm", HEADS * HEAD_DIM), ("k_norm", KV_HEADS * HEAD_DIM)):
        setattr(layer.attention, name, RMSNorm(width, EPS, torch.bfloat16))
    assert not serves(layer)


def test_one_layer_of_another_kind_is_enough_to_refuse_a_model() -> None:
    spec = spec_with()
    decoder = make_decoder(spec)
    decoder.layers[1].attention.softcap = 50.0  # type: ignore[union-attr]
    assert serves(decoder.layers[0])
    assert not serves_model(decoder, spec)


class ScaledSpec(ModelSpec, frozen=True, kw_only=True):
    """A field that the kernels' author has never seen."""

    embedding_scale: float = 1.0


def test_a_field_of_the_model_that_nobody_listed_must_say_nothing() -> None:
    decoder = make_decoder(spec_with())
    fields = {name: getattr(spec_with(), name) for name in ModelSpec.__struct_fields__}
    assert serves_model(decoder, ScaledSpec(**fields))
    assert not serves_model(decoder, ScaledSpec(**fields, embedding_scale=16.0))


ENDS: dict[str, Callable[[Decoder], None]] = {
    "a norm's mean": lambda decoder: setattr(decoder, "final_norm", bf16(nn.LayerNorm(HIDDEN))),
    "a head's bias": lambda decoder: setattr(decoder, "head", Linear(HIDDEN, 96, True, torch.bfloat16)),
    "learned positions": lambda decoder: setattr(decoder, "positions", bf16(nn.Embedding(8, HIDDEN))),
    "no final norm": lambda decoder: delattr(decoder, "final_norm"),
}


@pytest.mark.parametrize("trait", ENDS)
def test_other_ends_of_a_model_are_refused(trait: str) -> None:
    spec = spec_with()
    decoder = make_decoder(spec)
    ENDS[trait](decoder)
    assert not serves_model(decoder, spec)


def test_a_vocabulary_off_the_blocks_is_refused() -> None:
    for vocab_size, served in ((95, False), (96, True), (97, False)):
        spec = spec_with(vocab_size=vocab_size)
        assert serves_model(make_decoder(spec), spec) is served
