"""The tokenizer of a GGUF file: its metadata become a tokenizer of the package tokenizers.

Owns what llama.cpp's names of tokenizers and of ways to split text mean: byte-level BPE with its merges, and
SentencePiece's BPE, whose merges follow from its pieces' scores. Other kinds are refused by name. Knows no templates'
language and no model. Called by `graphgen.requests.tokenizer_files`.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from graphgen.ipc.errors import CheckpointError
from graphgen.models.gguf.header import read_header
from graphgen.requests.chat_template import ChatSource
from graphgen.requests.tokenizer import Tokenizer

logger = logging.getLogger("graphgen")

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = range(1, 5)
"""Types of tokens."""
_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""Stands for a space in the pieces of SentencePiece."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEADING = r"[^\r\n\p{L}\p{N}]?"


def _words(digits: str) -> str:
    """As GPT-4 splits text, but for its numbers."""
    return rf"{_CONTRACTIONS}|{_LEADING}\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"


def _cased_words(digits: str, contractions: str) -> str:
    """As GPT-4o splits text: before an upper-case letter too."""
    words = (f"{_LEADING}{_UPPER}*{_LOWER}+{contractions}", f"{_LEADING}{_UPPER}+{_LOWER}*{contractions}")
    return "|".join((*words, digits, r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _REST))


_ONE_DIGIT, _THREE_DIGITS = r"\p{N}", r"\p{N}{1,3}"
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
_QWEN2 = ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez")
_UNNAMED = "default"
_SPLITS: Mapping[str, str | None] = {
    **dict.fromkeys((_UNNAMED, "gpt-2", "phi-2", "olmo", "mpt", "jais", "roberta-bpe"), None),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _ONE_DIGIT),
    **dict.fromkeys((*_LLAMA3, "smaug-bpe", "dbrx"), _words(_THREE_DIGITS)),
    **dict.fromkeys(_QWEN2, _words(_ONE_DIGIT)),
    "tekken": _cased_words(_ONE_DIGIT, ""),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _cased_words(_THREE_DIGITS, f"{_CONTRACTIONS}?")),
}
"""tokenizer.ggml.pre -> what a text is split by; None, and what is left by one digit: as GPT-2 splits it."""
_WHOLE_WORDS = (*_LLAMA3, "tekken")
"""A word that is a token is that token, whatever the merges would make of it. A text begins with BOS unless the file
says that it does not."""

Metadata = Mapping[str, Any]
"""Of a GGUF file: values of several types."""


def read_gguf_tokenizer(file: Path, template: ChatSource | str | None) -> Tokenizer:
    """The tokenizer of a GGUF file. template: one to use, or the name of one of the file's; None takes its default.

    Raises CheckpointError for a file that cannot be read, a kind of tokenizer that graphgen does not have and a
    template that the file lacks.
    """
    metadata = read_header(file).metadata
    _check_types(metadata, file)
    tokens, types = _vocabulary(metadata, file)
    kind = metadata.get("tokenizer.ggml.model")
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in makers:
        raise CheckpointError(f"{file} has a tokenizer of the kind {kind!r}, supported are gpt2 and llama: {_REMEDY}")
    try:
        backend = makers[kind](metadata, tokens, file)
    except CheckpointError:
        raise
    except Exception as error:  # the package's own have no other type
        raise CheckpointError(f"{file} has a tokenizer that cannot be built ({error}): {_REMEDY}") from error
    _add_tokens(backend, tokens, types)
    named = _named_tokens(metadata, tokens)
    _surround(backend, metadata, named, kind)
    source = template if isinstance(template, ChatSource) else _chat_source(metadata, file, template)
    return Tokenizer(backend, named, source)


_TokenId = Annotated[int, msgspec.Meta(ge=0)]
_TYPES: Mapping[str, Any] = {
    "tokenizer.chat_template": str,
    "tokenizer.ggml.tokens": list[str],
    "tokenizer.ggml.merges": list[str],
    "tokenizer.ggml.token_type": list[int],
    "tokenizer.ggml.scores": list[float],
    "tokenizer.ggml.pre": str,
    "tokenizer.ggml.model": str,
    **{f"tokenizer.ggml.{name}_token_id": _TokenId for name in _NAMED},
    **{f"tokenizer.ggml.{name}": bool for name in ("add_bos_token", "add_eos_token", "add_space_prefix")},
}
"""Of what is read here; kinds of Python's type system, which share no type of their own."""

_REMEDY = 'name another tokenizer with tokenizer=, or serve token ids alone with tokenizer="none"'


def _check_types(metadata: Metadata, file: Path) -> None:
    """Raises CheckpointError for an entry of the tokenizer that is not of its kind."""
    for key, kind in _TYPES.items():
        try:
            msgspec.convert(metadata.get(key), kind | None)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"{file} has a {key} that is not understood ({error}): {_REMEDY}") from error


