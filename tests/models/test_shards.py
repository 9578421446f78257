"""What two ranks hold of a block adds up to the whole, however the checkpoint lies."""

from typing import Any, NamedTuple

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from graphgen.ipc.errors import ConfigError, UnsupportedModelError
from graphgen.models.attention.backend import StepTensors
from graphgen.models.attention.pages import LayerPages
from graphgen.models.experts.block import MixtureOfExperts
from graphgen.models.families.family import ExpertNames, TensorNames
from graphgen.models.feed_forward import MLP
from graphgen.models.latent import LatentAttention
from graphgen.models.layers import Attention
from graphgen.models.rope import Rope, rotate
from graphgen.models.spec import GQA, WHOLE, Alibi, Dense, Experts, Latent, Norm, QKNorm, RopeSpec, Router, Shard
from graphgen.models.targets import Targets

HIDDEN, ROWS = 24, 5
CPU = torch.device("cpu")
BIASED = GQA(num_heads=4, num_kv_heads=2, head_dim=6, qkv_bias=True, o_bias=True)
FUSED = ("qkv",)


class RotatedPlusValues(NamedTuple):
    """Stands in for attention: lets every KV head through to its group of query heads, so that no pages are needed.
    Sinks and slopes are factors."""

    tables: None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Tensor:
        group, sinks, slopes = q.shape[1] // k.shape[1], rest[1].sinks, rest[1].alibi_slopes
        passed = rotate(q, cos, sin) * (rotate(k, cos, sin) + v).repeat_interleave(group, dim=1)
        passed = passed if slopes is None else passed * slopes[:, None]
        return passed if sinks is None else passed * sinks[:, None]

    def attend_latent(self, q: Tensor, row: Tensor, pages: Tensor, value_size: int, variant: Any) -> Tensor:
        return (q * row[:, None])[..., :value_size] + q[..., value_size:].sum(-1, keepdim=True)


def fill(block: nn.Module, targets: Targets, stored: dict[str, Tensor]) -> None:
    """From a checkpoint of random tensors, which gets those that it lacks."""
    for parameter in block.parameters():
        parameter.data.fill_(float("nan"))
    for name, target in targets:
        target.fill(stored.setdefault(name, torch.randn(target.shape)))
    assert all(parameter.isfinite().all() for parameter in block.parameters()), "a weight was left out"


def attended(spec: GQA, names: TensorNames, rope: RopeSpec, shard: Shard, stored: dict[str, Tensor]) -> Tensor:
    attention = Attention(spec, rope, HIDDEN, torch.float32, shard)
    fill(attention, attention.weights("layer.", names), stored)
    assert {name for name, _ in attention.weights("layer.", names)} == set(stored), "each rank knows every tensor"
    cos, sin = Rope(rope, spec.head_dim, CPU, spec.width)(torch.arange(ROWS), torch.arange(ROWS) + 1, torch.float32)
    nothing = torch.empty(0)
    step = StepTensors(cos, sin, RotatedPlusValues())  # type: ignore[arg-type]  # reads no tables
    x = torch.linspace(-1, 1, ROWS * HIDDEN).view(ROWS, HIDDEN)
    result: Tensor = attention.o(attention(x, LayerPages(nothing, nothing), step))
    return result


