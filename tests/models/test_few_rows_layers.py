"""The fused kernels of few rows serve the models that they compute, and refuse one that differs in any trait."""

from typing import Any

import msgspec
import pytest
import torch
from msgspec.structs import replace

from graphgen.models.few_rows_layers import (
    MOST_ROWS,
    MOST_ROWS_OF_E4M3,
    MOST_ROWS_OF_EXPERTS,
    MOST_ROWS_OF_INT4,
    MOST_ROWS_OF_MADE,
    most_rows,
    reads_fitted,
    serves_feed_forward,
    serves_mixer,
    serves_model,
    serves_rank,
)
from graphgen.models.spec import (
    GQA,
    NO_ROPE,
    Alibi,
    Dense,
    Embedding,
    Experts,
    Head,
    Latent,
    Layer,
    LinearFormat,
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


def test_a_rank_is_served_where_its_parts_are() -> None:
    assert serves_rank(SPEC.shared_by(2), torch.bfloat16, 1)
    assert not serves_rank(SPEC.shared_by(2), torch.bfloat16, 2), "48 rows of the head"
    wide = replace(SPEC, vocab_size=128)
    assert serves_rank(wide.shared_by(2), torch.bfloat16, 2)
    assert most_rows(wide) == most_rows(wide, 2) == MOST_ROWS > most_rows(wide, 4) > 16
    rounded = LinearFormat(storage="e4m3", activation="e4m3")
    in_e4m3 = replace(wide, layers=(LAYER, with_mixer(o_format=rounded)))
    assert [most_rows(in_e4m3, num_ranks) for num_ranks in (1, 2, 4, 16)] == [MOST_ROWS_OF_E4M3, 16, 16, 6]
    narrow = replace(wide, layers=(LAYER, with_ff(size=192)))
    assert serves_model(narrow, torch.bfloat16)
    assert not serves_rank(narrow.shared_by(2), torch.bfloat16, 2), "96 inner columns"
    experts = replace(wide, layers=(LAYER, with_experts(size=128)))
    assert serves_model(experts, torch.bfloat16)
    assert not serves_rank(experts.shared_by(2), torch.bfloat16, 2)


def with_mixer(**changes: Any) -> Layer:
    return replace(LAYER, mixer=replace(ATTENTION, **changes))


def with_ff(**changes: Any) -> Layer:
    return replace(LAYER, feed_forward=replace(LAYER.feed_forward, **changes))


EXPERTS = Experts(num_experts=8, top_k=2, size=192, activation="silu", router=Router())
LATENT = Latent(num_heads=4, latent_size=64, plain_dim=32, rope_dim=16, value_dim=32)


FORMAT, GROUPS_OF_48 = LinearFormat(storage="int4"), LinearFormat(storage="int4", group=48)


def with_experts(**changes: Any) -> Layer:
    return replace(LAYER, feed_forward=replace(EXPERTS, **changes))


def with_router(**changes: Any) -> Layer:
    return with_experts(router=Router(**changes))


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
    "a norm of all heads": with_mixer(qk_norm=QKNorm(NORM, "all_heads")),
    "segments": with_mixer(segment=8192),
    "a soft cap": with_mixer(softcap=50.0),
    "slopes": with_mixer(alibi=Alibi()),
    "sinks": with_mixer(sinks=True),
    "a second rope": with_mixer(rope=1),
    "norms with weights of float32": replace(
        LAYER, input_norm=Norm(eps=1e-5, round_first=False), ff_norm=Norm(eps=1e-5, round_first=False)
    ),
    "mixtral": with_router(renormalise=True),
    "gpt-oss": with_experts(
        activation="quick_gelu", router=Router(bias=True, renormalise=True), bias=True, limit=7.0, up_plus_one=True
    ),
    "glm-4.5": with_experts(
        router=Router(score="sigmoid", correction=True, renormalise=True, scale=2.5),
        shared=Dense(size=320, activation="silu"),
    ),
    "qwen2-moe": with_experts(shared=Dense(size=320, activation="silu"), shared_gate=True),
    "one group of experts": with_router(score="sigmoid", correction=True, group_score="top_two"),
    "groups that are all kept": with_router(num_groups=4, kept_groups=4),
    "many experts of a row": with_experts(num_experts=64, top_k=64),
    "squares": with_experts(activation="relu_squared"),
    "formats of experts": with_experts(size=256, gate_up_format=FORMAT, down_format=LinearFormat(storage="e4m3")),
    "formats": with_mixer(qkv_format=FORMAT, o_format=LinearFormat(storage="e4m3", group=128, rows=128)),
    "formats of a feed-forward": with_ff(
        gate_up_format=LinearFormat(storage="int4", group=32, zeros=True), down_format=LinearFormat(storage="int8")
    ),
}


