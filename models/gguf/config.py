"""What the metadata of a GGUF file says of its model, in the keys of Hugging Face's config.json.

Owns that translation: the families read what comes of it as they read any config.json. An entry that changes
arithmetic and that nothing here reads is refused by name. Never reads a tensor but the factors of Llama 3's rotation.
Called by gguf/checkpoint.py.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.models.gguf.architectures import ARCHITECTURES, KEYS, Architecture
from graphgen.models.gguf.header import GGUFHeader, GGUFTensor

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

_CONTROL = 3
"""Type of a token that is no text."""
_ENDS_OF_TURNS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
)
"""Control tokens that end an answer. Many files name only one of theirs, and some the wrong one."""

_NO_EFFECT: Mapping[str, tuple[Any, ...]] = {
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
_READ_APART = ("vocab_size", "attention.value_length", "rope.dimension_count", "attention.sliding_window_pattern")
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

_QUANTISED = "bfloat16"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def architecture_of(header: GGUFHeader, where: str) -> Architecture:
    """Raises UnsupportedModelError for one that graphgen does not read."""
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{where} is of the architecture {name!r}, graphgen reads GGUF files of {', '.join(ARCHITECTURES)}: use the"
            " checkpoint in safetensors"
        )
    return ARCHITECTURES[name]


def config_of(header: GGUFHeader, where: str) -> dict[str, Any]:
    """As config.json would say it. Raises UnsupportedModelError for a trait that is not read."""
    architecture, prefix = architecture_of(header, where), f"{header.metadata['general.architecture']}."
    named = {**KEYS, **architecture.keys}
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "architectures": [architecture.architecture],
        "tie_word_embeddings": HEAD not in header.tensors,
        "attention_bias": not architecture.always_biased and "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "dtype": _dtype(header.tensors),
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_token_ids(header.metadata),
        **architecture.implied,
    }
    if EMBEDDING in header.tensors:
        config["vocab_size"] = header.tensors[EMBEDDING].shape[0]
    own = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    for key, value in own.items():
        if key in named:
            config[named[key]] = _plain(value)
        elif not key.startswith("rope.scal") and key not in _READ_APART:
            _check_no_effect(prefix + key, value, _NO_EFFECT.get(key), where)
    _check_heads(config, own, prefix, where)
    if (scaling := _rope_scaling(own, prefix, header, config, where)) is not None:
        config["rope_scaling"] = scaling
    _add_scale_and_layers(config, own)
    return config


def _plain(value: Any) -> Any:
    """A number of 32 bits is written as the decimal number that it was rounded from."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _check_no_effect(key: str, value: Any, neutral: tuple[Any, ...] | None, where: str) -> None:
    if neutral is None or value not in neutral:
        raise UnsupportedModelError(
            f"{where} has {key} = {value!r}, which graphgen does not compute for GGUF files: use the checkpoint in"
            " safetensors"
        )


def _check_heads(config: Mapping[str, Any], own: Mapping[str, Any], prefix: str, where: str) -> None:
    """Keys and values are equally wide, and whole heads turn."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise UnsupportedModelError(
            f"{where} has {prefix}attention.head_count = {heads!r} and {prefix}embedding_length = {hidden!r}: graphgen"
            " reads files of layers that are alike"
        )
    width = config.get("head_dim", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        _check_no_effect(prefix + key, own.get(key, width), (width,), where)


def _rope_scaling(
    own: Mapping[str, Any], prefix: str, header: GGUFHeader, config: Mapping[str, Any], where: str
) -> dict[str, Any] | None:
    kind = own.get("rope.scaling.type", "linear")
    if kind not in _SCALING_BY_TYPE:
        raise UnsupportedModelError(
            f"{where} has {prefix}rope.scaling.type = {kind!r}, graphgen computes {', '.join(_SCALING_BY_TYPE)} for"
            " GGUF files: use the checkpoint in safetensors"
        )
    scaling: dict[str, Any] = {"rope_type": kind}
    for key, value in own.items():
        if key in _SCALING_BY_TYPE[kind]:
            scaling[_SCALING.get(key, key)] = _plain(value)
        elif key.startswith("rope.scal") and key != "rope.scaling.type":
            _check_no_effect(prefix + key, value, _NO_EFFECT.get(key), where)
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
    stored = np.fromfile(factors.file, "<f4", factors.shape[0], offset=factors.begin)
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


def _add_scale_and_layers(config: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Of Gemma 2 and 3, what llama.cpp knows by itself: scores of the 27B models are divided by the root of another
    width than the head's, which are the only ones of 46 and 62 layers."""
    if config["model_type"] in ("gemma2", "gemma3_text"):
        of_hidden = config["hidden_size"] // config["num_attention_heads"]
        large = config.get("num_hidden_layers") == (46 if config["model_type"] == "gemma2" else 62)
        config["query_pre_attn_scalar"] = of_hidden if large else config.get("head_dim", of_hidden)
    pattern = own.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        config["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in pattern]
    elif pattern is not None:
        config["sliding_window_pattern"] = pattern


def _eos_token_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Those that the file names, and its control tokens that end a turn."""
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens, types = metadata.get("tokenizer.ggml.tokens", ()), metadata.get("tokenizer.ggml.token_type", ())
    control = {
        token: number for number, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind == _CONTROL
    }
    found = [control[token] for token in _ENDS_OF_TURNS if token in control]
    return list(dict.fromkeys(number for number in (*named, *found) if number is not None))


def _dtype(tensors: Mapping[str, GGUFTensor]) -> str:
    """The one that most weights are stored in; a quantised file's weights are computed with in bfloat16."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.type] = sizes.get(tensor.type, 0) + math.prod(tensor.shape)
    most = max(sizes, key=lambda kind: sizes[kind], default="BF16")
    return _DTYPES.get(most, _QUANTISED)
