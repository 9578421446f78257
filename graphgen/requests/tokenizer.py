"""The model's tokenizer: text to ids and back.

Owns the Hugging Face tokenizer object. Never runs code of a checkpoint. Loaded by `requests.core` while the engine's
processes start, because importing transformers takes seconds.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphgen.ipc.errors import CheckpointError
from graphgen.requests.portable_tokenizer import PortableTokenizer, encode_with

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model", "tekken.json")
_WHOLE_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Of transformers: one class by its old and its new name, for tokenizers without code of their own."""


class Tokenizer:
    """Safe to use from several threads."""

    def __init__(self, hf_tokenizer: Any) -> None:  # transformers publishes no types, hence Any
        self._hf = hf_tokenizer
        # The Rust tokenizer behind the Hugging Face object: a tenth of the cost for one token. Old models may lack it.
        self._backend: Any = getattr(hf_tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self.byte_token_ids = self._find_byte_tokens()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with the special tokens that the model wants around a prompt."""
        return encode_with(self._encode, texts)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if self._backend is None:
            return [list(self._hf.encode(text)) for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=True)]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of the ids, spaces as the model wrote them (no clean-up of spaces before punctuation)."""
        if self._backend is not None:
            return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))
        return str(
            self._hf.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def export(self) -> PortableTokenizer | None:
        """What a process without transformers needs to do the same; None for one that is not Rust's."""
        if self._backend is None:
            return None
        template = self._hf.chat_template
        if isinstance(template, dict):  # several, by name
            template = template.get("default")
        return PortableTokenizer(
            backend=self._backend.to_str(),
            byte_token_ids=tuple(sorted(self.byte_token_ids)),
            chat_template=template,
            special_tokens={
                name: token for name, token in self._hf.special_tokens_map.items() if isinstance(token, str)
            },
        )

    def _find_byte_tokens(self) -> frozenset[int]:
        """Ids of the tokens `<0x00>` to `<0xFF>` where they stand for bytes."""
        ids = self._hf.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
        unknown = self._hf.unk_token_id
        known = frozenset(token_id for token_id in ids if token_id is not None and token_id != unknown)
        letter = self._hf.convert_tokens_to_ids("<0x41>")
        return known if letter in known and self.decode([letter], skip_special_tokens=False) == "A" else frozenset()


def load_tokenizer(location: str | Path, revision: str | None) -> Tokenizer | None:
    """The tokenizer of a local folder or hub id; None for a folder that holds none, whose model is served by ids alone.

    Raises CheckpointError for one that cannot be read.
    """
    folder = Path(location).expanduser()
    if folder.is_dir() and not any((folder / name).exists() for name in _FILES):
        return None
    try:
        if _says_all_itself(folder):
            from transformers import PreTrainedTokenizerFast

            return Tokenizer(PreTrainedTokenizerFast.from_pretrained(str(folder)))
        from transformers import AutoTokenizer

        return Tokenizer(AutoTokenizer.from_pretrained(str(location), revision=revision, trust_remote_code=False))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CheckpointError(
            f"the tokenizer of {str(location)!r} cannot be read ({error}): repair it or name another with tokenizer="
        ) from error


def _says_all_itself(folder: Path) -> bool:
    """Whether tokenizer.json is the whole tokenizer, so that its class is known without AutoTokenizer.

    That imports the model's config and with it torch, two thirds of the time, because for some model types it
    overrules what the files say. It does not for "llama", which Llama 3 and many others are.
    """
    try:
        model, config = (json.loads((folder / name).read_bytes()) for name in ("config.json", "tokenizer_config.json"))
        return (
            model["model_type"] == "llama"
            and config["tokenizer_class"] in _WHOLE_CLASSES
            and "auto_map" not in config
            and (folder / "tokenizer.json").exists()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
