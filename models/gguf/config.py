"""What the metadata of a GGUF file says of its model, in the keys of Hugging Face's config.json.

Owns that translation: the families read what comes of it as they read any config.json. An entry that changes
arithmetic and that nothing here reads is refused by name. How a rotation is scaled is in scaling.py. Called by
gguf/checkpoint.py.
"""

import math
from collections.abc import Mapping
from typing import Any

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.models.gguf.architectures import ARCHITECTURES, KEYS, Architecture
from graphgen.models.gguf.header import GGUFHeader, GGUFTensor
from graphgen.models.gguf.scaling import NO_EFFECT, check_no_effect, plain, rope_scaling

EMBEDDING, HEAD = "token_embd.weight", "output.weight"

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

_READ_APART = ("vocab_size", "attention.value_length", "rope.dimension_count", "attention.sliding_window_pattern")
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
    found = ARCHITECTURES[name]
    return next((row for key, row in found.instead.items() if header.metadata.get(f"{name}.{key}")), found)


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
            config[named[key]] = plain(value)
        elif not key.startswith("rope.scal") and key not in (*_READ_APART, *architecture.scaling_keys):
            check_no_effect(prefix + key, value, NO_EFFECT.get(key), where)
    config["sliding_window"] = config.get("sliding_window") or None  # 0 is none
    _check_heads(config, own, prefix, architecture, where)
    if (scaling := rope_scaling(own, prefix, header, config, architecture, where)) is not None:
        config["rope_scaling"] = scaling
    _add_scale_and_layers(config, own)
    return config


def _check_heads(
    config: dict[str, Any], own: Mapping[str, Any], prefix: str, architecture: Architecture, where: str
) -> None:
    """Keys and values are equally wide, and whole heads turn, where an architecture has no others."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise UnsupportedModelError(
            f"{where} has {prefix}attention.head_count = {heads!r} and {prefix}embedding_length = {hidden!r}: graphgen"
            " reads files of layers that are alike"
        )
    width = config.get("head_dim", hidden // heads)
    check_no_effect(prefix + "attention.value_length", own.get("attention.value_length", width), (width,), where)
    turning = own.get("rope.dimension_count", width)
    if architecture.partial and turning != width:
        config["partial_rotary_factor"] = turning / width
    else:
        check_no_effect(prefix + "rope.dimension_count", turning, (width,), where)


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
