"""A model's tokenizer and chat template as plain data, and their use without transformers, whose import brings torch.

Owns what both kinds of tokenizer share. The supervisor of a server exports the data from `requests.tokenizer`, and the
frontend, which has neither torch nor transformers, makes its tokenizer from them: so both encode alike.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Protocol

import msgspec
from msgspec import Struct

from graphgen.ipc.errors import InvalidRequestError

FILE = "tokenizer.msgpack"


class TextTokenizer(Protocol):
    """Text to ids and back."""

    @property
    def byte_token_ids(self) -> frozenset[int]:
        """Ids of the tokens `<0x00>` to `<0xFF>`, where they stand for bytes."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str: ...


class PortableTokenizer(Struct, frozen=True):
    """All that encoding, decoding and chats need."""

    backend: str  # as tokenizers writes it
    byte_token_ids: tuple[int, ...]
    chat_template: str | None
    special_tokens: dict[str, str]  # as templates name them: bos_token, eos_token


def write_tokenizer(portable: PortableTokenizer | None, folder: Path) -> None:
    """Puts the file into `folder` in one rename; None for a model that is served by token ids alone."""
    partial = folder / f"{FILE}.partial"
    partial.write_bytes(msgspec.msgpack.encode(portable))
    partial.rename(folder / FILE)


def read_tokenizer(folder: Path) -> PortableTokenizer | None:
    """Waits for the file: the supervisor writes it when transformers has read the tokenizer, which takes seconds."""
    path = folder / FILE
    while not path.exists():
        time.sleep(0.01)
    return msgspec.msgpack.decode(path.read_bytes(), type=PortableTokenizer | None)


class RustTokenizer:
    """A tokenizer of the tokenizers library alone. Safe to use from several threads, which it lets run meanwhile."""

    def __init__(self, portable: PortableTokenizer) -> None:
        from tokenizers import Tokenizer

        self._backend: Any = Tokenizer.from_str(portable.backend)  # tokenizers publishes no types
        self.byte_token_ids = frozenset(portable.byte_token_ids)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with the special tokens that the model wants around a prompt."""
        return encode_with(lambda batch: self._encode(batch, special=True), texts)

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a rendered chat, whose template wrote the special tokens itself."""
        return encode_with(lambda batch: self._encode(batch, special=False), [text])[0]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=special)]


class ChatTemplate:
    """A model's own chat template: Jinja in a sandbox, with what transformers gives such templates.

    The extensions and globals follow `apply_chat_template`, so that a chat becomes the text that the model was
    trained on. Raises InvalidRequestError for a chat that the template refuses.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template = environment.from_string(template)
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of the chat, ready for the model's turn."""
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=[dict(message) for message in messages], add_generation_prompt=True, **self._special_tokens
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise InvalidRequestError(
                f"the model's chat template does not take these messages ({error}): change their roles or order"
            ) from None


def encode_with(encode: Callable[[Sequence[str]], list[list[int]]], texts: Sequence[str]) -> list[list[int]]:
    """Raises InvalidRequestError for what is no text."""
    try:
        return encode(texts)
    except (UnicodeEncodeError, TypeError) as error:
        raise InvalidRequestError(f"a prompt is no valid Unicode text ({error}): remove its lone surrogates") from None


def _raise(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """Jinja's own filter escapes HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)
