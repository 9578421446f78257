"""How a model wants its tokens drawn: the sampling values of its generation_config.json, or of its GGUF file.

Reads the file and judges each value by itself: one that cannot be used costs a warning that names file and key, and
the model is served without it. Called by `graphgen.requests.core`; the end-of-sequence ids of the same file are read
by checkpoint_config.py.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from graphgen.ipc.ggp.messages import SamplingDefaults
from graphgen.models.gguf.header import is_gguf, read_header

logger = logging.getLogger("graphgen")

FILE = "generation_config.json"

_IN_GGUF = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
"""Metadata of a GGUF file -> keys of generation_config.json."""

_NOT_DONE: Mapping[str, Any] = {
    "num_beams": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": None,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}
"""Rules of transformers that change the tokens and that graphgen does not have, each with the value that is off."""


def read_sampling_defaults(location: Path) -> SamplingDefaults:
    """The sampling values that the file states, as vLLM reads them; those it leaves out are neutral.

    `"do_sample": false` is temperature 0, whatever temperature stands beside it, as transformers takes it; a file
    without do_sample is not taken for greedy. Lengths (max_new_tokens) are left to the request.
    """
    origin = location if is_gguf(location) else location / FILE
    raw = _read_gguf(origin) if is_gguf(location) else _read(origin)
    stated: dict[str, Any] = {}  # of several types, each checked by its field's
    for field in msgspec.structs.fields(SamplingDefaults):
        value = raw.get(field.name)
        if field.name == "top_k" and value == -1:
            value = 0
        if value is None:
            continue
        try:
            stated[field.name] = msgspec.convert(value, field.type)
        except msgspec.ValidationError as error:
            _warn(origin, field.name, value, f"({error}) is left out: correct it or give {field.name} with requests")
    match raw.get("do_sample"):
        case False:
            stated["temperature"] = 0.0
        case True | None:
            pass
        case value:
            _warn(origin, "do_sample", value, "is neither true nor false and is left out: correct it")
    for name, off in _NOT_DONE.items():
        value = raw.get(name)
        if value is not None and value != off and value != []:
            _warn(origin, name, value, "is a rule that graphgen does not have: tokens are drawn without it")
    return SamplingDefaults(**stated)


def _read_gguf(file: Path) -> dict[str, Any]:
    """Numbers of 32 bits as the decimal numbers that they were rounded from."""
    metadata = read_header(file).metadata
    stated = {name: metadata[key] for key, name in _IN_GGUF.items() if key in metadata}
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in stated.items()}


def _read(path: Path) -> dict[str, Any]:
    """Python's json, which takes NaN and Infinity, as transformers writes them. A missing file says nothing."""
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s is not read (%s): repair it or remove it", path, error)
        return {}
    if not isinstance(raw, dict):
        logger.warning("%s is no JSON object: repair it or remove it", path)
        return {}
    return raw


def _warn(origin: Path, key: str, value: object, what: str) -> None:
    logger.warning("%s: %s %r %s", origin, key, value, what)
