"""The embedded demo model: complete, small, loadable offline, and as good as its card says.

The loss is recomputed with transformers alone, so that it does not share a mistake with the training script.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from graphgen.demo import model_folder, play_file
from graphgen.demo.train import (
    CHAT_TEMPLATE,
    Settings,
    card_table,
    evaluate,
    new_model,
    split_play,
    train,
    train_tokenizer,
    validation_windows,
)

FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
)
MAX_FOLDER_BYTES = 10_000_000
MAX_NATS_PER_CHARACTER = 1.52  # guessing evenly among all tokens would give ln 1024 / 2.26 = 3.07
PLAY = play_file().read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer() -> Any:  # Any: transformers publishes no usable types
    return AutoTokenizer.from_pretrained(model_folder())


@pytest.fixture(scope="module")
def model() -> Any:  # Any: as above
    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:  # Any: a JSON object
    content: dict[str, Any] = json.loads((model_folder() / "training.json").read_text())
    return content


def test_folder_is_complete_and_small() -> None:
    assert sorted(file.name for file in model_folder().iterdir()) == sorted(FILES)
    assert sum(file.stat().st_size for file in model_folder().iterdir()) <= MAX_FOLDER_BYTES


def test_the_chat_template_is_what_training_writes() -> None:
    assert (model_folder() / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_a_chat_is_a_scene(tokenizer: Any) -> None:
    """Rendered by transformers: who speaks, what is said; tools, their calls and documents too."""
    chat = [
        {"role": "user", "content": "Who is there?", "name": "Francisco"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {"far": 1}}}]},
        {"role": "tool", "content": "Bernardo"},
    ]
    tools, documents = [{"type": "function", "function": {"name": "look"}}], [{"title": "é"}]
    assert tokenizer.apply_chat_template(
        chat, tools=tools, documents=documents, tokenize=False, add_generation_prompt=True
    ) == (
        'PROPERTIES:\n{"type": "function", "function": {"name": "look"}}\n\nLETTER:\n{"title": "é"}\n\n'
        'FRANCISCO:\nWho is there?\n\nASSISTANT:\n{"name": "look", "arguments": {"far": 1}}\n\nTOOL:\nBernardo\n\n'
        "ASSISTANT:\n"
    )
    plain = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert plain == "USER:\nHi\n\n"


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("graphgen.demo._HERE", tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "model"))):
        model_folder()


def test_shape_suits_the_attention_kernels(model: Any) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert config.head_dim == 64
    assert config.num_attention_heads > config.num_key_value_heads > 1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stored = AutoModelForCausalLM.from_pretrained(model_folder(), dtype="auto")
    assert stored.dtype == torch.bfloat16


def test_token_ids_of_config_tokenizer_and_generation_config_agree(model: Any, tokenizer: Any) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == tokenizer.eos_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.bos_token_id is None
    assert model.config.bos_token_id is None
    assert tokenizer.model_max_length == model.config.max_position_embeddings


def test_tokenizer_round_trips_the_whole_play(tokenizer: Any) -> None:
    ids = tokenizer(PLAY, verbose=False).input_ids
    assert tokenizer.decode(ids) == PLAY
    assert len(ids) < 0.45 * len(PLAY)  # it does compress: more than two characters a token


@settings(max_examples=200)
@given(text=st.text())
def test_tokenizer_round_trips_any_unicode(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_was_trained_on_the_training_part_alone() -> None:
    again = json.loads(train_tokenizer(split_play(PLAY)[0]).to_str())
    assert again["model"] == json.loads((model_folder() / "tokenizer.json").read_text())["model"]


@torch.inference_mode()
def test_validation_loss_is_the_stated_one(model: Any, tokenizer: Any, record: dict[str, Any]) -> None:
    valid_text = PLAY[len(PLAY) * 9 // 10 :]
    ids = torch.tensor(tokenizer(valid_text, verbose=False).input_ids)
    assert len(ids) == record["validation_tokens"]
    windows = ids.unfold(0, record["validation_context_len"], record["validation_context_len"])
    losses = [model(input_ids=some, labels=some).loss.item() for some in windows.split(8)]
    loss = sum(losses) / len(losses)  # all windows but the last, shorter one
    assert loss == pytest.approx(record["validation_nats_per_token"], rel=0.02)
    characters_per_token = len(valid_text) / len(ids)
    assert loss / characters_per_token == pytest.approx(record["validation_nats_per_character"], rel=0.02)
    assert loss / characters_per_token < MAX_NATS_PER_CHARACTER


def test_model_card_states_the_record(record: dict[str, Any]) -> None:
    card = (model_folder().parent / "README.md").read_text(encoding="utf-8")
    assert card_table(record) in card


def test_greedy_text_looks_like_lines_of_words(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer("ROMEO:", return_tensors="pt").input_ids
    output = model.generate(prompt, max_new_tokens=60, do_sample=False)
    text = tokenizer.decode(output[0, prompt.shape[1] :])
    assert "\n" in text.strip()
    known = set(re.findall(r"[A-Za-z']+", PLAY))
    words = re.findall(r"[A-Za-z']+", text)[:-1]  # the last one may be cut off
    assert len(words) >= 10
    assert sum(word in known for word in words) >= 0.8 * len(words)


def test_split_loses_nothing_and_repeats_nothing() -> None:
    train_text, valid_text = split_play(PLAY)
    assert train_text + valid_text == PLAY
    assert len(valid_text) / len(PLAY) == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize("num_ids", [33, 64, 65, 66, 100])
def test_no_token_is_judged_twice(num_ids: int) -> None:
    windows = validation_windows(torch.arange(num_ids), 32)
    judged = windows[:, 1:].flatten().tolist()
    assert judged == list(range(1, len(judged) + 1))
    assert num_ids - 1 - len(judged) < 32


def test_dropout_acts_in_training_only_and_leaves_no_trace_in_the_weights() -> None:
    torch.manual_seed(0)
    with_dropout = new_model(dropout=0.5)
    plain = LlamaForCausalLM(with_dropout.config)
    plain.load_state_dict(with_dropout.state_dict())  # strict: the names are equal
    ids = torch.arange(8)[None]
    expected = plain.eval()(ids).logits
    assert torch.equal(with_dropout.eval()(ids).logits, expected)
    assert not torch.allclose(with_dropout.train()(ids).logits, expected)


def test_training_stops_early_and_keeps_the_best_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """The training ids say nothing about the validation ids: learning soon makes that loss worse."""
    tokenizer = train_tokenizer(PLAY[:20_000])
    generator = torch.Generator().manual_seed(0)
    train_ids = torch.arange(8).repeat(32)
    valid_ids = torch.randint(500, 1000, (129,), generator=generator)
    options = Settings(steps=60, batch_size=1, seq_len=32, lr=1e-3, warmup=1, dropout=0.0, eval_every=2, patience=3)
    trained, best_step, steps_run = train(train_ids, valid_ids, tokenizer, options)
    printed = [float(loss) for loss in re.findall(r"validation (\S+) nats/token", capsys.readouterr().out)]
    assert steps_run == len(printed) * 2 < options.steps
    assert best_step == 2 * (1 + printed.index(min(printed)))
    kept = evaluate(trained, validation_windows(valid_ids, 32), tokenizer)
    assert kept.nats_per_token == pytest.approx(min(printed), abs=1e-3)
    learned = evaluate(trained, validation_windows(train_ids, 32), tokenizer)
    assert learned.nats_per_token < 6.9  # the untrained model's is ln 1024 = 6.93
