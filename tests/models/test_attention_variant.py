"""The formula of variant.py against transformers, which every family is held to in the end."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.masking_utils import causal_mask_function, chunked_overlay, sliding_window_overlay
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from graphgen.models.attention.variant import Numbers, alibi_slopes, temperatures
from tests.models.attention_cases import Rules, by_hand

NUM_ROWS, HEADS, KV_HEADS, HEAD_DIM = 23, 6, 2, 8
SINKS = torch.linspace(-2.0, 3.0, HEADS)


def mask(rule: Rules) -> torch.Tensor:
    """[rows, positions], 0 where a row sees and -inf elsewhere, from transformers' own mask functions."""
    overlays = [causal_mask_function]
    if rule.window:
        overlays.append(sliding_window_overlay(rule.window))
    if rule.segment:
        overlays.append(chunked_overlay(rule.segment, torch.zeros(1, dtype=torch.int64)))
    seen = [[all(sees(0, 0, row, at) for sees in overlays) for at in range(NUM_ROWS)] for row in range(NUM_ROWS)]
    return torch.zeros(NUM_ROWS, NUM_ROWS).masked_fill(~torch.tensor(seen), float("-inf"))


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        (modeling_gemma2, Rules()),
        (modeling_gemma2, Rules(0.3, window=7, softcap=1.5)),
        (modeling_gemma2, Rules(segment=8)),
        (modeling_gpt_oss, Rules(sinks=SINKS)),
        (modeling_gpt_oss, Rules(window=7, sinks=SINKS)),
    ],
    ids=["plain", "softcap", "segments", "sinks", "sinks in a window"],
)
def test_the_formula_is_that_of_transformers(family: Any, rule: Rules) -> None:
    torch.manual_seed(0)
    q = torch.randn(NUM_ROWS, HEADS, HEAD_DIM)
    k, v = torch.randn(2, NUM_ROWS, KV_HEADS, HEAD_DIM)
    module = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, sinks=rule.sinks, training=False)
    heads_first = [tensor.transpose(0, 1)[None].double() for tensor in (q, k, v)]
    scale = rule.scale or HEAD_DIM**-0.5
    wanted, _ = family.eager_attention_forward(
        module, *heads_first, mask(rule).double(), scaling=scale, softcap=rule.softcap or None
    )
    for row in range(NUM_ROWS):
        got = by_hand(q[row], k[: row + 1], v[: row + 1], rule)
        torch.testing.assert_close(got, wanted[0, row].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 12, 16, 40, 71])
def test_slopes_are_those_of_bloom_and_mpt(num_heads: int) -> None:
    bloom = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(num_heads), bloom, rtol=1e-6, atol=0)
    for max_bias in (8, 4):
        mpt = -build_mpt_alibi_tensor(num_heads, 2, max_bias)[:, 0, 0]
        torch.testing.assert_close(alibi_slopes(num_heads, max_bias), mpt, rtol=1e-6, atol=0)


def test_temperatures_are_those_of_ministral_and_llama_4() -> None:
    positions = torch.tensor([0, 1, 62, 63, 64, 127, 128, 1000])
    ministral = get_llama_4_attn_scale(positions[None], 0.1, 64)[0, 0, :, 0]
    torch.testing.assert_close(temperatures(positions, 0.1, 64), ministral)
    llama_4 = torch.log1p(torch.floor((positions.float() + 1.0) / 64)) * 0.1 + 1.0
    torch.testing.assert_close(temperatures(positions, 0.1, 64, offset=1), llama_4)


@pytest.mark.parametrize(
    "numbers",
    [Numbers(0.1), Numbers(1 / 3, 4096), Numbers(2.0, 0, 8192, 50.0), Numbers(128**-0.5, 2**31 - 1, 2**31, 0.1)],
)
def test_numbers_survive_packing(numbers: Numbers) -> None:
    again = Numbers.unpacked(numbers.packed())
    assert again == numbers
    assert [type(value) for value in again] == [type(value) for value in numbers]


@pytest.mark.parametrize(("window", "segment"), [(0, 0), (1, 0), (5, 0), (0, 1), (0, 6), (5, 6), (9, 4)])
def test_the_first_position_that_a_row_sees_is_the_first_of_its_mask(window: int, segment: int) -> None:
    seen = mask(Rules(window=window, segment=segment)) == 0
    numbers = Numbers(1.0, window, segment)
    assert [numbers.first_seen(row) for row in range(NUM_ROWS)] == seen.int().argmax(1).tolist()
