"""The fused kernels of few rows serve the models that they compute, and refuse one that differs in any trait."""

from typing import Any

import msgspec
import pytest
import torch
from msgspec.structs import replace

from graphgen.models.few_rows_layers import serves, serves_model
from graphgen.models.spec import (
    GQA,
    NO_ROPE,
    Alibi,
    Dense,
    Embedding,
    Experts,
    Head,
    Layer,
    ModelSpec,
    Norm,
    QKNorm,
    RopeSpec,
    Router,
    Temperature,
)

HIDDEN = 256
NORM = Norm(eps=1e-5)
ATTENTION = GQA(num_heads=4, num_kv_heads=2, head_dim=64)
LAYER = Layer(mixer=ATTENTION, feed_forward=Dense(size=384, activation="silu"), input_norm=NORM, ff_norm=Norm(eps=1e-6))
SPEC = ModelSpec(
    family="LlamaForCausalLM",
    architecture="LlamaForCausalLM",
    vocab_size=96,
    hidden_size=HIDDEN,
    layers=(LAYER, LAYER),
    ropes=(RopeSpec(),),
    embedding=Embedding(),
    final_norm=NORM,
    head=Head(),
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_ids=(),
    dtype="bfloat16",
    initializer_std=0.02,
)


def with_mixer(**changes: Any) -> Layer:
    return replace(LAYER, mixer=replace(ATTENTION, **changes))


def with_ff(**changes: Any) -> Layer:
    return replace(LAYER, feed_forward=replace(LAYER.feed_forward, **changes))


SERVED = {
    "llama": LAYER,
    "qwen2": with_mixer(qkv_bias=True),
    "qwen3": with_mixer(qk_norm=QKNorm(NORM)),
    "mistral": with_mixer(window=4096),
    "a scale of the scores": with_mixer(scale=0.1),
    "padded heads": with_mixer(head_dim=40, padded_head_dim=64),
    "all_biases": replace(with_ff(bias=True), mixer=replace(ATTENTION, qkv_bias=True, o_bias=True)),
    "gelu": with_ff(activation="gelu"),
    "gelu_tanh": with_ff(activation="gelu_tanh"),
    "head_dim_32": with_mixer(num_heads=8, head_dim=32),
    "wide_heads": with_mixer(num_heads=2, num_kv_heads=1, head_dim=256),
}


