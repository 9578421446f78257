"""How a checkpoint says that its keys and values are to be kept: the part of a quantization_config that is about them.

Never reads a tensor: models/kv_scales.py does. Called by families/reader.py.
"""

from collections.abc import Mapping
from typing import Any, Literal

from graphgen.ipc.errors import UnsupportedModelError

_NOTHING = (None, "", "none")


def kv_format_of(quantization: Mapping[str, Any] | None, where: str) -> Literal["fp8"] | None:
    """The KV format that the checkpoint asks for: fp8, or None where it asks for none.

    compressed-tensors and newer ModelOpt say it with kv_cache_scheme, AutoFP8 with "static" there, ModelOpt with
    kv_cache_quant_algo, also in hf_quant_config.json under "quantization". Raises UnsupportedModelError for a scheme
    that graphgen has no format for. where: for the message.
    """
    if not quantization:
        return None
    inner = quantization.get("quantization")
    places = (quantization, inner if isinstance(inner, Mapping) else {})
    for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
        for place in places:
            scheme = place.get(key)
            if isinstance(scheme, str) and scheme.lower() in _NOTHING:
                continue
            if scheme is not None:
                _check(key, scheme, where)
                return "fp8"
    return None


def quantises_only_kv(quantization: Mapping[str, Any]) -> bool:
    """Whether its weights are not quantised: a config of compressed-tensors without a group of layers, or one of
    ModelOpt without an algorithm."""
    inner = quantization.get("quantization")
    inner = inner if isinstance(inner, Mapping) else quantization
    match quantization.get("quant_method"):
        case "compressed-tensors":
            return quantization.get("config_groups") in (None, {})
        case "modelopt":
            return str(inner.get("quant_algo")).lower() in ("none", "no_quant")
        case _:
            return False


def _check(key: str, scheme: Any, where: str) -> None:
    """scheme: whatever the file holds."""
    if isinstance(scheme, Mapping):
        # Scales are static, of a layer or of a head.
        is_known = (
            (scheme.get("num_bits"), scheme.get("type")) == (8, "float")
            and scheme.get("strategy", "tensor") in ("tensor", "attn_head")
            and not scheme.get("dynamic", False)
            and scheme.get("symmetric", True)
        )
    else:
        is_known = isinstance(scheme, str) and scheme.lower() in ("fp8", "static")
    if not is_known:
        raise UnsupportedModelError(
            f"{where!r} asks for keys and values with {key} = {scheme!r}, graphgen has fp8 with static scales of layers"
            " or heads: use another checkpoint, or remove that key and choose --kv-cache-dtype"
        )
