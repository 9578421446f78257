"""Reads the tokenizer of a checkpoint: its files, whichever it has, become a Tokenizer.

tokenizer.json is the truth where there is one: transformers would rebuild the tokenizers of some model types by class
and give other ids. `tokenizer_config.json` and its kin say which tokens are special, and chats' templates. Other files
(tokenizer.model, vocab.json) are converted by transformers, whose import takes seconds. Never runs code of a
checkpoint. Called by `requests.core` while the engine's processes start.

Which special tokens a prompt gets is said by tokenizer.json alone, as transformers 5 and vLLM have it:
`add_bos_token` and `add_eos_token` of tokenizer_config.json count for tokenizers that are converted.
"""

import importlib.util
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphgen.ipc.errors import CheckpointError
from graphgen.models.gguf.header import is_gguf
from graphgen.requests.chat_template import ChatSource
from graphgen.requests.tokenizer import Tokenizer
from graphgen.requests.tokenizer_gguf import read_gguf_tokenizer

logger = logging.getLogger("graphgen")

_CONFIG = "tokenizer_config.json"
_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_FILES = ("tokenizer.json", *_SENTENCEPIECE_FILES, "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")
"""A folder with one of these has a tokenizer. Its settings alone, tokenizer_config.json, are none."""
_TEMPLATE_FILE = "chat_template.jinja"
_TEMPLATE_FOLDER = "additional_chat_templates"
_DEFAULT = "default"
_DOWNLOADED = (*_FILES, "*token*.json", "merges.txt", "config.json", "*.jinja")

Settings = Mapping[str, Any]
"""What a JSON file says: values of any kind."""


def load_tokenizer(
    location: str | Path, revision: str | None = None, chat_template: str | None = None
) -> Tokenizer | None:
    """The tokenizer of a local folder, a GGUF file or a hub id; None for a folder that holds none, whose model is
    served by ids alone.

    chat_template: a file with a template, or the name of one of the model's own; None takes the model's default.
    Raises CheckpointError for a tokenizer or a template that cannot be read.
    """
    folder = Path(location).expanduser()
    if is_gguf(folder):
        return _of_gguf(folder, chat_template)
    if not folder.is_dir():
        folder = _download(str(location), revision)
    if not any((folder / name).exists() for name in _FILES):
        return None
    try:
        settings = _read_settings(folder)
        source = _find_template(folder, settings, chat_template)
        if (folder / "tokenizer.json").exists():
            return _read_own(folder, settings, source)
        return _convert(folder, settings, source)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers and the converters raise whatever they like, plain Exception too
        raise CheckpointError(
            f"the tokenizer in {folder} ({_found(folder)}) cannot be read: {error}; {_remedy(folder)}, name another"
            ' with tokenizer=, or serve token ids alone with tokenizer="none"'
        ) from error


def _of_gguf(file: Path, chosen: str | None) -> Tokenizer:
    """A template in a file goes before those of the model."""
    if chosen is None or not (path := Path(chosen).expanduser()).is_file():
        return read_gguf_tokenizer(file, None if chosen == _DEFAULT else chosen)
    return read_gguf_tokenizer(file, ChatSource(_read_text(path), chosen))


def _found(folder: Path) -> str:
    return ", ".join(name for name in (*_FILES, _CONFIG) if (folder / name).exists())


def _remedy(folder: Path) -> str:
    if (folder / "tokenizer.json").exists():
        return "mend the files or update the package tokenizers"
    if (tekken := folder / "tekken.json").exists():
        return (
            'write its tokenizer.json with `python -c "from transformers.integrations.mistral import'
            f' convert_tekken_tokenizer as convert; convert({str(tekken)!r}).save_pretrained({str(folder)!r})"`'
        )
    missing = [name for name in ("sentencepiece", "google.protobuf", "tiktoken") if not _is_installed(name)]
    if missing and any((folder / name).exists() for name in (*_SENTENCEPIECE_FILES, "tiktoken.model")):
        packages = " ".join(name.replace("google.", "") for name in missing)
        return f"it needs a package that is not installed (pip install {packages}), or add its tokenizer.json"
    return "add its tokenizer.json"


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package above
        return False


def _read_settings(folder: Path) -> Settings:
    """tokenizer_config.json, with what special_tokens_map.json says where the former lists no tokens itself."""
    settings = _read_json(folder / _CONFIG)
    if "added_tokens_decoder" in settings:
        return settings
    return {**settings, **_read_json(folder / "special_tokens_map.json")}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return values


