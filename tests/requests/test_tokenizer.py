"""tokenizer.json is the truth: ids and text are those of the package tokenizers, for every family of models."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from graphgen import demo
from graphgen.ipc.errors import CheckpointError, InvalidRequestError
from graphgen.requests.chat_template import ChatSource
from graphgen.requests.tokenizer import Tokenizer, TokenizerData, read_tokenizer, write_tokenizer
from graphgen.requests.tokenizer_files import load_tokenizer
from tests.requests import tokenizers_for_tests

FAMILIES = {
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "gemma3_text": "GemmaTokenizer",
    "phi3": "LlamaTokenizer",
    "gpt2": "GPT2Tokenizer",
}
ODD_TEXTS = (
    "",
    " ",
    "hi",
    " hi",
    "  hi  hi ",
    "hi\n\nhi\t hi\r\n",
    "<s>hi",
    "<s> hi</s>hi",
    "</s>  hi<|im_end|>hi 12345",
    "naïve 😀👩‍👩‍👧 你好 \u00a0\u200b",
    "e\u0301 é \ufb01 \uff21\uff22",
    "\ufeffhi\x00",
    "1234567 12 3.14",
    "a" * 300,
    "don't I'LL",
)


def llama_2_style() -> Any:  # tokenizers publishes no types, here and below
    """A space goes before the text, and none behind a special token."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "h": 4, "i": 5, "hi": 6, "▁hi": 7}
    backend = Backend(BPE(vocab, [("h", "i"), ("▁", "hi")], unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return backend


def byte_level_whole_numbers() -> Any:
    """Byte-level, with a pre-tokenizer that does not split digits, as no class of transformers would make it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*alphabet, "12", "123", "</s>", "<|im_end|>"])}
    backend = Backend(BPE(vocab, [("1", "2"), ("12", "3")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>", "<|im_end|>"])
    return backend


def with_bos() -> Any:
    """Puts <s> before every text, as Llama 3's file does."""
    backend = llama_2_style()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def limited() -> Any:
    """A file saved with truncation and padding, which are a training program's and not a server's."""
    backend = byte_level_whole_numbers()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    return backend


STYLES: dict[str, Callable[[], Any]] = {
    "llama 2": llama_2_style,
    "byte level": byte_level_whole_numbers,
    "bos": with_bos,
    "demo": lambda: Backend.from_file(str(demo.model_folder() / "tokenizer.json")),
}
SETTINGS: dict[str, object] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def write_folder(folder: Path, backend: Any, model_type: str, **settings: object) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    architecture = f"{model_type.title()}ForCausalLM"
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": [architecture]}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def load(folder: Path, **options: Any) -> Tokenizer:
    tokenizer = load_tokenizer(folder, **options)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("style", STYLES)
def test_ids_are_those_of_the_file_whatever_the_class(model_type: str, style: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, STYLES[style](), model_type, tokenizer_class=FAMILIES[model_type])
    tokenizer, want = load(folder), Backend.from_file(str(folder / "tokenizer.json"))
    for text in ODD_TEXTS:
        # A beginning-of-sequence token that the text has already is not put before it again.
        doubled = style == "bos" and text.startswith("<s>")
        ids = want.encode(text).ids[doubled:]
        assert tokenizer.encode(text) == ids, text
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == want.decode(ids, skip_special_tokens=skip)
    assert tokenizer.encode_batch(ODD_TEXTS) == [tokenizer.encode(text) for text in ODD_TEXTS]


def test_the_case_that_was_wrong(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, llama_2_style(), "llama", tokenizer_class="LlamaTokenizer", **SETTINGS)
    assert load(folder).encode(" hi") == [3, 7]


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    tokenizer = load(write_folder(tmp_path, limited(), "llama"))
    assert tokenizer.encode("abcdefgh") == byte_level_whole_numbers().encode("abcdefgh").ids
    assert len(tokenizer.encode("ab")) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        SETTINGS,
        {"bos_token": {"__type": "AddedToken", "content": "<s>", "special": True}, "eos_token": None},
        {"eos_token": "hi", "extra_special_tokens": ["h"]},
        {"eos_token": "</s>", "additional_special_tokens": ["▁hi"]},
        {
            "added_tokens_decoder": {
                "2": {"content": "</s>", "special": True},
                "8": {"content": "<new>", "special": True},
            }
        },
        {"added_tokens_decoder": {"9": {"content": "<b>"}, "8": {"content": "<a>"}}, "eos_token": "<b>"},
        {"extra_special_tokens": {"image_token": "▁hi"}, "bos_token": "<s>"},
        {"add_bos_token": True, "add_eos_token": True, **SETTINGS},
        {"clean_up_tokenization_spaces": True, "model_max_length": 3, **SETTINGS},
    ],
    ids=str,
)
def test_special_tokens_of_the_settings_are_those_of_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = write_folder(tmp_path, llama_2_style(), "llama", **settings)
    tokenizer, want = load(folder), PreTrainedTokenizerFast.from_pretrained(str(folder))
    assert tokenizer.data.special_tokens == want.special_tokens_map
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (want.bos_token_id, want.eos_token_id)
    for text in (*ODD_TEXTS, "hi<new>hi <a><b>", "</s>hi"):
        ids = want.encode(text)
        assert tokenizer.encode(text) == ids, text
        for skip in (True, False):
            decoded = want.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert tokenizer.decode(ids, skip) == decoded


