"""Which Hugging Face class reads a tokenizer: always the one that AutoTokenizer takes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from graphgen import demo
from graphgen.requests.tokenizer import load_tokenizer

TEXTS = ("", " ", "O Romeo, Romeo!  wherefore\n\tart thou", "<|endoftext|>", "naïve 😀", "a" * 300)


def copy_of_demo(folder: Path, model_type: str, **changes: object) -> Path:
    """The demo's tokenizer with other settings; a value of None removes one."""
    shutil.copy(demo.model_folder() / "tokenizer.json", folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    settings = json.loads((demo.model_folder() / "tokenizer_config.json").read_bytes()) | changes
    kept = {name: value for name, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tokenizer_class": "TokenizersBackend"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        {"tokenizer_class": "LlamaTokenizerFast"},
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"tokenizer_class": None},
    ],
    ids=str,
)
def test_ids_and_text_are_those_of_the_auto_class(model_type: str, changes: dict[str, object], tmp_path: Path) -> None:
    folder = copy_of_demo(tmp_path, model_type, **changes)
    tokenizer, want = load_tokenizer(folder, None), AutoTokenizer.from_pretrained(str(folder))
    assert tokenizer is not None
    assert type(tokenizer._hf) is type(want)
    ids = tokenizer.encode(TEXTS)
    assert ids == [want.encode(text) for text in TEXTS]
    for skip in (True, False):
        assert [tokenizer.decode(one, skip) for one in ids] == [
            want.decode(one, skip_special_tokens=skip, clean_up_tokenization_spaces=False) for one in ids
        ]


def test_a_tokenizer_that_is_one_file_is_read_without_torch() -> None:
    code = (
        "import sys\nfrom graphgen import demo\nfrom graphgen.requests.tokenizer import load_tokenizer\n"
        "assert load_tokenizer(demo.model_folder(), None).encode(['to be'])[0]\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "sympy"}