def _read_own(folder: Path, settings: Settings, source: ChatSource | None) -> Tokenizer:
    """Of tokenizer.json. What its settings call special is special, where the file has such a token."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    backend = Backend.from_str(text)
    special_tokens = _special_tokens(settings)
    own = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    listed: dict[str, Any] = settings.get("added_tokens_decoder") or {}
    for number, token in sorted(listed.items(), key=lambda item: int(item[0])):
        if backend.token_to_id(token["content"]) is None:
            _add_token(backend, int(number), token, folder)
    called_special = [*special_tokens.values(), *_extra_special(settings)]
    called_special += [token["content"] for token in listed.values() if token.get("special")]
    changed = len(backend.get_added_tokens_decoder()) > len(own)
    for content in dict.fromkeys(called_special):
        token = own.get(content)
        if backend.token_to_id(content) is not None and (token is None or not token.special):
            flags = {} if token is None else _flags(token)
            backend.add_special_tokens([AddedToken(content, special=True, **flags)])
            changed = True
    if changed:
        # One that was read and then changed does not always take a token for special: it is read again.
        backend = Backend.from_str(backend.to_str())
    return Tokenizer(backend, special_tokens, source, _response_template(settings))


def _add_token(backend: Any, number: int, token: Mapping[str, Any], folder: Path) -> None:
    """A token that tokenizer.json lacks and the settings give a number: so do those who add tokens to a model."""
    from tokenizers import AddedToken

    backend.add_tokens([AddedToken(**{name: value for name, value in token.items() if not name.startswith("_")})])
    if backend.token_to_id(token["content"]) != number:
        raise CheckpointError(
            f"{_CONFIG} in {folder} gives {token['content']!r} the id {number}, which it cannot have because"
            " tokenizer.json lacks tokens before it: save both files anew, or take it out of added_tokens_decoder"
        )


def _flags(token: Any) -> dict[str, bool]:  # an AddedToken: tokenizers publishes no types
    return {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized")}


def _special_tokens(settings: Settings) -> dict[str, str]:
    """The named ones: bos_token, eos_token and whatever else the settings name so."""
    named = {name: _content(value) for name, value in settings.items() if name.endswith("_token")}
    more = settings.get("extra_special_tokens")
    if isinstance(more, dict):
        named |= {name: _content(value) for name, value in more.items()}
    return {name: token for name, token in named.items() if token is not None}


def _extra_special(settings: Settings) -> list[str]:
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
    return [] if isinstance(extra, dict) else [token for token in map(_content, extra) if token is not None]


def _content(value: object) -> str | None:
    """A token is written as its text, or as an object that holds it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _find_template(folder: Path, settings: Settings, chosen: str | None) -> ChatSource | None:
    """Raises CheckpointError when what was chosen is not there."""
    if chosen is not None and Path(chosen).expanduser().is_file():
        return ChatSource(_read_text(Path(chosen).expanduser()), chosen)
    templates = _own_templates(folder, settings)
    name = _DEFAULT if chosen is None else chosen
    if name in templates:
        return templates[name]
    if chosen is not None:
        raise CheckpointError(
            f"chat_template is {chosen!r}, which is no file and no template of {folder}: give a file or one of"
            f" {', '.join(sorted(templates)) or 'none, since it has no templates'}"
        )
    if templates:
        logger.warning(
            "%s has chat templates and none of them is the default: name one of %s with chat_template=",
            folder,
            ", ".join(sorted(templates)),
        )
    return None


def _own_templates(folder: Path, settings: Settings) -> dict[str, ChatSource]:
    """A model's templates by name. Files go before the settings, as transformers has it."""
    files = {_DEFAULT: folder / _TEMPLATE_FILE}
    files |= {path.stem: path for path in sorted((folder / _TEMPLATE_FOLDER).glob("*.jinja"))}
    found = {name: _template_in(path, folder) for name, path in files.items() if path.exists()}
    if found:
        return found
    stated, origin = settings.get("chat_template"), f"chat_template of {_CONFIG} in {folder}"
    if stated is None or isinstance(stated, str):
        return {} if stated is None else {_DEFAULT: ChatSource(stated, origin)}
    try:
        return {str(one["name"]): ChatSource(_text(one["template"]), f"{one['name']!r} of {origin}") for one in stated}
    except (TypeError, KeyError):
        return {_DEFAULT: ChatSource("", origin, "it is no text and no list of templates with name and text")}


def _template_in(path: Path, folder: Path) -> ChatSource:
    """A file of the model's that cannot be read costs chat, as one does that does not parse."""
    origin = f"{path.relative_to(folder)} in {folder}"
    try:
        return ChatSource(_read_text(path), origin)
    except (OSError, ValueError) as error:
        return ChatSource("", origin, str(error))


def _response_template(settings: Settings) -> dict[str, Any] | None:
    found = settings.get("response_template")
    return found if isinstance(found, dict) else None


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is no UTF-8 ({error})") from None


def _convert(folder: Path, settings: Settings, source: ChatSource | None) -> Tokenizer:
    """Of other files, by transformers."""
    from transformers import AutoTokenizer

    hugging_face = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    backend = getattr(hugging_face, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(hugging_face).__name__} is written in Python, only those of the package tokenizers run"
        )
    named = {name: token for name, token in hugging_face.special_tokens_map.items() if isinstance(token, str)}
    return Tokenizer(backend, named, source, _response_template(settings))


def _download(location: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(location, revision=revision, allow_patterns=list(_DOWNLOADED)))
    except Exception as error:  # of the hub, of the network and of names that are none
        raise CheckpointError(
            f"tokenizer {location!r} is no local folder and was not downloaded from the hub ({error}): check the name,"
            " the network and, for a gated model, the access token"
        ) from error
