"""Greedy texts of a real Gemma 3, from the GGUF file that its packages make, are transformers'.

The model was not trained for chats: its prompts are texts. Layers see a window of 512 tokens, or all: one prompt is
longer. Compared as test_smollm2.py does.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from graphgen import Engine, RequestOutput, SamplingParams
from graphgen.models.families import load_spec
from graphgen.models.loader import load_decoder
from tests.models.driver import Driver
from tests.real.chats import BRIEF, CHATS, CODE, LETTER
from tests.real.reference import Reference, mean_divergence

GREEDY = SamplingParams(max_tokens=40, temperature=0)
TEXTS = [
    *(f"{chat[-1]['content']}\n\n" for chat in CHATS if isinstance(chat[-1]["content"], str)),
    f"{LETTER}\n\n{BRIEF}\n\n{CODE}\n\n" * 2,
]
MOST_DIVERGENCE = 0.02
"""In nats, of bfloat16 on the CPU from float32."""
BOS = 2


@pytest.fixture(scope="module")
def outputs(gemma3: Path) -> Iterator[list[RequestOutput]]:
    with Engine(str(gemma3), device="cpu", dtype="float32", max_model_len=2048) as engine:
        yield engine.generate(TEXTS, GREEDY)


def test_greedy_texts_are_those_of_transformers(outputs: Sequence[RequestOutput], gemma3_reference: Reference) -> None:
    lengths = [len(output.prompt_token_ids) for output in outputs]
    assert len(outputs) == 20
    assert max(lengths) > 512 + 40, "the windows' edge is passed"
    assert all(output.prompt_token_ids[:1] == (BOS,) and BOS not in output.prompt_token_ids[1:] for output in outputs)
    same = [gemma3_reference.check_greedy(output.prompt_token_ids, output.token_ids) for output in outputs]
    assert sum(same) > len(same) * 0.8, "steps that close are rare"


def test_bfloat16_is_close(gemma3: Path, outputs: Sequence[RequestOutput], gemma3_reference: Reference) -> None:
    decoder = load_decoder(gemma3, load_spec(gemma3), torch.bfloat16, torch.device("cpu"))
    for output in outputs[:5]:
        driver = Driver(decoder, page_size=16, num_pages=64)
        ids = [*output.prompt_token_ids, *output.token_ids[:-1]]
        found = driver.step([(driver.request(ids), len(ids))])[0][-len(output.token_ids) :]
        expected = gemma3_reference.logits(output.prompt_token_ids, output.token_ids)
        assert mean_divergence(expected, found) < MOST_DIVERGENCE


def test_float16_is_refused_and_the_file_is_run_in_bfloat16(gemma3: Path) -> None:
    spec = load_spec(gemma3)
    assert (spec.dtype, spec.float16, spec.num_layers) == ("bfloat16", False, 18)
    assert spec.windows == (512, 512, 512, 512, 512, None) * 3
