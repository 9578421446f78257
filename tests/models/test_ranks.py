"""Ranks that share a model compute together what one computes alone: logits of families of every kin."""

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from graphgen.ipc.errors import ConfigError, UnsupportedModelError
from graphgen.models.families import load_spec
from graphgen.models.layers import DecoderLayer
from graphgen.models.loader import load_decoder
from graphgen.models.spec import GQA, Dense, Experts, Layer, LinearFormat, Norm, RopeSpec, Router, Shard
from tests.models import tiny
from tests.models.driver import Driver
from tests.models.splits import run_mixed, tokens
from tests.models.thread_ranks import ThreadRank, on_ranks

CPU = torch.device("cpu")
CASES = (
    *("llama", "qwen2", "gpt2", "neox", "gptj", "phi", "falcon_40b", "bloom", "mpt", "cohere2", "gemma2", "gemma3"),
    *("opt", "mixtral", "gpt_oss", "glm4_moe", "llama4_experts", "deepseek_v2", "deepseek_v3"),
)
"""Layers that are sequential and parallel, heads with biases and tied ones, experts, latents. None has a vocabulary
that two or four ranks divide."""
KV_HEADS: dict[str, Any] = {"num_key_value_heads": 2, "num_kv_heads": 2}


def logits_of(folder: Path, rank: ThreadRank | None) -> Tensor:
    """Of several prompts in random pieces, mixed with each other."""
    spec = load_spec(folder)
    own = spec if rank is None else spec.shared_by(rank.shard.size)
    driver = Driver(load_decoder(folder, spec, torch.float32, CPU, ranks=rank), spec=own)
    return torch.cat(run_mixed(driver, [driver.request(tokens(length, length)) for length in (40, 9, 1)], seed=1))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_the_logits_of_one(case: str, tmp_path: Path) -> None:
    tiny.save(case, tmp_path, **KV_HEADS)
    alone = logits_of(tmp_path, None)
    for together in on_ranks(2, lambda rank: logits_of(tmp_path, rank)):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_four_ranks_may_hold_two_kv_heads_twice(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path, num_attention_heads=4, num_key_value_heads=2)
    alone = logits_of(tmp_path, None)
    for together in on_ranks(4, lambda rank: logits_of(tmp_path, rank)):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


HIDDEN = 8
LAYER = Layer(
    mixer=GQA(num_heads=4, num_kv_heads=2, head_dim=2),
    feed_forward=Dense(size=8, activation="silu"),
    input_norm=Norm(),
    ff_norm=Norm(),
    residual_scale=0.5,
)
LAYERS = {
    "sequential": (LAYER, 2),
    "parallel": (replace(LAYER, parallel=True), 1),
    "parallel with a norm behind each": (replace(LAYER, parallel=True, mixer_output_norm=Norm()), 1),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_adds_up_as_rarely_as_it_can(case: str) -> None:
    spec, num_reductions = LAYERS[case]

    def run(rank: ThreadRank | None) -> Tensor:
        torch.manual_seed(0)
        layer = DecoderLayer(spec, [RopeSpec()], HIDDEN, torch.float32, rank)
        for parameter in layer.parameters():
            parameter.fill_(0.1)
        gathered = torch.arange(24.0).view(3, 8)
        if rank is not None:
            gathered = gathered[:, 4 * rank.shard.rank :][:, :4]
        with torch.no_grad():
            residual, update = layer.feed_forward(torch.ones(3, HIDDEN), gathered)
        assert rank is None or rank.num_reductions == num_reductions
        return residual + update

    with torch.no_grad():
        alone = run(None)
    for together in on_ranks(2, lambda rank: torch.no_grad()(run)(rank)):
        torch.testing.assert_close(together, alone)


def test_what_ranks_cannot_share_is_refused_by_name() -> None:
    layer = replace(LAYER, feed_forward=Dense(size=9, activation="silu"))
    with pytest.raises(ConfigError, match="9 inner columns of a feed-forward cannot be shared by 2 ranks"):
        layer.shared_by(2)
    with pytest.raises(ConfigError, match="4 attention heads cannot be shared by 3 ranks"):
        LAYER.shared_by(3)
    experts = Experts(num_experts=4, top_k=2, size=6, activation="silu", router=Router())
    with pytest.raises(ConfigError, match="6 inner columns of an expert cannot be shared by 4 ranks"):
        replace(LAYER, feed_forward=experts).shared_by(4)


@pytest.mark.parametrize("case", ["olmo2", "minimax_m2", "olmoe"])
def test_heads_that_are_normed_together_stay_together(case: str) -> None:
    spec = tiny.spec_of(tiny.build(case, num_key_value_heads=2))
    assert spec.shared_by(1) is spec
    with pytest.raises(UnsupportedModelError, match="2 ranks would share heads that are normed together"):
        spec.shared_by(2)


def test_a_format_whose_groups_ranks_would_cut_apart_is_refused() -> None:
    form = LinearFormat(storage="int4", group=128, scale_dtype="float16")
    form.check_shared(512, 2, "x")
    form.check_shared(64, 2, "x")  # each group of 128 becomes two of 64
    with pytest.raises(ConfigError, match="int4 g128, of which 2 ranks have 40 columns each"):
        form.check_shared(40, 2, "the down projection")
    with pytest.raises(ConfigError, match="g_idx"):
        replace(form, permuted=True).check_shared(512, 2, "the down projection")
    form.check_shared(40, 1, "x")
    replace(form, storage="int8", group=None).check_shared(41, 2, "x")
    dense = Dense(size=1280, activation="silu", down_format=form)
    assert dense.shared_by(4).size == 320
    with pytest.raises(ConfigError, match="8 ranks have 160 columns each"):
        replace(dense, down_format=replace(form, group=100)).shared_by(8)


def test_a_rank_holds_its_share_of_the_weights(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path, **KV_HEADS)
    spec = load_spec(tmp_path)
    decoders = on_ranks(2, lambda rank: load_decoder(tmp_path, spec, torch.float32, CPU, ranks=rank))
    for decoder in decoders:
        assert sum(weight.nbytes for weight in decoder.parameters()) == spec.rank_weight_bytes("float32", 2)
    assert spec.rank_weight_bytes("float32", 1) == spec.weight_bytes("float32")
    assert Shard(1, 2).part(4, "x") == range(2, 4)
