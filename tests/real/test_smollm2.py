"""Greedy chats of a real model are transformers': by Engine.chat, by Client and by `graphgen chat`.

The model is served from the GGUF file that its package holds. Compared on the same ids, in float32 on the CPU: equal,
or first different where two logits of the reference are closer than 1e-4, which the order of additions decides.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from graphgen import Client, Engine, RequestOutput, SamplingParams, demo
from graphgen.demo.train import split_play
from graphgen.models.families import load_spec
from graphgen.models.loader import load_decoder
from graphgen.models.spec import ModelSpec, Quantization, format_at_load
from tests.models.driver import Driver
from tests.real.chats import CHATS, Message
from tests.real.reference import Reference, mean_divergence
from tests.serving import serving

NUM_TOKENS = 40
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0)
SHORT = CHATS[:5]
MOST_DIVERGENCE = 0.01
"""In nats, of bfloat16 on the CPU from float32."""


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[Engine]:
    with Engine(str(smollm2), device="cpu", dtype="float32", max_model_len=1024) as engine:
        yield engine


@pytest.fixture(scope="module")
def outputs(engine: Engine) -> list[RequestOutput]:
    return engine.chat(CHATS, GREEDY)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    """transformers' of the same file. It knows no way to split text by the name of this model's, whose digits stand
    alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer]
    )
    return tokenizer


def test_greedy_chats_are_those_of_transformers(outputs: Sequence[RequestOutput], smollm2_reference: Reference) -> None:
    lengths = [len(output.prompt_token_ids) for output in outputs]
    assert min(lengths) >= 20
    assert 300 < max(lengths) <= 420
    same = [smollm2_reference.check_greedy(output.prompt_token_ids, output.token_ids) for output in outputs]
    assert sum(same) > len(same) * 0.8, "steps that close are rare"


def test_ids_and_texts_are_those_of_transformers(outputs: Sequence[RequestOutput], tokenizer: Any) -> None:
    for chat, output in zip(CHATS, outputs, strict=True):
        flat = [{**message, "content": _text(message["content"])} for message in chat]
        expected = tokenizer.apply_chat_template(flat, add_generation_prompt=True, return_dict=False)
        assert list(output.prompt_token_ids) == expected
        assert output.text == tokenizer.decode(output.token_ids, skip_special_tokens=True)


def test_bfloat16_is_close(smollm2: Path, outputs: Sequence[RequestOutput], smollm2_reference: Reference) -> None:
    decoder = load_decoder(smollm2, load_spec(smollm2), torch.bfloat16, torch.device("cpu"))
    for output in outputs[:5]:
        driver = Driver(decoder, page_size=16, num_pages=64)
        ids = [*output.prompt_token_ids, *output.token_ids[:-1]]
        found = driver.step([(driver.request(ids), len(ids))])[0][-len(output.token_ids) :]
        expected = smollm2_reference.logits(output.prompt_token_ids, output.token_ids)
        assert mean_divergence(expected, found) < MOST_DIVERGENCE


def test_a_clients_chats_are_an_engines(smollm2: Path, outputs: Sequence[RequestOutput], tmp_path: Path) -> None:
    options = ("--model", str(smollm2), "--dtype", "float32", "--max-model-len", "1024")
    with serving(tmp_path, *options) as server, Client(server.address) as client:
        assert "chat" in client.info.features
        found = client.chat(SHORT, GREEDY)
    for mine, theirs in zip(found, outputs, strict=False):
        assert (mine.prompt_token_ids, mine.text) == (theirs.prompt_token_ids, theirs.text)


def test_the_command_line_says_what_the_engine_says_with_its_history(engine: Engine, smollm2: Path) -> None:
    """A conversation of two turns, one with a system message, and one of odd characters."""
    history: list[Message] = [*CHATS[0]]
    (first,) = engine.chat(history, GREEDY)
    history += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And of Italy?"}]
    odd = [{"role": "user", "content": CHATS[3][0]["content"].rstrip("\n")}]
    outputs = [first, *engine.chat([history, CHATS[1], odd], GREEDY)]
    lines = [
        *(CHATS[0][0]["content"], "And of Italy?", f"/system {CHATS[1][0]['content']}", CHATS[1][1]["content"]),
        *("/system", odd[0]["content"]),
    ]
    assert say("--model", str(smollm2), said="\n".join(lines)) == "".join(f"{output.text}\n" for output in outputs)


def test_one_message_is_answered(smollm2: Path, engine: Engine) -> None:
    (want,) = engine.chat(CHATS[1], GREEDY)
    message, system = CHATS[1][1]["content"], CHATS[1][0]["content"]
    assert say(message, str(smollm2), "--system", system) == f"{want.text}\n"


def say(*arguments: str, said: str = "") -> str:
    """What `graphgen chat` prints."""
    options = ("--max-tokens", str(NUM_TOKENS), "--temperature", "0", "--device", "cpu", "--dtype", "float32")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "graphgen", "chat", *arguments, "--max-model-len", "1024", *options],
        input=said,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _in_e4m3(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def _in_int8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


@pytest.fixture(scope="module")
def play(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(split_play(demo.play_file().read_text())[1][:900]).input_ids[:220]
    return ids


def _logprobs(file: Path, spec: ModelSpec, ids: Sequence[int]) -> Tensor:
    driver = Driver(load_decoder(file, spec, torch.float32, torch.device("cpu")), page_size=16, num_pages=64)
    return driver.step([(driver.request(ids), len(ids))])[0].log_softmax(-1)


@pytest.mark.parametrize(
    ("kind", "rounded", "most_divergence", "least_equal", "most_grown"),
    [("fp8", _in_e4m3, 0.06, 0.86, 0.05), ("int8", _in_int8, 0.008, 0.93, 0.05)],
)
def test_quantised_weights_predict_nearly_alike(
    kind: Quantization,
    rounded: Callable[[Tensor], Tensor],
    most_divergence: float,
    least_equal: float,
    most_grown: float,
    smollm2: Path,
    play: Sequence[int],
) -> None:
    """A play, against the same weights in float32. So small a model feels the rounding: measured were divergences of
    0.028 and 0.0033, whose ratio is that of the squared errors. None of it is the engine's own: transformers' weights,
    rounded in the same way, predict the same. Of int4 nothing would follow: the file has 4 bits."""
    spec = load_spec(smollm2)
    quantised = spec.with_formats(lambda _, place: format_at_load(kind, place.num_columns))
    want, got = (_logprobs(smollm2, one, play) for one in (spec, quantised))
    equal = (want.argmax(-1) == got.argmax(-1)).float().mean().item()
    grown = (want - got)[:-1].gather(1, torch.tensor(play[1:]).unsqueeze(1)).mean().expm1().item()
    assert 0.0 < mean_divergence(want, got) < most_divergence
    assert equal > least_equal
    assert grown < most_grown
    reference = Reference.of_smollm2(smollm2)
    reference.round_weights(rounded)
    of_rounded = reference.logits(play[:1], [*play[1:], 0]).log_softmax(-1)
    assert abs(mean_divergence(of_rounded, got)) < 1e-6