ATTENTION = {
    "separate": (BIASED, TensorNames()),
    "blocks, transposed": (BIASED, TensorNames(qkv=FUSED, transposed=True)),
    "groups": (BIASED, TensorNames(qkv=FUSED, qkv_order="groups")),
    "mesh": (GQA(num_heads=8, num_kv_heads=8, head_dim=6), TensorNames(qkv=FUSED, qkv_order="mesh")),
    "one KV head for both ranks": (GQA(num_heads=4, num_kv_heads=1, head_dim=6), TensorNames(qkv=FUSED)),
    "a norm for all heads": (GQA(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=QKNorm(Norm())), TensorNames()),
    "a norm behind the rotation": (
        GQA(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=QKNorm(Norm(), rotated=True)),
        TensorNames(),
    ),
    "norms of each head's own": (
        GQA(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=QKNorm(Norm("layer", bias=True), "own_head")),
        TensorNames(),
    ),
    "a tensor for each head's norm": (
        GQA(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=QKNorm(Norm("layer"), "own_head")),
        TensorNames(q_norm="q.{head}", k_norm="k.{head}"),
    ),
    "sinks": (GQA(num_heads=4, num_kv_heads=2, head_dim=6, sinks=True), TensorNames()),
    "slopes": (GQA(num_heads=4, num_kv_heads=2, head_dim=6, alibi=Alibi()), TensorNames()),
    "padded heads": (GQA(num_heads=4, num_kv_heads=2, head_dim=6, padded_head_dim=16, qkv_bias=True), TensorNames()),
}
ROPES = {"half": RopeSpec(), "interleaved": RopeSpec(rotary_dim=4, interleaved=True)}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("case", ATTENTION)
def test_the_parts_of_attention_add_up(case: str, rope: str) -> None:
    torch.manual_seed(0)
    spec, names = ATTENTION[case]
    stored: dict[str, Tensor] = {}
    whole = attended(spec, names, ROPES[rope], WHOLE, stored)
    parts = [attended(spec, names, ROPES[rope], Shard(rank, 2), stored) for rank in range(2)]
    assert not torch.allclose(parts[0], parts[1])
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-4, atol=1e-4)


LATENT = Latent(num_heads=4, latent_size=10, plain_dim=5, rope_dim=6, value_dim=7, bias=True)


def latently_attended(spec: Latent, rope: RopeSpec, shard: Shard, stored: dict[str, Tensor]) -> Tensor:
    attention = LatentAttention(spec, rope, HIDDEN, torch.float32, shard)
    fill(attention, attention.weights("layer.", TensorNames()), stored)
    cos, sin = Rope(rope, spec.rope_dim, CPU)(torch.arange(ROWS), torch.arange(ROWS) + 1, torch.float32)
    nothing = torch.empty(0)
    step = StepTensors(cos, sin, RotatedPlusValues())  # type: ignore[arg-type]  # reads no tables
    x = torch.linspace(-1, 1, ROWS * HIDDEN).view(ROWS, HIDDEN)
    result: Tensor = attention.o(attention(x, LayerPages(nothing, nothing), step))
    return result


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("q_rank", [None, 8])
def test_the_parts_of_latent_attention_add_up(q_rank: int | None, interleaved: bool) -> None:
    torch.manual_seed(0)
    spec, rope = replace(LATENT, q_rank=q_rank), RopeSpec(interleaved=interleaved)
    stored: dict[str, Tensor] = {}
    whole = latently_attended(spec, rope, WHOLE, stored)
    parts = [latently_attended(spec, rope, Shard(rank, 2), stored) for rank in range(2)]
    assert not torch.allclose(parts[0], parts[1])
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-4, atol=1e-4)


def fed_forward(spec: Dense, names: TensorNames, shard: Shard, stored: dict[str, Tensor]) -> Tensor:
    mlp = MLP(spec, HIDDEN, torch.float32, shard)
    fill(mlp, mlp.weights("layer.", names), stored)
    assert {name for name, _ in mlp.weights("layer.", names)} == set(stored), "each rank knows every tensor"
    result: Tensor = mlp(torch.linspace(-1, 1, ROWS * HIDDEN).view(ROWS, HIDDEN))
    return result


FEED_FORWARD = {
    "separate": (Dense(size=10, activation="silu", bias=True), TensorNames()),
    "fused": (Dense(size=10, activation="gelu"), TensorNames(gate_up=("gate_up",))),
    "plain, transposed": (
        Dense(size=10, activation="relu_squared", gated=False, bias=True),
        TensorNames(gate_up=("up",), transposed=True),
    ),
    "a learned activation": (Dense(size=10, activation="xielu", gated=False), TensorNames(gate_up=("up",))),
}


