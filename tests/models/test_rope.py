"""cos and sin of every rope kind equal those of Hugging Face."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from graphgen.models.families import spec_from_hf
from graphgen.models.rope import Rope, inverse_frequencies
from graphgen.models.spec import RopeSpec
from tests.models import tiny

CPU = torch.device("cpu")
HEAD_DIM = 64


def config_of(kind: str, **parameters: float) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=256,
        architectures=["LlamaForCausalLM"],
        rope_parameters={**tiny.rope(kind, theta=500_000.0), **parameters},
    )


def rope_of(config: LlamaConfig) -> RopeSpec:
    return spec_from_hf(config).ropes[0]


@pytest.mark.parametrize("kind", [*tiny.ROPE_KINDS, "yarn_mscale"])
def test_frequencies_and_attention_factor_equal_the_reference(kind: str) -> None:
    config = config_of("yarn", mscale=0.7, mscale_all_dim=0.4) if kind == "yarn_mscale" else config_of(kind)
    rope = rope_of(config)
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[rope.kind](config, CPU)
    torch.testing.assert_close(inverse_frequencies(rope, HEAD_DIM), frequencies, rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(attention_factor)


def test_every_kind_differs_from_the_default() -> None:
    plain = inverse_frequencies(RopeSpec(theta=500_000.0), HEAD_DIM)
    for kind in tiny.ROPE_KINDS:
        rope = rope_of(config_of(kind))
        if rope.kind != "dynamic":
            assert not torch.allclose(inverse_frequencies(rope, HEAD_DIM), plain)


@pytest.mark.parametrize("kind", tiny.ROPE_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cos_and_sin_equal_the_reference(kind: str, dtype: torch.dtype) -> None:
    config = config_of(kind)
    positions = torch.arange(200)  # below the maximum of `dynamic`, which has tests of its own
    wanted = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=dtype), positions[None])
    got = Rope(rope_of(config), HEAD_DIM, CPU)(positions, positions + 1, dtype)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs[0], rtol=1e-5, atol=1e-5)


def test_each_dynamic_row_has_the_frequencies_of_its_own_length() -> None:
    config = config_of("dynamic")
    lens = [1, 255, 256, 257, 300, 1000]
    positions = torch.tensor([0, 254, 255, 256, 7, 999])
    cos, sin = Rope(rope_of(config), HEAD_DIM, CPU)(positions, torch.tensor(lens), torch.float32)
    for row, length in enumerate(lens):
        frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, CPU, seq_len=length)
        angles = (positions[row] * frequencies).repeat(2)
        torch.testing.assert_close(cos[row], angles.cos(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sin[row], angles.sin(), rtol=1e-4, atol=1e-4)