@pytest.mark.parametrize("case", SERVED)
def test_layers_of_the_kernels_traits_are_served(case: str) -> None:
    assert serves_mixer(SERVED[case], HIDDEN)
    assert serves_feed_forward(SERVED[case], HIDDEN)
    assert serves_model(replace(SPEC, layers=(LAYER, SERVED[case])), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    assert not serves_model(SPEC, dtype)


OTHER_NORMS = {
    "a mean": Norm("layer", eps=1e-5),
    "no weight": Norm(eps=1e-5, weight=False),
    "a bias": Norm(eps=1e-5, bias=True),
    "one added to the weight": Norm(eps=1e-5, plus_one=True),
}
OTHER_HEAD_NORMS = {**OTHER_NORMS, "a weight of float32": Norm(eps=1e-5, round_first=False)}
MIXERS = {
    **{f"head norms with {name}": with_mixer(qk_norm=QKNorm(norm)) for name, norm in OTHER_HEAD_NORMS.items()},
    "norms of each head's own": with_mixer(qk_norm=QKNorm(NORM, "own_head")),
    "head norms of padded heads": with_mixer(head_dim=40, padded_head_dim=64, qk_norm=QKNorm(NORM)),
    "norms behind the rotation": with_mixer(qk_norm=QKNorm(NORM, rotated=True)),
    "clipped qkv": with_mixer(clip=8.0),
    "kv heads off the blocks": with_mixer(num_heads=16, num_kv_heads=1, head_dim=8),
    "latent attention": replace(LAYER, mixer=LATENT),
    "groups of qkv off the blocks": with_mixer(qkv_format=GROUPS_OF_48),
    "latents in formats": replace(
        LAYER, mixer=replace(LATENT, q_rank=32, q_down_format=FORMAT, q_up_format=FORMAT, kv_down_format=FORMAT)
    ),
    "latents of every trait": replace(LAYER, mixer=replace(LATENT, q_rank=32, bias=True, norm=Norm("layer"), rope=1)),
}
"""Layers whose first half has no kernels."""
FEED_FORWARDS = {
    "an activation of its own": with_ff(activation="relu"),
    "no gate": with_ff(gated=False),
    "a feed-forward off the blocks": with_ff(size=352),
    "experts off the blocks": with_experts(size=160),
    "experts off the blocks of int4": with_experts(down_format=FORMAT),
    "scaled inputs": with_experts(input_scaled=True),
    "sparsemixer": with_router(score="sparsemixer", jitter=0.01),
    "a jitter": with_router(jitter=0.01),
    "groups of experts": with_router(num_groups=4, kept_groups=2),
    "more experts than a program ranks": with_experts(num_experts=520),
    "more experts of a row than pairs": with_experts(num_experts=128, top_k=65),
    "a shared expert of another kind": with_experts(shared=Dense(size=320, activation="relu")),
    "heads off the blocks": with_mixer(num_heads=3, num_kv_heads=1, head_dim=32),
    "groups of the output off the blocks": with_mixer(o_format=GROUPS_OF_48),
    "a latent's output off the blocks of int4": replace(LAYER, mixer=replace(LATENT, value_dim=48, o_format=FORMAT)),
    "groups of gate and up off the blocks": with_ff(gate_up_format=GROUPS_OF_48),
    "a feed-forward off the blocks of int4": with_ff(size=320, down_format=FORMAT),
    "zeros of int8": with_ff(down_format=LinearFormat(storage="int8", zeros=True)),
    "a shared expert off the blocks of int4": with_experts(
        shared=Dense(size=320, activation="silu", down_format=FORMAT)
    ),
    "latents off the blocks": replace(LAYER, mixer=replace(LATENT, value_dim=8)),
}
"""Layers whose second half has none, so the model runs without."""
BOTH = {
    **{f"an input norm with {name}": replace(LAYER, input_norm=norm) for name, norm in OTHER_NORMS.items()},
    **{f"a second norm with {name}": replace(LAYER, ff_norm=norm) for name, norm in OTHER_NORMS.items()},
    "no input norm": replace(LAYER, input_norm=None),
    "no second norm": replace(LAYER, ff_norm=None),
    "a norm behind attention": replace(LAYER, mixer_output_norm=NORM),
    "a norm behind the feed-forward": replace(LAYER, ff_output_norm=NORM),
    "a norm on the stream": replace(LAYER, output_norm=NORM),
    "parallel blocks": replace(LAYER, parallel=True),
    "a shared norm": replace(LAYER, shared_norm=True),
    "a residual from the norm": replace(LAYER, residual_from_norm=True),
    "a residual's factor": replace(LAYER, residual_scale=0.22),
}


@pytest.mark.parametrize("trait", MIXERS)
def test_a_mixer_with_another_trait_is_left_to_the_plain_layer(trait: str) -> None:
    assert not serves_mixer(MIXERS[trait], HIDDEN)
    assert serves_feed_forward(MIXERS[trait], HIDDEN)
    assert serves_model(replace(SPEC, layers=(LAYER, MIXERS[trait])), torch.bfloat16)


@pytest.mark.parametrize("trait", FEED_FORWARDS)
def test_a_second_half_with_another_trait_is_refused(trait: str) -> None:
    assert not serves_feed_forward(FEED_FORWARDS[trait], HIDDEN)
    assert not serves_model(replace(SPEC, layers=(LAYER, FEED_FORWARDS[trait])), torch.bfloat16), "one layer is enough"


@pytest.mark.parametrize("trait", BOTH)
def test_another_way_to_the_residual_stream_is_refused(trait: str) -> None:
    assert not serves_mixer(BOTH[trait], HIDDEN)
    assert not serves_feed_forward(BOTH[trait], HIDDEN)
    assert not serves_model(replace(SPEC, layers=(LAYER, BOTH[trait])), torch.bfloat16), "one layer is enough"


def test_as_many_rows_are_served_as_have_few_pairs_with_their_experts() -> None:
    assert most_rows(SPEC) == MOST_ROWS
    assert most_rows(replace(SPEC, layers=(LAYER, with_mixer(o_format=LinearFormat(storage="int8"))))) == MOST_ROWS
    for rounded, most in (
        (LinearFormat(storage="e4m3", activation="e4m3"), MOST_ROWS_OF_E4M3),
        (LinearFormat(storage="e4m3", activation="e4m3", rows=128, group=128), MOST_ROWS_OF_E4M3),
        (LinearFormat(storage="e4m3", activation="e4m3", group=128), MOST_ROWS_OF_MADE),
        (LinearFormat(storage="int8", activation="e4m3"), MOST_ROWS_OF_MADE),
        (LinearFormat(storage="int4"), MOST_ROWS_OF_INT4),
        (LinearFormat(storage="int4", group=64), MOST_ROWS_OF_INT4),
        (LinearFormat(storage="int4", group=32), MOST_ROWS_OF_MADE),
        (LinearFormat(storage="int4", group=192), MOST_ROWS_OF_MADE),
        (LinearFormat(storage="int4", group=128, rows=2), MOST_ROWS_OF_MADE),
    ):
        spec = replace(SPEC, layers=(LAYER, with_mixer(o_format=rounded)))
        assert most_rows(spec) == most
        assert most_rows(spec, reads_codes=False) == MOST_ROWS_OF_MADE
    assert most_rows(replace(SPEC, layers=(LAYER, with_experts(num_experts=128, top_k=8)))) == MOST_ROWS_OF_EXPERTS
    in_int4 = with_experts(num_experts=128, top_k=8, gate_up_format=FORMAT, down_format=FORMAT)
    assert most_rows(replace(SPEC, layers=(LAYER, in_int4))) == MOST_ROWS_OF_EXPERTS
    assert most_rows(replace(SPEC, layers=(LAYER, with_experts(num_experts=512, top_k=32)))) == 2, "64 pairs at most"
    assert most_rows(replace(SPEC, layers=(with_experts(num_experts=64), with_experts(num_experts=32, top_k=6)))) == 2
    assert most_rows(replace(SPEC, layers=(with_experts(num_experts=2, top_k=2),))) == 1, "one row has no others"


def test_every_field_of_a_layer_is_among_the_cases() -> None:
    """Otherwise a new field could pass unseen."""
    layers = [*SERVED.values(), *MIXERS.values(), *FEED_FORWARDS.values(), *BOTH.values()]
    feed_forwards = [layer.feed_forward for layer in layers]
    of_experts = [part for part in feed_forwards if isinstance(part, Experts)]
    groups: list[tuple[msgspec.Struct, list[Any]]] = [
        (LAYER, list(layers)),
        (LAYER.mixer, [layer.mixer for layer in layers if isinstance(layer.mixer, GQA)]),
        (LATENT, [layer.mixer for layer in layers if isinstance(layer.mixer, Latent)]),
        (LAYER.feed_forward, [part for part in feed_forwards if isinstance(part, Dense)]),
        (EXPERTS, list(of_experts)),
        (EXPERTS.router, [part.router for part in of_experts]),
    ]
    for base, parts in groups:
        for field in msgspec.structs.fields(type(base)):
            if type(base) is Latent and field.name in ("num_heads", "latent_size", "plain_dim", "rope_dim", "window"):
                continue  # sizes that concern the first half alone; no latent has a window
            value = getattr(base, field.name)
            assert any(getattr(part, field.name) != value for part in parts), field.name


class Elsewhere(Layer, frozen=True, kw_only=True):
    """A field that the kernels' author has never seen."""

    gain: float = 1.0


def test_a_field_that_nobody_listed_is_refused() -> None:
    fields = {name: getattr(LAYER, name) for name in Layer.__struct_fields__}
    assert not serves_mixer(Elsewhere(**fields, gain=2.0), HIDDEN)
    assert not serves_feed_forward(Elsewhere(**fields, gain=2.0), HIDDEN)


class OtherAttention(GQA, frozen=True, tag="other", kw_only=True):
    """A mixer with a field that nobody listed: it may concern the output projection."""

    o_scale: float = 1.0


def test_a_mixer_of_another_kind_is_refused() -> None:
    mixer = OtherAttention(num_heads=4, num_kv_heads=2, head_dim=64)
    assert not serves_mixer(replace(LAYER, mixer=mixer), HIDDEN)
    assert not serves_feed_forward(replace(LAYER, mixer=mixer), HIDDEN)


ENDS: dict[str, dict[str, Any]] = {
    "a norm's mean": {"final_norm": Norm("layer")},
    "no final norm": {"final_norm": None},
    "a head's bias": {"head": Head(bias=True)},
    "a head's scale": {"head": Head(scale=0.1)},
    "capped logits": {"head": Head(softcap=30.0)},
    "learned positions": {"embedding": Embedding(num_positions=8)},
    "a scaled embedding": {"embedding": Embedding(scale=16.0)},
    "a narrow embedding": {"embedding": Embedding(size=32)},
    "a hidden size off the blocks": {"hidden_size": 224},
    "a vocabulary off the blocks": {"vocab_size": 97},
}


@pytest.mark.parametrize("trait", ENDS)
def test_other_ends_of_a_model_are_refused(trait: str) -> None:
    assert serves_model(SPEC, torch.bfloat16)
    assert serves_model(replace(SPEC, head=Head(tied=True)), torch.bfloat16)
    assert serves_model(replace(SPEC, ropes=(RopeSpec(temperature=Temperature(0.1, 8192)), NO_ROPE)), torch.bfloat16)
    assert not serves_model(replace(SPEC, **ENDS[trait]), torch.bfloat16)


def test_a_format_that_was_fitted_is_read_or_the_model_is_refused() -> None:
    """Groups of 128 whose heads were padded are such of 16 columns, of which the spec knows nothing."""
    stored = LinearFormat(storage="int4", group=128)
    spec = SPEC.with_formats(lambda _, place: stored)
    assert reads_fitted(spec, [(stored, 256), (None, 256), (replace(stored, group=32), 256)])
    assert not reads_fitted(spec, [(stored, 256), (replace(stored, group=16), 256)])