def test_special_tokens_of_the_older_file_count(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, llama_2_style(), "llama", eos_token="hi")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "<s>"}))
    want = PreTrainedTokenizerFast.from_pretrained(str(folder))
    assert load(folder).data.special_tokens == want.special_tokens_map == {"eos_token": "</s>", "bos_token": "<s>"}


def test_a_token_that_cannot_have_its_id_is_an_error(tmp_path: Path) -> None:
    settings = {"added_tokens_decoder": {"70": {"content": "<late>", "special": True}}}
    with pytest.raises(CheckpointError, match="'<late>' the id 70"):
        load(write_folder(tmp_path, llama_2_style(), "llama", **settings))


def test_one_leading_bos_is_enough(tmp_path: Path) -> None:
    tokenizer = load(write_folder(tmp_path, with_bos(), "llama", **SETTINGS))
    assert tokenizer.encode("hi") == [1, 7]
    assert tokenizer.encode("<s>hi") == [1, 7]
    assert tokenizer.encode("<s><s>hi") == [1, 1, 7]
    assert tokenizer.encode("") == tokenizer.encode("<s>") == [1]


def test_files_of_other_kinds_are_converted_as_the_auto_class_does(tmp_path: Path) -> None:
    backend = json.loads(byte_level_whole_numbers().to_str())
    (tmp_path / "vocab.json").write_text(json.dumps(backend["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n1 2\n12 3\n")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}')
    tokenizer, want = load(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    assert [tokenizer.encode(text) for text in ODD_TEXTS] == [want.encode(text) for text in ODD_TEXTS]
    assert tokenizer.eos_token_id == want.eos_token_id


def test_tokenizer_json_is_read_without_torch_and_transformers() -> None:
    code = (
        "import sys\nfrom graphgen import demo\nfrom graphgen.requests.tokenizer_files import load_tokenizer\n"
        "assert load_tokenizer(demo.model_folder()).encode('to be')\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "sympy", "transformers"}


# --- files that cannot be read ---------------------------------------------------------------------------------

FUTURE = (
    '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":null,'
    '"post_processor":null,"decoder":null,"model":{"type":"Future","vocab":{}}}'
)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", FUTURE),
        ("tokenizer.json", "{"),
        ("tokenizer.json", ""),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("special_tokens_map.json", "nonsense"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_a_remedy(name: str, content: str | bytes, tmp_path: Path) -> None:
    write_folder(tmp_path, llama_2_style(), "llama")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r'tokenizer="none"') as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("files", "settings", "said"),
    [
        ({"chat_template.jinja": b"\xff\xfe"}, {}, r"chat_template\.jinja in .* no UTF-8"),
        ({"additional_chat_templates/default.jinja": b"\xff"}, {}, r"default\.jinja in .* no UTF-8"),
        ({}, {"chat_template": [{"name": "default"}]}, r"tokenizer_config\.json.*no list of templates"),
        ({}, {"chat_template": ["default"]}, r"tokenizer_config\.json.*no list of templates"),
        ({}, {"chat_template": 7}, r"tokenizer_config\.json.*no list of templates"),
        ({}, {"chat_template": [{"name": "default", "template": 7}]}, r"tokenizer_config\.json.*no list of templates"),
    ],
)
def test_a_template_that_cannot_be_read_costs_chat_alone(
    files: dict[str, bytes], settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path, llama_2_style(), "llama", **settings)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    tokenizer = load(folder)
    assert tokenizer.encode("hi")
    with pytest.raises(InvalidRequestError, match=said):
        tokenizer.render_chat(CHAT)


def test_sentencepiece_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.model.*pip install sentencepiece") as caught:
        load_tokenizer(tmp_path)
    assert "add its tokenizer.json" in str(caught.value)


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None


# --- chats -----------------------------------------------------------------------------------------------------

FIRST = "{{ bos_token }}{{ messages[0].content }}"
CHAT = [{"role": "user", "content": "hi"}]


def test_a_chat_gets_the_special_tokens_that_its_template_writes_and_no_others(tmp_path: Path) -> None:
    tokenizer = load(write_folder(tmp_path, with_bos(), "llama", chat_template=FIRST, **SETTINGS))
    assert tokenizer.render_chat(CHAT) == "<s>hi"
    assert tokenizer.encode_chat(CHAT) == tokenizer.encode("<s>hi") == [1, 7]
    bare = load(tmp_path, chat_template=str(_write(tmp_path / "bare.jinja", "{{ messages[0].content }}")))
    assert bare.encode_chat(CHAT) == [7]


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("has_file", [True, False])
@pytest.mark.parametrize("has_folder", [True, False])
@pytest.mark.parametrize(
    "stated", [None, "S", [{"name": "default", "template": "D"}, {"name": "rag", "template": "R"}]]
)
def test_the_template_is_the_one_that_transformers_takes(
    has_file: bool, has_folder: bool, stated: object, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path, llama_2_style(), "llama", **({} if stated is None else {"chat_template": stated}))
    if has_file:
        _write(folder / "chat_template.jinja", "F")
    if has_folder:
        _write(folder / "additional_chat_templates" / "tool_use.jinja", "T")
    tokenizer, want = load(folder), PreTrainedTokenizerFast.from_pretrained(str(folder))
    try:
        expected = want.get_chat_template()
    except ValueError:  # none at all, or several without a default
        assert not tokenizer.has_chat
        with pytest.raises(InvalidRequestError, match="no chat template"):
            tokenizer.render_chat(CHAT)
    else:
        assert tokenizer.render_chat(CHAT) == expected
    if isinstance(want.chat_template, dict):
        for name, text in want.chat_template.items():
            assert load(folder, chat_template=name).render_chat(CHAT) == text


def test_a_template_that_is_not_there_is_an_error_with_the_names_that_are(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, llama_2_style(), "llama", chat_template=[{"name": "rag", "template": "R"}])
    with pytest.raises(CheckpointError, match=r"'nosuch'.*one of rag"):
        load_tokenizer(folder, chat_template="nosuch")


def test_a_template_that_does_not_parse_costs_chat_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, llama_2_style(), "llama")
    _write(folder / "chat_template.jinja", "{% nonsense %}")
    tokenizer = load(folder)
    assert tokenizer.encode(" hi") == [3, 7]
    with pytest.raises(InvalidRequestError, match=f"chat_template.jinja in {folder}"):
        tokenizer.encode_chat(CHAT)


# --- the object ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", sorted(tokenizers_for_tests.ALL))
def test_a_tokenizer_that_was_written_is_the_same(style: str, tmp_path: Path) -> None:
    own = tokenizers_for_tests.ALL[style]()
    write_tokenizer(own, tmp_path)
    moved = read_tokenizer(tmp_path)
    assert moved is not None
    assert moved.data == own.data
    assert moved.byte_token_ids == own.byte_token_ids
    for text in ("Hello the a!", "", "é 😀 b.", "<s>the</s>"):
        assert moved.encode(text) == own.encode(text)


def test_no_tokenizer_is_written_as_none(tmp_path: Path) -> None:
    write_tokenizer(None, tmp_path)
    assert read_tokenizer(tmp_path) is None


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="surrogates"):
        tokenizers_for_tests.byte_level().encode("\ud800")


