"""A model's tokenizer: text and chats to ids, and ids to text.

Works on plain data, so that a process without the checkpoint and without transformers has the same tokenizer: the
supervisor of a server reads the data (`graphgen.requests.tokenizer_files`), and its frontend makes its tokenizer of
them. Knows no model and never runs code of a checkpoint.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
from msgspec import Struct

from graphgen.ipc.errors import InvalidRequestError
from graphgen.launch.tokenizer_file import FILE
from graphgen.requests.chat_template import ChatSource, ChatTemplate


class TokenizerData(Struct, frozen=True):
    """All that encoding, decoding and chats need. `graphgen.launch.tokenizer_file.TokenizerPart` is a part of it."""

    backend: str  # as tokenizers writes it: tokenizer.json
    special_tokens: dict[str, str]  # as templates name them: bos_token, eos_token
    chat_source: ChatSource | None = None
    eos_token_id: int | None = None  # follows from the others


class Tokenizer:
    """Safe to use from several threads, which it lets run meanwhile."""

    def __init__(
        self,
        backend: Any,
        special_tokens: Mapping[str, str],
        chat_source: ChatSource | None = None,
        response_template: Mapping[str, Any] | None = None,
    ) -> None:
        """backend: of the package tokenizers, which publishes no types. response_template: how the model says its
        outputs are to be read, which is not among its data. The others: see TokenizerData."""
        self.response_template = response_template
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special_tokens = dict(special_tokens)
        self._chat_source = chat_source
        self.chat_template = None if chat_source is None else ChatTemplate(chat_source, special_tokens)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self.byte_token_ids = self._find_byte_tokens()
        """Ids of the tokens `<0x00>` to `<0xFF>`, where they stand for bytes."""
        self.leading_id = self._find_leading_token()
        """The special token that is put before every text; None where there is none."""
        self._added_ids = frozenset(backend.get_added_tokens_decoder())
        self._is_byte_level = _has_decoder(json.loads(backend.to_str())["decoder"], "ByteLevel")
        self._bytes_of: dict[int, bytes] = {}  # of the tokens that were asked for

    @classmethod
    def of(cls, data: TokenizerData) -> Self:
        """From its data, which takes a second for the largest vocabularies."""
        from tokenizers import Tokenizer as Backend

        return cls(Backend.from_str(data.backend), data.special_tokens, data.chat_source)

    @property
    def data(self) -> TokenizerData:
        """What makes the same tokenizer elsewhere."""
        return TokenizerData(self._backend.to_str(), self._special_tokens, self._chat_source, self.eos_token_id)

    @property
    def chat_text(self) -> str:
        """The chat template as it is written; empty where there is none."""
        return "" if self._chat_source is None else self._chat_source.text

    @property
    def special_tokens(self) -> dict[str, str]:
        """By the names that templates have for them: bos_token, eos_token."""
        return dict(self._special_tokens)

    @property
    def added_tokens(self) -> dict[str, int]:
        """The ids of the tokens that are special or were added to the vocabulary, by their text."""
        return {token.content: token_id for token_id, token in self._backend.get_added_tokens_decoder().items()}

    @property
    def has_chat(self) -> bool:
        """Whether the model has a chat template that can be read."""
        return self.chat_template is not None and not self.chat_template.fault

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the special tokens that the tokenizer puts around a prompt. See `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with the special tokens that the tokenizer puts around a prompt.

        A text that begins with the beginning-of-sequence token, as a rendered chat does, gets no second one.
        Raises InvalidRequestError for what is no text.
        """
        batch = self._encode(texts, special=True)
        leading = self.leading_id
        if leading is None:
            return batch
        return [ids[1:] if ids[:2] == [leading, leading] else ids for ids in batch]

    def encode_bare(self, text: str) -> list[int]:
        """Ids of a text alone, without the special tokens around a prompt. Raises as `encode_batch`."""
        return self._encode([text], special=False)[0]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of the ids, spaces as the model wrote them (no clean-up of spaces before punctuation)."""
        return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """What a text has of the token: its UTF-8, or a part of a character's; a special token's name. Empty for an id
        that the tokenizer does not have. In vocabularies of sentencepiece a first token's space is no part of the text.
        """
        found = self._bytes_of.get(token_id)
        if found is None:
            found = self._bytes_of[token_id] = self._make_bytes(token_id)
        return found

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a chat by the model's template, ready for the model's turn. Each message has role and content.

        The other arguments are those of `graphgen.Chat`. Raises InvalidRequestError where there is no template, or it
        does not take the messages.
        """
        if self.chat_template is None:
            raise InvalidRequestError(
                "the model has no chat template: give the prompt as text, or name a template with chat_template="
            )
        return self.chat_template.render(messages, tools, documents, chat_template_kwargs)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of `render_chat`: the template writes the special tokens itself."""
        text = self.render_chat(messages, tools, documents, chat_template_kwargs)
        return self.encode_bare(text)

    def special_token_id(self, text: str) -> int | None:
        """The id of the special token that is exactly this text; None where there is none."""
        token_id: int | None = self._backend.token_to_id(text)
        if token_id is None or self.decode([token_id]) or not self.decode([token_id], skip_special_tokens=False):
            return None
        return token_id

    def __repr__(self) -> str:
        return f"Tokenizer({self._backend.get_vocab_size()} tokens, {'with' if self.has_chat else 'without'} chat)"

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=special)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequestError(
                f"a prompt is no valid Unicode text ({error}): remove its lone surrogates"
            ) from None
        return [encoding.ids for encoding in encodings]

    def _make_bytes(self, token_id: int) -> bytes:
        piece: str | None = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self.byte_token_ids:
            return bytes.fromhex(piece[3:5])
        if token_id in self._added_ids:
            return piece.encode()
        if self._is_byte_level and all(character in BYTE_OF for character in piece):
            return bytes(BYTE_OF[character] for character in piece)
        if SPACE in piece:
            return piece.replace(SPACE, " ").encode()
        return self.decode([token_id], skip_special_tokens=False).encode()

    def _named_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    def _find_leading_token(self) -> int | None:
        bare, whole = (self._encode(["a"], special)[0] for special in (False, True))
        return whole[0] if len(whole) > len(bare) and whole[:1] != bare[:1] else None

    def _find_byte_tokens(self) -> frozenset[int]:
        found = {byte: self._backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
        known = {byte: token_id for byte, token_id in found.items() if token_id is not None}
        letter = known.get(ord("A"))
        if letter is None or self.decode([letter], skip_special_tokens=False) != "A":
            return frozenset()
        return frozenset(known.values())


SPACE = "\u2581"
"""How vocabularies of sentencepiece write a space."""


def _byte_alphabet() -> dict[str, int]:
    """Of byte-level vocabularies: which character stands for which byte. Printable ones of Latin-1 are their own, and
    the others follow one another from U+0100 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


def _has_decoder(decoder: Any, kind: str) -> bool:
    """decoder: of tokenizer.json, which may be a sequence of them."""
    if decoder is None:
        return False
    return decoder["type"] == kind or any(_has_decoder(one, kind) for one in decoder.get("decoders", ()))


def write_tokenizer(tokenizer: Tokenizer | None, folder: Path) -> None:
    """Puts the file into `folder` in one rename; None for a model that is served by token ids alone."""
    partial = folder / f"{FILE}.partial"
    partial.write_bytes(msgspec.msgpack.encode(None if tokenizer is None else tokenizer.data))
    partial.rename(folder / FILE)


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Waits for the file: the supervisor writes it when it has read the checkpoint's tokenizer."""
    path = folder / FILE
    while not path.exists():
        time.sleep(0.01)
    data = msgspec.msgpack.decode(path.read_bytes(), type=TokenizerData | None)
    return None if data is None else Tokenizer.of(data)
