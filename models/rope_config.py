"""What a Hugging Face config says about rotary positions, as a RopeSpec.

Owns the keys of `rope_scaling` and `rope_parameters`, and which of them counts where a config says a thing twice. The
order is that of transformers (modeling_rope_utils.py, RotaryEmbeddingConfigMixin), so that a config means here what it
means there. A key that no arithmetic reads is refused: it was meant to change something. Called by families/reader.py.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any, cast

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.models.families.family import Rotary
from graphgen.models.families.words import Config, filled
from graphgen.models.spec import RopeKind, RopeSpec, Temperature

logger = logging.getLogger("graphgen.models")

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
    "longrope": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"}
    ),
}
"""Kind -> the keys that its formula reads, beside those of every kind."""

_REQUIRED: Mapping[RopeKind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),  # without a factor it is the ratio of the two lengths
    "longrope": ("short_factor", "long_factor"),
}
_READ_BY_ALPHA = frozenset({"alpha", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"})
"""Where `alpha` stretches the base: of these it alone counts, as in transformers. The files have all."""
_SCALED_FROM_A_LENGTH: tuple[RopeKind, ...] = ("llama3", "yarn", "longrope")
_KINDS = tuple(_READ)
_NOT_NUMBERS = ("rope_type", "type", "truncate", "short_factor", "long_factor")


def read_rope(config: Config, rotary: Rotary, head_dim: int, where: str) -> RopeSpec:
    """The rotation of a config, as the family's `rotary` says where it stands. `where` names the model in messages.

    Raises UnsupportedModelError for a kind or a key that graphgen does not compute.
    """
    parameters = _parameters(config, rotary, where)
    kind = _kind(parameters, rotary, where)
    if rotary.mscales and kind == "longrope":
        parameters["attention_factor"] = _mscale(parameters, where)
    if kind == "dynamic" and rotary.alpha and (alpha := parameters.get("alpha")):
        kind, parameters = "default", _stretched(parameters, alpha ** (head_dim / (head_dim - 2)))
    beta = _beta(parameters, rotary)
    _check_keys(parameters, kind, where)
    max_len = config.need("max_position_embeddings")
    original_max_len = _original_max_len(config, parameters, max_len)
    original_max_len = original_max_len if kind in _SCALED_FROM_A_LENGTH else max_len
    factor = parameters.get("factor", max_len / original_max_len if kind in ("yarn", "longrope") else 1.0)
    rotary_dim = _rotary_dim(config, parameters, rotary, head_dim, where)
    return RopeSpec(
        kind=kind,
        theta=float(parameters["rope_theta"]),
        factor=float(factor),
        original_max_len=int(original_max_len),
        attention_factor=_attention_factor(parameters, kind, factor, original_max_len),
        low_freq_factor=float(parameters.get("low_freq_factor", 1.0)),
        high_freq_factor=float(parameters.get("high_freq_factor", 4.0)),
        beta_fast=float(parameters.get("beta_fast") or 32.0),
        beta_slow=float(parameters.get("beta_slow") or 1.0),
        truncate=bool(parameters.get("truncate", True)),
        short_factors=_divisors(parameters, "short_factor", rotary_dim or head_dim, where),
        long_factors=_divisors(parameters, "long_factor", rotary_dim or head_dim, where),
        rotary_dim=rotary_dim,
        interleaved=filled(rotary.interleaved, config),
        temperature=None if beta is None else Temperature(float(beta), int(original_max_len)),
        score_factor=_score_factor(parameters, factor) if rotary.scales_scores else 1.0,
    )


def _stretched(parameters: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Of HunYuan: its base times `factor`, and no word more of how it is scaled."""
    others = {name: value for name, value in parameters.items() if name not in _READ_BY_ALPHA}
    return {**others, "rope_theta": others["rope_theta"] * factor}


def _beta(parameters: dict[str, Any], rotary: Rotary) -> Any:
    """Takes what a Temperature follows from out of the dictionary. It is unchecked, hence Any."""
    if rotary.beta is None:
        return None
    parameters.pop("max_position_embeddings", None)  # the config's own, said again
    return parameters.pop(rotary.beta, None)


def _mscale(parameters: dict[str, Any], where: str) -> Any:
    """Takes both keys out of the dictionary. They are unchecked, hence Any."""
    short, long = parameters.pop("short_mscale", None), parameters.pop("long_mscale", None)
    if short is None or short != long:
        raise UnsupportedModelError(
            f"{where} has short_mscale {short!r} and long_mscale {long!r}: supported are equal numbers"
        )
    return short


def _rotary_dim(config: Config, parameters: Mapping[str, Any], rotary: Rotary, head_dim: int, where: str) -> int | None:
    """How many dimensions of a head turn; None for all."""
    share = parameters["partial_rotary_factor"]
    if share != 1.0 and not rotary.partial:
        raise UnsupportedModelError(f"{where} has partial_rotary_factor {share}, supported is 1.0")
    dim = int(head_dim * share) if rotary.dim is None else config.need(rotary.dim)
    if not 0 < dim <= head_dim or dim % 2:
        raise UnsupportedModelError(f"{where} rotates {dim} of {head_dim} dimensions of a head: an even number turns")
    return None if dim == head_dim else dim


