"""The tokenizers of GGUF files give the ids of the tokenizers that they were made from."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import Qwen2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, gemma_tokenizer

from graphgen import demo
from graphgen.ipc.errors import CheckpointError
from graphgen.requests.tokenizer import Tokenizer
from graphgen.requests.tokenizer_files import load_tokenizer
from graphgen.requests.tokenizer_gguf import _SPLITS

TEXTS = (
    "Hello world, it's  two   spaces\tand a tab\n\n\nthree lines\r\n  indented 12345 x1 3.14",
    "Grüße aus Zürich: ÄÖÜ ß, naïve café, 你好世界, привет мир, ١٢٣ ½ ² 😀👩‍👩‍👧 e\u0301",
    "def f(x):\n    return x**2  # HTTPServer CamelCase don't I'LL WE'RE\n",
    "  leading and trailing  ",
    "",
)
CONTROL, NORMAL, USER_DEFINED, BYTE = 3, 1, 4, 6
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def write(file: Path, architecture: str = "llama", **entries: Any) -> Path:
    writer = gguf.GGUFWriter(file, architecture)
    for name, value in entries.items():
        key = name.replace("__", ".") if name.startswith("tokenizer__") else f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def load(file: Path, **options: Any) -> Tokenizer:
    tokenizer = load_tokenizer(file, **options)
    assert tokenizer is not None
    return tokenizer


def byte_level_entries() -> dict[str, Any]:
    """Of the demo model's tokenizer, with a control token and one of a user's at the end."""
    backend = Backend.from_file(str(demo.model_folder() / "tokenizer.json"))
    vocabulary = sorted(backend.get_vocab(), key=backend.get_vocab().__getitem__)
    merges = (demo.model_folder() / "tokenizer.json").read_text(encoding="utf-8")
    pairs = [" ".join(pair) for pair in json.loads(merges)["model"]["merges"]]
    tokens = [*vocabulary, "<|im_end|>", "<think>"]
    types = [CONTROL, *[NORMAL] * (len(vocabulary) - 1), CONTROL, USER_DEFINED]
    return {"model": "gpt2", "tokens": tokens, "token_type": types, "merges": pairs, "eos_token_id": 0}


def test_byte_level_ids_are_those_of_the_tokenizer_that_the_file_was_made_from(tmp_path: Path) -> None:
    backend = Backend.from_file(str(demo.model_folder() / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer = load(write(tmp_path / "one.gguf", pre="gpt-2", **byte_level_entries()))
    for text in (*TEXTS, "a<|im_end|>b<think>c<|endoftext|>"):
        ids = backend.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == backend.decode(ids)
        assert tokenizer.decode(ids, skip_special_tokens=False) == backend.decode(ids, skip_special_tokens=False)
    assert tokenizer.eos_token_id == 0


@pytest.mark.parametrize("kind", sorted(set(_SPLITS) & set(GGUF_PRE_TOKENIZER_SPLITS)))
def test_texts_are_split_as_transformers_does(kind: str) -> None:
    assert _SPLITS[kind] == GGUF_PRE_TOKENIZER_SPLITS[kind]


def test_qwens_ids_are_those_of_its_class(tmp_path: Path) -> None:
    """Characters are composed, and digits stand alone."""
    entries = byte_level_entries()
    vocabulary = {token: number for number, token in enumerate(entries["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in entries["merges"]]
    expected = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    tokenizer = load(write(tmp_path / "one.gguf", pre="qwen2", **entries))
    for text in TEXTS:
        assert tokenizer.encode(text) == expected.encode(text)


def test_smollms_digits_stand_alone(tmp_path: Path) -> None:
    """As its tokenizer.json has it: digits first, then GPT-2's words."""
    entries = byte_level_entries()
    expected = Backend.from_file(str(demo.model_folder() / "tokenizer.json"))
    expected.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = load(write(tmp_path / "one.gguf", pre="smollm", **entries))
    for text in TEXTS:
        assert tokenizer.encode(text) == expected.encode(text).ids