def _vocabulary(metadata: Metadata, file: Path) -> tuple[list[str], list[int]]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise CheckpointError(f"{file} has no tokenizer (tokenizer.ggml.tokens): {_REMEDY}")
    if _is_gemma(metadata):  # whose pieces of several spaces are written with spaces
        tokens = [_SPACE * len(token) if set(token) == {" "} else token for token in tokens]
    types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"{file} has {len(tokens)} tokens and types of {len(types)}: {_REMEDY}")
    return tokens, types


def _byte_level(metadata: Metadata, tokens: Sequence[str], file: Path) -> Any:
    """BPE over bytes (GPT-2's), each byte written as a character."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    kind = metadata.get("tokenizer.ggml.pre", _UNNAMED)
    if kind not in _SPLITS:
        raise CheckpointError(
            f"{file} splits text in the way {kind!r} (tokenizer.ggml.pre), supported are {', '.join(_SPLITS)}:"
            f" {_REMEDY}"
        )
    if kind == _UNNAMED:
        logger.warning(
            "%s does not say how its tokenizer splits text (tokenizer.ggml.pre): it is split as GPT-2 does; a newer"
            " file says it",
            file,
        )
    merges = [_pair(merge) for merge in metadata.get("tokenizer.ggml.merges") or ()]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=kind in _WHOLE_WORDS))
    split = _SPLITS[kind]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *([] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (None, _ONE_DIGIT)),
        ]
    )
    if kind in _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Metadata, tokens: Sequence[str], file: Path) -> Any:
    """BPE over characters with bytes for those that it lacks; spaces are a character of their own."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    backend = Backend(
        models.BPE(
            {token: number for number, token in enumerate(tokens)},
            _merges(metadata, tokens, file),
            unk_token=None if unknown is None or unknown >= len(tokens) else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    replace = normalizers.Replace(" ", _SPACE)
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
        parts.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = replace
    backend.decoder = decoders.Sequence(parts)
    return backend


def _merges(metadata: Metadata, tokens: Sequence[str], file: Path) -> list[tuple[str, str]]:
    """The file's, or every pair of pieces that makes a third: those of the best score first, Gemma's, whose scores say
    nothing, in the order of the vocabulary. Of equal scores the longest beginning, as Hugging Face's converters of
    SentencePiece have it."""
    if (merges := metadata.get("tokenizer.ggml.merges")) is not None:
        return [_pair(merge) for merge in merges]
    scores = metadata.get("tokenizer.ggml.scores")
    if _is_gemma(metadata):
        scores = [-number for number in range(len(tokens))]
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(f"{file} has no scores of its {len(tokens)} tokens (tokenizer.ggml.scores): {_REMEDY}")
    known = {token: number for number, token in enumerate(tokens)}
    ranked = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in known and right in known:
                ranked.append((-score, -cut, len(right), known[token], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _is_gemma(metadata: Metadata) -> bool:
    return str(metadata.get("general.architecture")).startswith("gemma")


def _add_tokens(backend: Any, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Those that are found in a text before it is split. Control tokens, and the unknown one, are special."""
    from tokenizers import AddedToken

    backend.add_tokens(
        [
            AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED)
        ]
    )


def _named_tokens(metadata: Metadata, tokens: Sequence[str]) -> dict[str, str]:
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in _NAMED.items()}
    return {name: tokens[number] for name, number in ids.items() if number is not None and number < len(tokens)}


def _surround(backend: Any, metadata: Metadata, named: Mapping[str, str], kind: str) -> None:
    """With the tokens that a prompt begins and ends with."""
    from tokenizers import processors

    by_itself = kind != "gpt2" or metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS
    wanted = {
        "bos_token": metadata.get("tokenizer.ggml.add_bos_token", by_itself),
        "eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    bos, eos = (named.get(name) if wanted[name] else None for name in wanted)
    if bos is None and eos is None:
        return
    template = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    ids = [(token, backend.token_to_id(token)) for token in {bos, eos} - {None}]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)


def _chat_source(metadata: Metadata, file: Path, name: str | None) -> ChatSource | None:
    key = "tokenizer.chat_template" if name is None else f"tokenizer.chat_template.{name}"
    text = metadata.get(key)
    if text is None and name is not None:
        found = [
            key.removeprefix("tokenizer.chat_template.")
            for key in metadata
            if key.startswith("tokenizer.chat_template.")
        ]
        raise CheckpointError(
            f"chat_template is {name!r}, which is no file and no template of {file}: give a file or one of"
            f" {', '.join(found) or 'none, since it has no templates of other names'}"
        )
    return None if text is None else ChatSource(text, f"{key} of {file}")