def test_a_special_token_is_found_by_its_whole_text_alone() -> None:
    backend = llama_2_style()
    backend.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer = Tokenizer.of(TokenizerData(backend.to_str(), {}, ChatSource("", "a test")))
    found = {text: tokenizer.special_token_id(text) for text in ("</s>", "<s>", " </s>", "</", "hi", "▁", "<tool>")}
    assert found == {"</s>": 2, "<s>": 1, " </s>": None, "</": None, "hi": None, "▁": None, "<tool>": None}


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("byte_level", "Hello the é 😀 語 a."),
        ("byte_level", "\ufffd a"),
        ("sentencepiece_style", "Hello the é 😀 語 a."),
        ("sentencepiece_style", "\ufffd a"),
        ("metaspace_style", "a é!."),
    ],
)
def test_the_bytes_of_its_tokens_are_the_text(style: str, text: str) -> None:
    """Also where a character lies in several tokens. A space that a vocabulary puts first is not the text's."""
    tokenizer: Tokenizer = getattr(tokenizers_for_tests, style)()
    if style != "byte_level":
        text = text.replace(" ", "\u2581")
    ids = tokenizer.encode_bare(text)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text.replace("\u2581", " ")


def test_the_bytes_of_a_special_token_are_its_name_and_of_no_token_none() -> None:
    tokenizer = tokenizers_for_tests.byte_level()
    assert tokenizer.token_bytes(0) == b"<|endoftext|>"
    assert tokenizer.token_bytes(10**6) == b""
    emoji = [tokenizer.token_bytes(one) for one in tokenizer.encode_bare("😀")]
    assert len(emoji) == 4
    assert b"".join(emoji).decode() == "😀"