@pytest.fixture(scope="module")
def pieces() -> tuple[Backend, list[str], list[tuple[str, str]]]:
    """A tokenizer in the way of SentencePiece's: (it without special tokens, its vocabulary, its merges in order)."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, max_token_length=8)
    text = (demo.model_folder().parent / "shakespeare.txt").read_text(encoding="utf-8")[:60_000]
    backend.train_from_iterator((line for line in text.split(" ")), trainer)
    model = json.loads(backend.to_str())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return backend, vocabulary, [tuple(merge) for merge in model["merges"]]


@pytest.mark.parametrize("prefixed", [True, False])
def test_sentencepieces_ids_follow_from_its_scores(
    prefixed: bool, pieces: tuple[Backend, list[str], list[tuple[str, str]]], tmp_path: Path
) -> None:
    """Merges in the order in which they were learned are pieces in the order of their scores."""
    _, vocabulary, merges = pieces
    expected = Backend(
        models.BPE(
            {token: number for number, token in enumerate(vocabulary)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    replace = normalizers.Replace(" ", SPACE)
    expected.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefixed else replace
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    expected.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    learned = {left + right: -float(rank) for rank, (left, right) in reversed(list(enumerate(merges)))}
    scores = [learned.get(token, -1e6) for token in vocabulary]
    types = [2, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(vocabulary) - 259)]
    entries: dict[str, Any] = {
        "model": "llama",
        "tokens": vocabulary,
        "token_type": types,
        "scores": scores,
        "unknown_token_id": 0,
    }
    entries |= {"bos_token_id": 1, "eos_token_id": 2, "add_space_prefix": prefixed}
    tokenizer = load(write(tmp_path / "one.gguf", **entries))
    for text in TEXTS:
        ids = expected.encode(text).ids
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode(ids) == expected.decode(ids)
    without = load(write(tmp_path / "two.gguf", **entries, add_bos_token=False, add_eos_token=True))
    assert without.encode("the")[0] != 1
    assert without.encode("the")[-1] == 2


def test_gemmas_pieces_of_spaces_and_its_order_are_those_of_transformers(
    pieces: tuple[Backend, list[str], list[tuple[str, str]]], tmp_path: Path
) -> None:
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", *pieces[1][3:], "  ", "   "]
    types = [*[CONTROL] * 4, *[BYTE] * 256, *[NORMAL] * (len(vocabulary) - 260)]
    expected = gemma_tokenizer({"tokens": vocabulary})
    entries: dict[str, Any] = {
        "model": "llama",
        "tokens": vocabulary,
        "token_type": types,
        "scores": [0.0] * len(vocabulary),
    }
    entries |= {"unknown_token_id": 3, "bos_token_id": 2, "eos_token_id": 1, "add_space_prefix": False}
    tokenizer = load(write(tmp_path / "one.gguf", architecture="gemma3", **entries))
    for text in TEXTS:
        assert tokenizer.encode(text)[1:] == expected.backend_tokenizer.encode(text, add_special_tokens=False).ids


def test_a_chat_begins_with_one_bos_and_templates_are_found_by_name(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    entries = {**byte_level_entries(), "pre": "llama-bpe", "bos_token_id": 1024, "add_bos_token": True}
    entries |= {"tokenizer__chat_template": template, "tokenizer__chat_template.short": "{{ messages[0]['content'] }}"}
    file = write(tmp_path / "one.gguf", **entries)
    tokenizer, chat = load(file), [{"role": "user", "content": "to be"}]
    assert tokenizer.render_chat(chat) == "<|im_end|>to be<|endoftext|>"
    assert tokenizer.encode_chat(chat) == tokenizer.encode(tokenizer.render_chat(chat))
    assert tokenizer.encode_chat(chat).count(1024) == tokenizer.encode("to be").count(1024) == 1
    assert load(file, chat_template="short").render_chat(chat) == "to be"
    own = tmp_path / "own.jinja"
    own.write_text("own {{ messages[0]['content'] }}")
    assert load(file, chat_template=str(own)).render_chat(chat) == "own to be"
    with pytest.raises(CheckpointError, match="one of short"):
        load(file, chat_template="long")


def test_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    entries = byte_level_entries()
    with pytest.raises(CheckpointError, match=r"the way 'mystery' .*supported are .*qwen2"):
        load(write(tmp_path / "one.gguf", pre="mystery", **entries))
    with pytest.raises(CheckpointError, match="kind 'rwkv', supported are gpt2 and llama"):
        load(write(tmp_path / "two.gguf", **{**entries, "model": "rwkv"}))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load(write(tmp_path / "three.gguf"))


def test_a_file_that_does_not_say_how_it_splits_text_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(write(tmp_path / "one.gguf", **byte_level_entries()))
    assert "tokenizer.ggml.pre" in caplog.text


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("tokens", [1, 2]),
        ("token_type", 7),
        ("token_type", ["a"]),
        ("merges", 7),
        ("merges", [1]),
        ("pre", ["a"]),
        ("unknown_token_id", -1),
        ("bos_token_id", "x"),
        ("eos_token_id", 1.5),
        ("add_bos_token", "yes"),
        ("tokenizer__chat_template", 7),
    ],
)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_entry_of_another_type_is_refused_by_name(kind: str, entry: str, value: Any, tmp_path: Path) -> None:
    whole = {"model": kind, "tokens": ["a", "b", "ab"], "token_type": [1, 1, 1], "merges": ["a b"]}
    name = entry.replace("tokenizer__", "tokenizer.") if "__" in entry else f"tokenizer.ggml.{entry}"
    with pytest.raises(CheckpointError, match=f"has a {name} that is not understood"):
        load(write(tmp_path / "one.gguf", **{**whole, entry: value}))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_merges_of_no_tokens_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be built .*`x` out of vocabulary"):
        load(write(tmp_path / "one.gguf", model=kind, tokens=["a", "b", "ab"], merges=["x b"]))


def test_an_unknown_token_beyond_the_vocabulary_is_none(tmp_path: Path) -> None:
    entries: dict[str, Any] = {"model": "llama", "tokens": ["a", "b", "ab"], "merges": ["a b"], "unknown_token_id": 9}
    assert load(write(tmp_path / "one.gguf", add_space_prefix=False, **entries)).encode("ab") == [2]