@pytest.mark.parametrize("case", SERVED)
def test_layers_of_the_kernels_traits_are_served(case: str) -> None:
    assert serves(SERVED[case], HIDDEN)
    assert serves_model(replace(SPEC, layers=(LAYER, SERVED[case])), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    assert not serves_model(SPEC, dtype)


OTHER_NORMS = {
    "a mean": Norm("layer", eps=1e-5),
    "no weight": Norm(eps=1e-5, weight=False),
    "a bias": Norm(eps=1e-5, bias=True),
    "one added to the weight": Norm(eps=1e-5, plus_one=True),
    "a weight of float32": Norm(eps=1e-5, round_first=False),
}
TRAITS = {
    **{f"an input norm with {name}": replace(LAYER, input_norm=norm) for name, norm in OTHER_NORMS.items()},
    **{f"a second norm with {name}": replace(LAYER, ff_norm=norm) for name, norm in OTHER_NORMS.items()},
    **{f"head norms with {name}": with_mixer(qk_norm=QKNorm(norm)) for name, norm in OTHER_NORMS.items()},
    "no input norm": replace(LAYER, input_norm=None),
    "no second norm": replace(LAYER, ff_norm=None),
    "a norm behind attention": replace(LAYER, mixer_output_norm=NORM),
    "a norm behind the feed-forward": replace(LAYER, ff_output_norm=NORM),
    "a norm on the stream": replace(LAYER, output_norm=NORM),
    "parallel blocks": replace(LAYER, parallel=True),
    "a shared norm": replace(LAYER, shared_norm=True),
    "a residual from the norm": replace(LAYER, residual_from_norm=True),
    "a residual's factor": replace(LAYER, residual_scale=0.22),
    "norms of each head's own": with_mixer(qk_norm=QKNorm(NORM, "own_head")),
    "a norm of all heads": with_mixer(qk_norm=QKNorm(NORM, "all_heads")),
    "head norms of padded heads": with_mixer(head_dim=40, padded_head_dim=64, qk_norm=QKNorm(NORM)),
    "norms behind the rotation": with_mixer(qk_norm=QKNorm(NORM, rotated=True)),
    "clipped qkv": with_mixer(clip=8.0),
    "segments": with_mixer(segment=8192),
    "a soft cap": with_mixer(softcap=50.0),
    "slopes": with_mixer(alibi=Alibi()),
    "sinks": with_mixer(sinks=True),
    "a second rope": with_mixer(rope=1),
    "an activation of its own": with_ff(activation="relu"),
    "no gate": with_ff(gated=False),
    "a feed-forward off the blocks": with_ff(size=320),
    "heads off the blocks": with_mixer(num_heads=3, num_kv_heads=1),
    "kv heads off the blocks": with_mixer(num_heads=16, num_kv_heads=1, head_dim=8),
}


@pytest.mark.parametrize("trait", TRAITS)
def test_a_layer_with_another_trait_is_refused(trait: str) -> None:
    assert not serves(TRAITS[trait], HIDDEN)
    assert not serves_model(replace(SPEC, layers=(LAYER, TRAITS[trait])), torch.bfloat16), "one layer is enough"


def test_experts_are_refused() -> None:
    experts = Experts(num_experts=4, top_k=1, size=384, activation="silu", router=Router())
    assert not serves(replace(LAYER, feed_forward=experts), HIDDEN)


def test_every_field_of_a_layer_is_among_the_cases() -> None:
    """Otherwise a new field could pass unseen."""
    layers = [*SERVED.values(), *TRAITS.values()]
    groups: list[tuple[msgspec.Struct, list[Any]]] = [
        (LAYER, list(layers)),
        (LAYER.mixer, [layer.mixer for layer in layers]),
        (LAYER.feed_forward, [layer.feed_forward for layer in layers]),
    ]
    for base, parts in groups:
        for field in msgspec.structs.fields(type(base)):
            value = getattr(base, field.name)
            assert any(getattr(part, field.name) != value for part in parts), field.name


class Elsewhere(Layer, frozen=True, kw_only=True):
    """A field that the kernels' author has never seen."""

    gain: float = 1.0


def test_a_field_that_nobody_listed_is_refused() -> None:
    fields = {name: getattr(LAYER, name) for name in Layer.__struct_fields__}
    assert not serves(Elsewhere(**fields, gain=2.0), HIDDEN)


ENDS: dict[str, dict[str, Any]] = {
    "a norm's mean": {"final_norm": Norm("layer")},
    "no final norm": {"final_norm": None},
    "a head's bias": {"head": Head(bias=True)},
    "a head's scale": {"head": Head(scale=0.1)},
    "capped logits": {"head": Head(softcap=30.0)},
    "learned positions": {"embedding": Embedding(num_positions=8)},
    "a scaled embedding": {"embedding": Embedding(scale=16.0)},
    "a narrow embedding": {"embedding": Embedding(size=32)},
    "a temperature": {"ropes": (RopeSpec(temperature=Temperature(0.1, 8192)),)},
    "two ropes": {"ropes": (RopeSpec(), NO_ROPE)},
    "a hidden size off the blocks": {"hidden_size": 192},
    "a vocabulary off the blocks": {"vocab_size": 97},
}


@pytest.mark.parametrize("trait", ENDS)
def test_other_ends_of_a_model_are_refused(trait: str) -> None:
    assert serves_model(SPEC, torch.bfloat16)
    assert serves_model(replace(SPEC, head=Head(tied=True)), torch.bfloat16)
    assert not serves_model(replace(SPEC, **ENDS[trait]), torch.bfloat16)
