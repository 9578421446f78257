"""The model families graphgen runs, as rows of data, and the way from a Hugging Face config to a ModelSpec.

Owns the table of families and every check of «can graphgen run this model». Never touches weights. Called by
the engine when it resolves its configuration, and by the loader for a family's tensor names.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import msgspec
from msgspec import Struct

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.models.checkpoint_config import read_config, read_generation_eos
from graphgen.models.spec import DTYPE_BYTES, ModelSpec, RopeKind, RopeSpec

SUPPORTED_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Hugging Face's name of an activation -> ours."""


class TensorNames(Struct, frozen=True):
    """Where a family's checkpoints keep their tensors; `{layer}` is the layer's number."""

    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    final_norm: str = "model.norm.weight"
    layer: str = "model.layers.{layer}."
    # The rest is relative to `layer` and lacks its ".weight" or ".bias".
    input_norm: str = "input_layernorm"
    post_attention_norm: str = "post_attention_layernorm"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: tuple[str, ...] = ("self_attn.o_proj",)
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: tuple[str, ...] = ("mlp.down_proj",)


class Family(Struct, frozen=True):
    """What one architecture is, where families differ. A string names the config attribute that decides."""

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    windows: Literal["none", "every_layer", "by_layer_type"] = "none"
    names: TensorNames = TensorNames()


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "MistralForCausalLM": Family(windows="every_layer"),
    "Qwen2ForCausalLM": Family(qkv_bias=True, windows="by_layer_type"),
    "Qwen3ForCausalLM": Family(
        qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, windows="by_layer_type"
    ),
}


def load_spec(model: str | Path, revision: str | None = None) -> ModelSpec:
    """The spec of a local folder or a hub id; of a hub id only the two small config files are downloaded.

    End-of-sequence ids come from generation_config.json where it has them: chat models often end on several.
    Raises CheckpointError when there is no readable config.json, UnsupportedModelError when graphgen cannot
    run it.
    """
    location = str(model)
    config = read_config(location, revision)
    _family_of(config.architectures, location)
    try:
        spec = spec_from_hf(config, generation_eos=read_generation_eos(location, revision))
        return msgspec.convert(msgspec.to_builtins(spec), ModelSpec)  # checks the types of what the file says
    except (AttributeError, TypeError, msgspec.ValidationError) as error:
        raise UnsupportedModelError(f"the config.json of {location!r} is not understood: {error}") from error


def spec_from_hf(config: Any, generation_eos: int | list[int] | None = None) -> ModelSpec:
    """The spec of a transformers config object (untyped there, hence Any).

    `generation_eos`: the ids of generation_config.json, which win over the config's own.
    """
    where = config.model_type
    architecture, family = _family_of(config.architectures, where)
    _refuse_quantized(getattr(config, "quantization_config", None), where)
    num_heads, num_kv_heads = (
        config.num_attention_heads,
        config.num_key_value_heads or config.num_attention_heads,
    )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    if num_heads % num_kv_heads or head_dim % 2:
        raise UnsupportedModelError(
            f"{architecture} has {num_heads} heads, {num_kv_heads} KV heads and head_dim {head_dim}: graphgen"
            " needs a whole number of heads per KV head and an even head_dim"
        )
    return ModelSpec(
        architecture=architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=config.intermediate_size,
        norm_eps=float(config.rms_norm_eps),
        activation=_activation(config.hidden_act, architecture),
        qkv_bias=_flag(family.qkv_bias, config),
        o_bias=_flag(family.o_bias, config),
        mlp_bias=_flag(family.mlp_bias, config),
        qk_norm=family.qk_norm,
        tie_embeddings=bool(config.tie_word_embeddings),
        rope=_rope(config, architecture),
        windows=_windows(config, family, architecture),
        max_position_embeddings=config.max_position_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_ids=_token_ids(config.eos_token_id if generation_eos is None else generation_eos),
        dtype=_dtype(config, architecture),
        initializer_std=float(config.initializer_range),
    )