def _divisors(parameters: Mapping[str, Any], name: str, rotary_dim: int, where: str) -> tuple[float, ...]:
    """Of longrope: one for each pair that turns."""
    divisors = tuple(float(value) for value in parameters.get(name, ()))
    if divisors and (len(divisors) != rotary_dim // 2 or min(divisors) <= 0):
        raise UnsupportedModelError(
            f"{where} has {len(divisors)} values in {name}, its rotation needs {rotary_dim // 2} above 0"
        )
    return divisors


def _parameters(config: Config, rotary: Rotary, where: str) -> dict[str, Any]:
    """One dictionary: `rope_scaling`, which replaces `rope_parameters`, filled in from the config's own keys.

    transformers 5 saves `rope_parameters`; 4 saved `rope_scaling` and put `rope_theta` beside it. People add the second
    to configs with the first, as model cards of before tell them.
    """
    newer = _without_nulls(_of_layer_type(config.get("rope_parameters") or {}, rotary, where))
    older = _without_nulls(_of_layer_type(config.get("rope_scaling") or {}, rotary, where)) if rotary.scaled else {}
    parameters = older or newer
    beside = {
        name: value
        for name, key in (("rope_theta", rotary.theta), ("partial_rotary_factor", rotary.share))
        if (value := config.get(key)) is not None
    }
    share = filled(rotary.default_share, config)
    defaults = {"rope_theta": rotary.default_theta, "partial_rotary_factor": share}
    parameters = {**defaults, **beside, **parameters}
    for name, source in (("rope_parameters", newer), ("config.json", beside)):
        if (theta := source.get("rope_theta", parameters["rope_theta"])) != parameters["rope_theta"]:
            logger.warning(
                "%s: the rope_theta of %s, %s, does not count: %s does, as in transformers. Put the value that is"
                " meant into %s",
                *(where, name, theta, parameters["rope_theta"], "rope_scaling" if older else "rope_parameters"),
            )
    return parameters


def _of_layer_type(parameters: Mapping[str, Any], rotary: Rotary, where: str) -> Mapping[str, Any]:
    """The entry of `rotary`'s type of layer, where there is one for each type."""
    if not any(isinstance(value, dict) for value in parameters.values()):
        return parameters
    if rotary.layer_type is None:
        raise UnsupportedModelError(f"{where} has rope parameters per layer type, supported is one set for all")
    of_type: Mapping[str, Any] = parameters.get(rotary.layer_type) or {}
    return of_type


def _without_nulls(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value is not None}


def _kind(parameters: Mapping[str, Any], rotary: Rotary, where: str) -> RopeKind:
    kind, alias = parameters.get("rope_type"), parameters.get("type")
    if kind is not None and alias is not None and kind != alias:
        raise UnsupportedModelError(f"{where} has rope_type {kind!r} and type {alias!r}: remove the one not meant")
    name = rotary.kinds.get(kind or alias or "default", kind or alias or "default")
    if name not in _KINDS:
        raise UnsupportedModelError(f"{where} has rope type {name!r}, supported are {', '.join(_KINDS)}")
    return cast(RopeKind, name)


def _check_keys(parameters: Mapping[str, Any], kind: RopeKind, where: str) -> None:
    if unread := sorted(parameters.keys() - _READ_BY_ALL - _READ[kind]):
        raise UnsupportedModelError(
            f"{where} has the rope key {unread[0]!r} = {parameters[unread[0]]!r}, which rope type {kind!r} does not"
            f" read (it reads {', '.join(sorted(_READ_BY_ALL | _READ[kind]))}): correct the rope_type or remove the key"
        )
    if missing := [name for name in _REQUIRED[kind] if name not in parameters]:
        raise UnsupportedModelError(f"{where} has rope type {kind!r} without {missing[0]}: add it to config.json")
    for name, value in parameters.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name not in _NOT_NUMBERS and not (is_number and math.isfinite(value) and value >= 0):
            raise UnsupportedModelError(f"{where} has {name} {value!r}: use a finite number of at least 0")
    for name in ("rope_theta", "factor", "original_max_position_embeddings"):
        if parameters.get(name) == 0:
            raise UnsupportedModelError(f"{where} has {name} 0: use a number above 0")


def _original_max_len(config: Config, parameters: Mapping[str, Any], max_len: int) -> int:
    """The context length before scaling; one that stands beside the dictionary wins over one in it."""
    beside: int | None = config.get("original_max_position_embeddings")
    length: int = parameters.get("original_max_position_embeddings", max_len)
    return length if beside is None else beside


def _attention_factor(parameters: Mapping[str, Any], kind: RopeKind, factor: float, original_max_len: int) -> float:
    """yarn: 0.1 ln(s) + 1 (YaRN, arXiv 2309.00071, section 3.4), or the ratio of two such with the DeepSeek keys.
    longrope: sqrt(1 + ln(s) / ln(original length)) (arXiv 2402.13753, section 4.3)."""

    if kind not in ("yarn", "longrope"):
        return 1.0
    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original_max_len)) if factor > 1 else 1.0
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return _yarn_scale(factor, parameters["mscale"]) / _yarn_scale(factor, parameters["mscale_all_dim"])
    return _yarn_scale(factor)


def _score_factor(parameters: Mapping[str, Any], factor: float) -> float:
    """Of DeepSeek's models: what would scale queries and keys scales the part of them that does not turn, too."""
    return _yarn_scale(factor, parameters.get("mscale_all_dim") or 0.0) ** 2


def _yarn_scale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
