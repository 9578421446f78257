"""What a Hugging Face config says about rotary positions, as a RopeSpec.

Owns the keys of `rope_scaling` and `rope_parameters`, and which of them counts where a config says a thing twice. The
order is that of transformers (modeling_rope_utils.py, RotaryEmbeddingConfigMixin), so that a config means here what it
means there. A key that no arithmetic reads is refused: it was meant to change something. Called by families.py.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any, cast, get_args

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.models.spec import RopeKind, RopeSpec

logger = logging.getLogger("graphgen.models")

DEFAULT_THETA = 10_000.0
_READ_BY_ALL = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_READ: Mapping[RopeKind, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "beta_fast",
            "beta_slow",
            "truncate",
        }
    ),
}
"""Kind -> the keys that its formula reads, beside those of every kind."""

_REQUIRED: Mapping[RopeKind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),  # without a factor it is the ratio of the two lengths
}
_SCALED_FROM_A_LENGTH: tuple[RopeKind, ...] = ("llama3", "yarn")


def read_rope(config: Any, where: str) -> RopeSpec:
    """The rotation of a transformers config object (untyped there, hence Any). `where` names the model in messages.

    Raises UnsupportedModelError for a kind or a key that graphgen does not compute.
    """
    parameters = _parameters(config, where)
    kind = _kind(parameters, where)
    _check_keys(parameters, kind, where)
    max_len = config.max_position_embeddings
    original_max_len = _original_max_len(config, parameters) if kind in _SCALED_FROM_A_LENGTH else max_len
    factor = parameters.get("factor", max_len / original_max_len if kind == "yarn" else 1.0)
    return RopeSpec(
        kind=kind,
        theta=float(parameters["rope_theta"]),
        factor=float(factor),
        original_max_len=int(original_max_len),
        attention_factor=_yarn_attention_factor(parameters, factor) if kind == "yarn" else 1.0,
        low_freq_factor=float(parameters.get("low_freq_factor", 1.0)),
        high_freq_factor=float(parameters.get("high_freq_factor", 4.0)),
        beta_fast=float(parameters.get("beta_fast") or 32.0),
        beta_slow=float(parameters.get("beta_slow") or 1.0),
        truncate=bool(parameters.get("truncate", True)),
    )


def _parameters(config: Any, where: str) -> dict[str, Any]:
    """One dictionary: `rope_scaling`, which replaces `rope_parameters`, filled in from the config's own keys.

    transformers 5 saves `rope_parameters`; 4 saved `rope_scaling` and put `rope_theta` beside it. People add the second
    to configs with the first, as model cards of before tell them.
    """
    newer, older = (
        {name: value for name, value in (getattr(config, key, None) or {}).items() if value is not None}
        for key in ("rope_parameters", "rope_scaling")
    )
    parameters = older or newer
    beside = {
        name: value
        for name in ("rope_theta", "partial_rotary_factor")
        if (value := getattr(config, name, None)) is not None
    }
    parameters = {"rope_theta": DEFAULT_THETA, **beside, **parameters}
    for name, source in (("rope_parameters", newer), ("config.json", beside)):
        if (theta := source.get("rope_theta", parameters["rope_theta"])) != parameters["rope_theta"]:
            logger.warning(
                "%s: the rope_theta of %s, %s, does not count: %s does, as in transformers. Put the value that is"
                " meant into %s",
                *(where, name, theta, parameters["rope_theta"], "rope_scaling" if older else "rope_parameters"),
            )
    return parameters


def _kind(parameters: Mapping[str, Any], where: str) -> RopeKind:
    kind, alias = parameters.get("rope_type"), parameters.get("type")
    if kind is not None and alias is not None and kind != alias:
        raise UnsupportedModelError(f"{where} has rope_type {kind!r} and type {alias!r}: remove the one not meant")
    name = kind or alias or "default"
    if name not in get_args(RopeKind):
        raise UnsupportedModelError(f"{where} has rope type {name!r}, supported are {', '.join(get_args(RopeKind))}")
    return cast(RopeKind, name)


def _check_keys(parameters: Mapping[str, Any], kind: RopeKind, where: str) -> None:
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModelError(f"{where} has rope parameters per layer type, supported is one set for all")
    if (rotated := parameters.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModelError(f"{where} has partial_rotary_factor {rotated}, supported is 1.0")
    if unread := sorted(parameters.keys() - _READ_BY_ALL - _READ[kind]):
        raise UnsupportedModelError(
            f"{where} has the rope key {unread[0]!r} = {parameters[unread[0]]!r}, which rope type {kind!r} does not"
            f" read (it reads {', '.join(sorted(_READ_BY_ALL | _READ[kind]))}): correct the rope_type or remove the key"
        )
    if missing := [name for name in _REQUIRED[kind] if name not in parameters]:
        raise UnsupportedModelError(f"{where} has rope type {kind!r} without {missing[0]}: add it to config.json")
    for name, value in parameters.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name not in ("rope_type", "type", "truncate") and not (is_number and math.isfinite(value) and value >= 0):
            raise UnsupportedModelError(f"{where} has {name} {value!r}: use a finite number of at least 0")
    for name in ("rope_theta", "factor", "original_max_position_embeddings"):
        if parameters.get(name) == 0:
            raise UnsupportedModelError(f"{where} has {name} 0: use a number above 0")


def _original_max_len(config: Any, parameters: Mapping[str, Any]) -> int:
    """The context length before scaling; one that stands beside the dictionary wins over one in it."""
    beside: int | None = getattr(config, "original_max_position_embeddings", None)
    length: int = parameters.get("original_max_position_embeddings", config.max_position_embeddings)
    return length if beside is None else beside


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    """0.1 ln(s) + 1 (YaRN, arXiv 2309.00071, section 3.4), or the ratio of two such with the DeepSeek
    keys."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return mscale(parameters["mscale"]) / mscale(parameters["mscale_all_dim"])
    return mscale(1.0)
