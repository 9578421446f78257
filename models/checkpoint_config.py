"""Where a checkpoint is, and what its config.json and generation_config.json say; without torch or transformers.

Importing transformers, and torch with it, takes longer than everything else between a user's call and the start of
the worker, which waits for the spec. So the two small files are read here. Called by families/reader.py, and
`resolve_model` by the engine.
"""

import json
import logging
from pathlib import Path
from typing import Any

import msgspec

from graphgen.ipc.errors import CheckpointError
from graphgen.models.gguf.header import SUFFIX, is_gguf

logger = logging.getLogger("graphgen")

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

_DOWNLOADED = ("*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja")
_NOT_DOWNLOADED = ("*/*.json", "*/*.safetensors", "*/*.model", "*/*.txt", "consolidated*")
"""Folders and Mistral's own format hold the same weights again. Chat templates may lie in a folder."""


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The local folder or GGUF file of a model: `model` itself, or where the hub's snapshot of that id, or of that file
    of one (owner/name/file.gguf), lies after a download.

    Raises CheckpointError when it is none of these.
    """
    local = Path(model).expanduser()
    if local.is_dir() or (local.is_file() and is_gguf(local)):
        return local
    if local.exists():
        raise CheckpointError(
            f"model {model!r} is a file and no GGUF file: name the folder that holds config.json and the weights"
        )
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _download(model, revision)
    except HFValidationError as error:
        raise CheckpointError(
            f"model {model!r} is neither a local folder nor a hub id (owner/name): check the path"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"model {model!r}{at} is no local folder and was not downloaded from the hub ({error}): check the"
            " name, the network and, for a gated model, the access token"
        ) from error


def _download(model: str, revision: str | None) -> Path:
    """Raises what the hub's package raises."""
    from huggingface_hub import hf_hub_download, snapshot_download

    if is_gguf(model):
        owner, _, file = model.partition("/")
        name, _, file = file.partition("/")
        return Path(hf_hub_download(f"{owner}/{name}", file, revision=revision))
    wanted, other = list(_DOWNLOADED), list(_NOT_DOWNLOADED)
    return Path(snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns=other))


def read_config(location: str, revision: str | None) -> dict[str, Any]:
    """config.json of a folder or hub id, as it stands there. Raises CheckpointError when there is no readable file."""
    try:
        return _read_json(location, CONFIG_FILE, revision)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no config.json was read from {location!r} ({error}): {_remedy(Path(location))}"
        ) from error


def read_generation_eos(location: str, revision: str | None) -> int | list[int] | None:
    """eos_token_id of generation_config.json; None where the file or the key is missing, and, with a warning that names
    the file, where either is not what it should be: the ids of config.json do for a start."""
    try:
        raw = _read_json(location, GENERATION_FILE, revision)
        return msgspec.convert(raw.get("eos_token_id"), int | list[int] | None)
    except OSError:
        return None
    except msgspec.ValidationError:
        what, remedy = f"eos_token_id {raw['eos_token_id']!r} is neither an id nor a list of ids", "correct it"
    except ValueError as error:
        what, remedy = f"it is no JSON ({error})", "repair it or remove it"
    logger.warning(
        "%s: %s: end-of-sequence tokens are those of config.json; %s", _name_of(location, GENERATION_FILE), what, remedy
    )
    return None


def _remedy(folder: Path) -> str:
    """What a folder without a config is for."""
    if files := sorted(folder.glob(f"*{SUFFIX}")):
        return f"name the GGUF file, {files[0]}"
    if (folder / "params.json").exists():
        return (
            "it holds a model in a format of its publisher (params.json), take Hugging Face's files of the same model,"
            " which have config.json and model.safetensors"
        )
    return "name a folder with a Hugging Face checkpoint, a GGUF file or a hub id"


def _read_json(location: str, name: str, revision: str | None) -> dict[str, Any]:
    """A JSON object. Python's own reader, as transformers' files are written by it: they may hold Infinity and NaN.

    Raises OSError where there is no file, ValueError where it is something else.
    """
    try:
        value = json.loads(_find(location, name, revision).read_bytes())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value


def _name_of(location: str, name: str) -> str:
    """A file as a user knows it."""
    return str(Path(location) / name) if Path(location).is_dir() else f"{name} of {location}"


def _find(location: str, name: str, revision: str | None) -> Path:
    """The file in a folder, or downloaded from the hub. Raises OSError or ValueError."""
    folder = Path(location)
    if folder.is_dir():
        return folder / name
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(location, name, revision=revision))