@pytest.mark.parametrize("case", FEED_FORWARD)
def test_the_parts_of_a_feed_forward_add_up(case: str) -> None:
    torch.manual_seed(0)
    spec, names = FEED_FORWARD[case]
    stored: dict[str, Tensor] = {}
    whole = fed_forward(spec, names, WHOLE, stored)
    parts = [fed_forward(spec, names, Shard(rank, 2), stored) for rank in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-4, atol=1e-4)


def mixed(spec: Experts, names: ExpertNames, shard: Shard, stored: dict[str, Tensor]) -> Tensor:
    block = MixtureOfExperts(spec, HIDDEN, torch.float32, shard)
    fill(block, block.weights("layer.", TensorNames(experts=names)), stored)
    result: Tensor = block(torch.linspace(-1, 1, ROWS * HIDDEN).view(ROWS, HIDDEN), None)
    return result


EXPERTS = Experts(num_experts=4, top_k=2, size=10, activation="silu", router=Router())
BIASED_EXPERTS = replace(EXPERTS, bias=True, limit=1.0, up_plus_one=True, router=Router(bias=True, correction=True))
STACKED = ExpertNames(gate_up=("gate_up",), down="down")
MIXTURES = {
    "a tensor for each expert": (EXPERTS, ExpertNames()),
    "gate and up stacked": (BIASED_EXPERTS, ExpertNames(gate_up=("gate", "up"), down="down")),
    "stacked": (replace(BIASED_EXPERTS, input_scaled=True), STACKED),
    "transposed, alternating": (BIASED_EXPERTS, replace(STACKED, transposed=True, alternating=True)),
    "shared": (replace(EXPERTS, shared=Dense(size=6, activation="gelu"), shared_gate=True), ExpertNames()),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_the_parts_of_a_mixture_of_experts_add_up(case: str) -> None:
    torch.manual_seed(0)
    spec, names = MIXTURES[case]
    stored: dict[str, Tensor] = {}
    whole = mixed(spec, names, WHOLE, stored)
    parts = [mixed(spec, names, Shard(rank, 2), stored) for rank in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-4, atol=1e-4)


def test_experts_are_the_same_however_they_are_stored() -> None:
    torch.manual_seed(0)
    stored: dict[str, Tensor] = {}
    whole = mixed(EXPERTS, ExpertNames(), WHOLE, stored)
    gate, up, down = (
        torch.stack([stored[f"layer.mlp.experts.{expert}.{name}_proj.weight"] for expert in range(4)])
        for name in ("gate", "up", "down")
    )
    both = torch.cat((gate, up), dim=1)
    alternating = torch.stack((gate, up), dim=2).flatten(1, 2)
    for names, own in (
        (STACKED, (both, down)),
        (replace(STACKED, transposed=True), (both.mT, down.mT)),
        (replace(STACKED, transposed=True, alternating=True), (alternating.mT, down.mT)),
    ):
        stored.update(zip(("layer.gate_up", "layer.down"), own, strict=True))
        assert torch.equal(mixed(EXPERTS, names, WHOLE, stored), whole)


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 attention heads cannot be shared by 2 ranks"):
        Attention(GQA(num_heads=3, num_kv_heads=3, head_dim=4), RopeSpec(), HIDDEN, torch.float32, Shard(0, 2))
    with pytest.raises(ConfigError, match="9 inner columns of a feed-forward cannot be shared by 2 ranks"):
        MLP(Dense(size=9, activation="silu"), HIDDEN, torch.float32, Shard(1, 2))
    with pytest.raises(ConfigError, match="10 inner columns of an expert cannot be shared by 4 ranks"):
        MixtureOfExperts(EXPERTS, HIDDEN, torch.float32, Shard(0, 4))
    normed = GQA(num_heads=4, num_kv_heads=2, head_dim=4, qk_norm=QKNorm(Norm(), "all_heads"))
    with pytest.raises(UnsupportedModelError, match="2 ranks would share heads that are normed together"):
        Attention(normed, RopeSpec(), HIDDEN, torch.float32, Shard(0, 2))