def _family_of(architectures: list[str] | None, where: str) -> tuple[str, Family]:
    for architecture in architectures or []:
        if architecture in FAMILIES:
            return architecture, FAMILIES[architecture]
    named = ", ".join(architectures or []) or "none"
    raise UnsupportedModelError(
        f"architecture of {where!r} is {named}, supported are {', '.join(FAMILIES)}: choose a model of one of them"
    )


def _refuse_quantized(quantization: Any, where: str) -> None:
    """`quantization`: the config's quantization_config, a dict or one of many transformers classes."""
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise UnsupportedModelError(
            f"the weights of {where!r} are quantised ({method}), supported are {', '.join(DTYPE_BYTES)}:"
            " use the unquantised checkpoint"
        )


def _flag(rule: bool | str, config: Any) -> bool:
    return bool(getattr(config, rule, False)) if isinstance(rule, str) else rule


def _activation(name: str, architecture: str) -> str:
    if name not in SUPPORTED_ACTIVATIONS:
        raise UnsupportedModelError(
            f"{architecture} has hidden_act {name!r}, supported are {', '.join(SUPPORTED_ACTIVATIONS)}"
        )
    return SUPPORTED_ACTIVATIONS[name]


def _token_ids(ids: int | list[int] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(dict.fromkeys(ids))


def _dtype(config: Any, architecture: str) -> str:
    # transformers 4 calls it torch_dtype; a checkpoint that says nothing is float32, torch's own default.
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or "float32"
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise UnsupportedModelError(f"{architecture} has dtype {name}, supported are {', '.join(DTYPE_BYTES)}")
    return name


def _windows(config: Any, family: Family, architecture: str) -> tuple[int | None, ...]:
    num_layers: int = config.num_hidden_layers
    window: int | None = getattr(config, "sliding_window", None)
    if family.windows == "none" or window is None:
        return (None,) * num_layers
    if family.windows == "every_layer":
        return (window,) * num_layers
    by_type: dict[str, int | None] = {"full_attention": None, "sliding_attention": window}
    unknown = set(config.layer_types) - set(by_type)
    if unknown:
        raise UnsupportedModelError(
            f"{architecture} has layer types {', '.join(sorted(unknown))}, supported are {', '.join(by_type)}"
        )
    return tuple(by_type[layer_type] for layer_type in config.layer_types)


def _rope_parameters(config: Any) -> dict[str, Any]:
    """transformers 5 keeps all in `rope_parameters`; 4 splits it into `rope_theta` and `rope_scaling`."""
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        parameters = {
            "rope_theta": getattr(config, "rope_theta", None),
            **(getattr(config, "rope_scaling", None) or {}),
        }
    return {name: value for name, value in parameters.items() if value is not None}


def _rope(config: Any, architecture: str) -> RopeSpec:
    parameters = _rope_parameters(config)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in get_args(RopeKind):
        raise UnsupportedModelError(
            f"{architecture} has rope type {kind!r}, supported are {', '.join(get_args(RopeKind))}"
        )
    rotated = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    if rotated != 1.0:
        raise UnsupportedModelError(f"{architecture} has partial_rotary_factor {rotated}, supported is 1.0")
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModelError(f"{architecture} has rope parameters per layer type, supported is one set for all")
    max_len = config.max_position_embeddings
    original_max_len = parameters.get("original_max_position_embeddings", max_len)
    if kind == "dynamic":  # the one kind whose reference measures against the config's maximum
        original_max_len = max_len
    factor = float(parameters.get("factor", max_len / original_max_len if kind == "yarn" else 1.0))
    return RopeSpec(
        kind=cast(RopeKind, kind),
        theta=float(parameters.get("rope_theta", 10_000.0)),
        factor=factor,
        original_max_len=int(original_max_len),
        attention_factor=_yarn_attention_factor(parameters, factor) if kind == "yarn" else 1.0,
        low_freq_factor=float(parameters.get("low_freq_factor", 1.0)),
        high_freq_factor=float(parameters.get("high_freq_factor", 4.0)),
        beta_fast=float(parameters.get("beta_fast") or 32.0),
        beta_slow=float(parameters.get("beta_slow") or 1.0),
        truncate=bool(parameters.get("truncate", True)),
    )


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
