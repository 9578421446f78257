"""Where a checkpoint is, and what its config.json and generation_config.json say; without torch or transformers.

Importing transformers, and torch with it, takes longer than everything else between a user's call and the start of
the worker, which waits for the spec. So the two small files are read here, and keys a file leaves out get the values
transformers would give them; a test holds both to be equal. Called by families.py, and `resolve_model` by the engine.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from graphgen.ipc.errors import CheckpointError

logger = logging.getLogger("graphgen")

GENERATION_FILE = "generation_config.json"

_COMMON: Mapping[str, Any] = {
    "architectures": None,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA: Mapping[str, Any] = {
    **_COMMON,
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN: Mapping[str, Any] = {
    **_COMMON,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {
        **_LLAMA,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
}
"""model_type -> what transformers takes for a key the file leaves out. Values differ by key, hence Any."""

ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""model_type -> the class that transformers makes of it for text generation."""

_DOWNLOADED = ("*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja")
_NOT_DOWNLOADED = ("*/*.json", "*/*.safetensors", "*/*.model", "*/*.txt", "consolidated*")
"""Folders and Mistral's own format hold the same weights again. Chat templates may lie in a folder."""


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The local folder of a model: `model` itself, or where the hub's snapshot of that id lies after a
    download.

    Raises CheckpointError when it is neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"model {model!r} is a file: name the folder that holds config.json and the weights")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=list(_DOWNLOADED),
                ignore_patterns=list(_NOT_DOWNLOADED),
            )
        )
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


def read_config(location: str, revision: str | None) -> SimpleNamespace:
    """config.json of a folder or hub id, as an object with the attributes of a transformers config.

    Raises CheckpointError when there is no readable file, TypeError where a value is not what its key means.
    """
    try:
        raw = _read_json(location, "config.json", revision)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no config.json was read from {location!r} ({error}): name a folder with a Hugging Face"
            " checkpoint or a hub id"
        ) from error
    model_type = raw.get("model_type") or _model_type_of(raw.get("architectures") or ())
    values = {**DEFAULTS.get(str(model_type), _COMMON), **raw, "model_type": model_type, "_name_or_path": location}
    if "max_window_layers" in DEFAULTS.get(str(model_type), ()):
        _derive_layer_types(values)
    return SimpleNamespace(**values)


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


def _read_json(location: str, name: str, revision: str | None) -> dict[str, Any]:
    """A JSON object. Python's own reader, as transformers' files are written by it: they may hold Infinity and NaN.

    Raises OSError where there is no file, ValueError where it is something else.
    """
    value = json.loads(_find(location, name, revision).read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value


def _model_type_of(architectures: Sequence[str]) -> str | None:
    """transformers writes both; files made by hand may name the class alone."""
    return next((model_type for model_type, name in ARCHITECTURES.items() if name in architectures), None)


def _derive_layer_types(values: dict[str, Any]) -> None:
    """Qwen: the layers from max_window_layers on slide, if any does at all."""
    if not values["use_sliding_window"]:
        values["sliding_window"] = None
    if values["layer_types"] is None:
        window, first = values["sliding_window"], values["max_window_layers"]
        values["layer_types"] = [
            "sliding_attention" if window is not None and layer >= first else "full_attention"
            for layer in range(values["num_hidden_layers"])
        ]


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
