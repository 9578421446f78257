"""Greedy chats of a real model are transformers': by Engine.chat, by Client and by `graphgen chat`.

Compared on the same ids, in float32 on the CPU: equal, or first different where the two best logits of the reference
are closer than 1e-4, which the order of additions decides.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from graphgen import Client, Engine, RequestOutput, SamplingParams
from tests.serving import serving

NUM_TOKENS = 40
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0)
CLOSE = 1e-4
"""Between two logits."""

Message = dict[str, Any]
CHATS: list[list[Message]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada!"},
        {"role": "user", "content": "What is my name?"},
    ],
    [{"role": "user", "content": "  Translate into English: «Guten Morgen, Zürich!» 你好 12345 😀\n"}],
    [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Write a Python function"}, {"type": "text", "text": "f."}],
        }
    ],
]


class Reference:
    """transformers on the same folder."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch: Any = torch
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))  # transformers publishes no types
        self._model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()

    def ids(self, chat: Sequence[Message]) -> list[int]:
        """Of a chat, whose parts of text are lines."""
        flat = [{**m, "content": _text(m["content"])} for m in chat]
        ids: list[int] = self.tokenizer.apply_chat_template(flat, add_generation_prompt=True, return_dict=False)
        return ids

    def greedy(self, ids: Sequence[int]) -> tuple[list[int], list[float]]:
        """(the tokens, how far the two best logits of each step are from each other)."""
        done = self._model.generate(
            self._torch.tensor([ids]),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = [logits[0].topk(2).values for logits in done.logits]
        return done.sequences[0, len(ids) :].tolist(), [float(two[0] - two[1]) for two in best]


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Reference:
    return Reference(smollm2)


@pytest.fixture(scope="module")
def expected(reference: Reference) -> list[tuple[list[int], list[float]]]:
    return [reference.greedy(reference.ids(chat)) for chat in CHATS]


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[Engine]:
    with Engine(str(smollm2), device="cpu", dtype="float32", max_model_len=1024) as engine:
        yield engine


def check(
    reference: Reference, expected: list[tuple[list[int], list[float]]], outputs: Sequence[RequestOutput]
) -> None:
    for chat, (want, gaps), output in zip(CHATS, expected, outputs, strict=True):
        assert list(output.prompt_token_ids) == reference.ids(chat)
        got = list(output.token_ids)
        places = [place for place, (mine, theirs) in enumerate(zip(got, want, strict=False)) if mine != theirs]
        if places:
            assert gaps[places[0]] < CLOSE, (places[0], got, want)
        else:
            assert got == want
            assert output.text == reference.tokenizer.decode(want, skip_special_tokens=True)


def test_an_engines_chats_are_those_of_transformers(
    engine: Engine, reference: Reference, expected: list[tuple[list[int], list[float]]]
) -> None:
    check(reference, expected, engine.chat(CHATS, GREEDY))


def test_a_clients_chats_are_those_of_transformers(
    smollm2: Path, reference: Reference, expected: list[tuple[list[int], list[float]]], tmp_path: Path
) -> None:
    options = ("--model", str(smollm2), "--dtype", "float32", "--max-model-len", "1024")
    with serving(tmp_path, *options) as server, Client(server.address) as client:
        assert "chat" in client.info.features
        check(reference, expected, client.chat(CHATS, GREEDY))


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
    options = ("--max-tokens", str(NUM_TOKENS), "--temperature", "0", "--device", "cpu", "--dtype", "float32")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "graphgen", "chat", "--model", str(smollm2), "--max-model-len", "1024", *options],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"{output.text}\n" for output in outputs)


def test_one_message_is_answered(smollm2: Path, engine: Engine) -> None:
    (want,) = engine.chat(CHATS[1], GREEDY)
    message, system = CHATS[1][1]["content"], CHATS[1][0]["content"]
    options = ("--max-tokens", str(NUM_TOKENS), "--temperature", "0", "--device", "cpu", "--max-model-len", "1024")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "graphgen", "chat", message, str(smollm2), "--system", system, *options],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout == f"{want.text}\n", done.stderr
