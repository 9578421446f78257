"""How many tokens there are is what transformers counts, and rows of the head beyond them are never drawn."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from graphgen import Engine, SamplingParams, demo
from graphgen.launch.config import EngineConfig
from graphgen.models.families import load_spec
from graphgen.models.vocabulary import count_tokens
from graphgen.requests.core import launch_config, load_config_tokenizer
from tests.models import tiny

PROMPTS = ([5, 9, 3], [1, 95, 96, 2], [44, 12, 12, 7, 8])
NUM_TOKENS = 80


def word_tokenizer(num_tokens: int) -> Tokenizer:
    return Tokenizer(models.WordLevel({f"w{number}": number for number in range(num_tokens)}, unk_token="w0"))


@pytest.mark.parametrize("kind", ["demo", "added", "unigram"])
def test_tokens_are_counted_as_transformers_counts_them(kind: str, tmp_path: Path) -> None:
    if kind == "demo":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo.model_folder() / name, tmp_path / name)
    else:
        unigram = Tokenizer(models.Unigram([(f"w{number}", 0.0) for number in range(11)], unk_id=0))
        tokenizer = word_tokenizer(7) if kind == "added" else unigram
        tokenizer.add_special_tokens([AddedToken("<end>")])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path)
    assert count_tokens(tmp_path) == len(PreTrainedTokenizerFast.from_pretrained(tmp_path))


def test_tokens_that_only_the_settings_have_count(tmp_path: Path) -> None:
    word_tokenizer(7).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"9": {"content": "<x>"}}}))
    assert count_tokens(tmp_path) == 10


@pytest.mark.parametrize("text", [None, "{", "[]", '{"model": {"vocab": 3}}'])
def test_without_a_tokenizer_every_row_may_be_drawn(text: str | None, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    assert count_tokens(tmp_path) is None
    assert load_spec(tmp_path).num_drawable == 97


def test_an_end_of_sequence_id_is_drawable_whatever_the_tokenizer_says(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path, eos_token_id=90)
    word_tokenizer(NUM_TOKENS).save(str(tmp_path / "tokenizer.json"))
    assert load_spec(tmp_path).num_drawable == 91


def test_an_engine_never_draws_a_row_that_means_nothing(tmp_path: Path) -> None:
    """transformers, told to suppress them, says the same. Prompts may hold such ids, penalties or not."""
    model = tiny.build("llama", eos_token_id=None)
    with torch.no_grad():
        model.lm_head.weight[NUM_TOKENS:] *= 20  # drawn at nearly every step, if they could be
    model.save_pretrained(tmp_path)
    word_tokenizer(NUM_TOKENS).save(str(tmp_path / "tokenizer.json"))
    penalised = SamplingParams(max_tokens=12, temperature=0, repetition_penalty=1.3)
    drawn = SamplingParams(max_tokens=60, temperature=3.0, seed=4)
    with Engine(str(tmp_path), device="cpu", dtype="float32", max_model_len=128, num_pages=64) as engine:
        for sampling in (SamplingParams(max_tokens=12, temperature=0), penalised):
            for prompt, output in zip(PROMPTS, engine.generate(PROMPTS, sampling), strict=True):
                assert list(output.token_ids) == greedy(model, prompt, sampling)
        outputs = engine.generate(PROMPTS, drawn)
    assert max(max(output.token_ids) for output in outputs) < NUM_TOKENS


def greedy(model: Any, prompt: list[int], sampling: SamplingParams) -> list[int]:
    """transformers publishes no types."""
    penalty = sampling.repetition_penalty
    done = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=12,
        do_sample=False,
        suppress_tokens=list(range(NUM_TOKENS, 97)),
        repetition_penalty=1.0 if penalty is None else penalty,
    )
    ids: list[int] = done[0, len(prompt) :].tolist()
    return ids


@pytest.mark.parametrize(("case", "adds"), [("gemma", False), ("gemma", True), ("llama", False)])
def test_a_model_that_needs_bos_and_a_tokenizer_that_adds_none_cost_a_warning(
    case: str, adds: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Chats are rendered with it, and get no second one, whichever the tokenizer does."""
    tiny.save(case, tmp_path)
    tokenizer = word_tokenizer(NUM_TOKENS)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("w1", special=True)])
    if adds:
        tokenizer.post_processor = processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "w1"}')
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }} {{ messages[0]['content'] }}")
    config = EngineConfig(model=str(tmp_path), device="cpu", max_model_len=64)
    found = load_config_tokenizer(config, launch_config(config))
    assert found is not None
    assert ("begins no text with" in caplog.text) == (case == "gemma" and not adds)
    assert found.encode("w5 w6") == [*([1] if adds else []), 5, 6]
    assert found.encode_chat([{"role": "user", "content": "w5"}]) == [1, 5]
