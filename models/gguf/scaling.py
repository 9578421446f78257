"""How a GGUF file's metadata scales its rotation, in the words of config.json's rope_scaling; and which entries of the
metadata change nothing.

Reads the tensors that hold factors of a rotation, and no others. Called by gguf/config.py.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.models.gguf.architectures import Architecture
from graphgen.models.gguf.header import GGUFHeader, GGUFTensor

ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"

NO_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.finetuned": (True, False),
    "tensor_data_layout": ("reference", "Meta AI original pth"),
    "use_parallel_residual": (False,),
}
"""Metadata key -> the values under which it changes nothing."""
_SCALING = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
_SCALING_BY_TYPE = {
    "none": (*_SCALING, "rope.scale_linear"),
    "linear": (*(key for key in _SCALING if key != "rope.scaling.attn_factor"), "rope.scale_linear"),
    "yarn": tuple(_SCALING),
}
"""Value of rope.scaling.type -> the keys beside it that are read, or that change nothing with it."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every model of Meta's with such a rotation. Files hold the factors that follow from these numbers."""
_CLOSE = 1e-4
"""Between a stored factor and the computed one, of the factor."""


def plain(value: Any) -> Any:
    """A number of 32 bits is written as the decimal number that it was rounded from."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def check_no_effect(key: str, value: Any, neutral: tuple[Any, ...] | None, where: str) -> None:
    if neutral is None or value not in neutral:
        raise UnsupportedModelError(
            f"{where} has {key} = {value!r}, which graphgen does not compute for GGUF files: use the checkpoint in"
            " safetensors"
        )


def rope_scaling(
    own: Mapping[str, Any],
    prefix: str,
    header: GGUFHeader,
    config: Mapping[str, Any],
    architecture: Architecture,
    where: str,
) -> dict[str, Any] | None:
    """own: the metadata without `prefix`, the architecture's name. config: what has come of it so far. Raises
    UnsupportedModelError for a way that is not computed."""
    if LONG_FACTORS in header.tensors or SHORT_FACTORS in header.tensors:
        return _long_scaling(own, header, config, where)
    kind = own.get("rope.scaling.type", "linear")
    if kind not in _SCALING_BY_TYPE:
        raise UnsupportedModelError(
            f"{where} has {prefix}rope.scaling.type = {kind!r}, graphgen computes {', '.join(_SCALING_BY_TYPE)} for"
            " GGUF files: use the checkpoint in safetensors"
        )
    scaling: dict[str, Any] = {"rope_type": kind}
    for key, value in own.items():
        if key in architecture.scaling_keys:
            scaling[architecture.scaling_keys[key]] = plain(value)
        elif key in _SCALING_BY_TYPE[kind]:
            scaling[_SCALING.get(key, key)] = plain(value)
        elif key.startswith("rope.scal") and key != "rope.scaling.type":
            check_no_effect(prefix + key, value, NO_EFFECT.get(key), where)
    if "mscale_all_dim" in scaling:
        scaling["mscale"] = scaling["mscale_all_dim"]  # no model has others; the two cancel out
    if kind == "linear":
        scaling = {"rope_type": kind, "factor": scaling.get("factor", scaling.get("rope.scale_linear", 1.0))}
    scales = kind != "none" and scaling.get("factor") not in (0.0, 1.0)
    if (factors := header.tensors.get(ROPE_FACTORS)) is not None:
        if scales:
            raise UnsupportedModelError(
                f"{where} scales its rotation by {ROPE_FACTORS} and by {prefix}rope.scaling ({kind}): use the"
                " checkpoint in safetensors"
            )
        return _llama3_scaling(factors, config, where)
    return scaling if scales else None


def _llama3_scaling(factors: GGUFTensor, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """From the divisors of the frequencies, which are stored instead of the numbers that they follow from."""
    stored = _factors(factors)
    factor = round(float(stored.max()), 4)
    lengths = 2 * math.pi * config.get("rope_theta", 10_000.0) ** (np.arange(len(stored)) / len(stored))
    original, low, high = (
        _LLAMA3[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    share = np.clip((original / lengths - low) / (high - low), 0.0, 1.0)  # 1: short waves stay as they are
    computed = 1.0 / (share + (1.0 - share) / factor)
    if factors.type != "F32" or not np.allclose(stored, computed, rtol=_CLOSE, atol=0):
        raise UnsupportedModelError(
            f"{where} scales its rotation by {ROPE_FACTORS}, whose factors are not those of Llama 3 for a factor of"
            f" {factor:g}: use the checkpoint in safetensors"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _long_scaling(own: Mapping[str, Any], header: GGUFHeader, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Of Phi-3's rotation, whose divisors are tensors."""
    long, short = header.tensors.get(LONG_FACTORS), header.tensors.get(SHORT_FACTORS)
    original = config.get("original_max_position_embeddings")
    if long is None or short is None or long.type != "F32" or short.type != "F32" or not isinstance(original, int):
        raise UnsupportedModelError(
            f"{where} scales its rotation by {LONG_FACTORS} or {SHORT_FACTORS}, which needs both in float32 and"
            " rope.scaling.original_context_length: use the checkpoint in safetensors"
        )
    scaling: dict[str, Any] = {"rope_type": "longrope"}
    scaling["short_factor"], scaling["long_factor"] = (
        [plain(float(value)) for value in _factors(tensor)] for tensor in (short, long)
    )
    stretch = config["max_position_embeddings"] / original
    computed = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    stored = own.get("rope.scaling.attn_factor", computed)
    return scaling if math.isclose(stored, computed, rel_tol=_CLOSE) else {**scaling, "attention_factor": plain(stored)}


def _factors(tensor: GGUFTensor) -> npt.NDArray[np.float32]:
    return np.fromfile(tensor.file, "<f4", tensor.shape[0], offset=tensor.begin)
