"""The model families graphgen runs, as rows of data, and the way from a Hugging Face config to a ModelSpec.

Owns the table of families and every check of «can graphgen run this model». Never touches weights. Called by
the engine when it resolves its configuration, and by the loader for a family's tensor names.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import msgspec
from msgspec import Struct

from graphgen.ipc.errors import CheckpointError, UnsupportedModelError
from graphgen.ipc.messages import MAX_STOP_TOKEN_IDS
from graphgen.models.checkpoint_config import ARCHITECTURES, read_config, read_generation_eos
from graphgen.models.checkpoint_files import StoredTensor, are_equal, stored_tensors, weight_files
from graphgen.models.foreign_keys import refuse_foreign_keys
from graphgen.models.rope_config import read_rope
from graphgen.models.spec import DTYPE_BYTES, ModelSpec

logger = logging.getLogger("graphgen.models")

SUPPORTED_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Hugging Face's name of an activation -> ours."""

_STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Safetensors' name of a dtype -> ours."""


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

    End-of-sequence ids come from generation_config.json where it has them: chat models often end on several. Of a
    folder with weights, the weights say whether the head is the embedding, and their dtype where the config does not.
    Raises CheckpointError when there is no readable config.json, UnsupportedModelError when graphgen cannot
    run it.
    """
    location = str(model)
    try:
        config = read_config(location, revision)
        generation_eos = read_generation_eos(location, revision)
        spec = spec_from_hf(config, generation_eos, _stored_weights(Path(location)))
        return msgspec.convert(msgspec.to_builtins(spec), ModelSpec)  # checks the types of what the file says
    except (AttributeError, TypeError, KeyError, msgspec.ValidationError) as error:
        raise UnsupportedModelError(f"the config.json of {location!r} is not understood: {error}") from error


def spec_from_hf(
    config: Any,
    generation_eos: int | list[int] | None = None,
    stored: Mapping[str, StoredTensor] = MappingProxyType({}),
) -> ModelSpec:
    """The spec of a transformers config object (untyped there, hence Any).

    `generation_eos`: the ids of generation_config.json, which win over the config's own. `stored`: the checkpoint's
    tensors, where it has any.
    """
    where = getattr(config, "_name_or_path", None) or config.model_type
    architecture, family = _family_of(config.architectures, config.model_type, where)
    _refuse_quantized(getattr(config, "quantization_config", None), where)
    refuse_foreign_keys(config, architecture, family.qk_norm)
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
    eos_token_ids = _token_ids(config.eos_token_id if generation_eos is None else generation_eos, where)
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
        tie_embeddings=_flag("tie_word_embeddings", config) and not _has_own_head(stored, family.names, where),
        rope=read_rope(config, architecture),
        windows=_windows(config, family, architecture),
        max_position_embeddings=_max_positions(config, where),
        bos_token_id=config.bos_token_id,
        eos_token_ids=_known_ids(eos_token_ids, config.vocab_size, where),
        dtype=_dtype(config, architecture, stored),
        initializer_std=float(config.initializer_range),
    )


def _stored_weights(folder: Path) -> Mapping[str, StoredTensor]:
    """Nothing where there are no weights or no whole ones: the loader says what is wrong, if it reads them at all."""
    if (adapter := folder / "adapter_config.json").exists():
        logger.warning("%s is not applied: merge the adapter into the weights and save them", adapter)
    try:
        return stored_tensors(weight_files(folder)) if folder.is_dir() else {}
    except CheckpointError:
        return {}


def _has_own_head(stored: Mapping[str, StoredTensor], names: TensorNames, where: str) -> bool:
    """Whether a head lies beside the embedding and is another matrix. It is used then, whatever the config says."""
    head, embedding = stored.get(names.head), stored.get(names.embedding)
    if head is None or embedding is None or are_equal(head, embedding):
        return False
    logger.warning(
        "%s: config.json says that the head is the embedding (tie_word_embeddings), but the checkpoint has a %s of its"
        " own: that is used",
        *(where, names.head),
    )
    return True


def _family_of(architectures: list[str] | None, model_type: str, where: str) -> tuple[str, Family]:
    """By the class that the config names; by the model type where it names none, as transformers does."""
    by_type = ARCHITECTURES.get(model_type)
    named = architectures or [by_type or "none"]
    architecture = next((name for name in named if name in FAMILIES), None)
    if architecture is None:
        raise UnsupportedModelError(
            f"architecture of {where!r} is {', '.join(named)} and its model_type {model_type!r}, supported are"
            f" {', '.join(FAMILIES)}: choose a model of one of them"
        )
    if architecture != by_type:
        raise UnsupportedModelError(
            f"the config.json of {where!r} names the architecture {architecture} and the model_type {model_type!r},"
            f" which do not belong together (supported are {', '.join(ARCHITECTURES)}): correct the one that is wrong"
        )
    return architecture, FAMILIES[architecture]


def _refuse_quantized(quantization: Any, where: str) -> None:
    """`quantization`: the config's quantization_config, a dict or one of many transformers classes."""
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise UnsupportedModelError(
            f"the weights of {where!r} are quantised ({method}), supported are {', '.join(DTYPE_BYTES)}:"
            " use the unquantised checkpoint"
        )


def _flag(rule: bool | str, config: Any) -> bool:
    value = getattr(config, rule, None) if isinstance(rule, str) else rule
    if not isinstance(value, bool | None):  # a word, as "false", would be true
        raise TypeError(f"{rule} is {value!r}, expected true or false")
    return bool(value)


def _max_positions(config: Any, where: str) -> int:
    """Positions that the model's attention serves as it is written here.

    Qwen's models of a million tokens attend by dual chunks, which is plain attention up to the length that they name.
    """
    positions: int = config.max_position_embeddings
    chunks: dict[str, int] = getattr(config, "dual_chunk_attention_config", None) or {}
    plain = min(positions, chunks.get("original_max_position_embeddings", positions))
    if plain < positions:
        logger.warning(
            "%s: served up to %d positions instead of %d, beyond which it needs dual chunk attention",
            *(where, plain, positions),
        )
    return plain


def _activation(name: str, architecture: str) -> str:
    if name not in SUPPORTED_ACTIVATIONS:
        raise UnsupportedModelError(
            f"{architecture} has hidden_act {name!r}, supported are {', '.join(SUPPORTED_ACTIVATIONS)}"
        )
    return SUPPORTED_ACTIVATIONS[name]


def _token_ids(ids: object, where: str) -> tuple[int, ...]:
    """The ids of an eos_token_id as it stands in a file, each once."""
    if ids is None:
        return ()
    listed = ids if isinstance(ids, list) else [ids]
    if not all(type(token_id) is int for token_id in listed):
        raise UnsupportedModelError(
            f"the eos_token_id of {where} is {ids!r}: give a token id or a list of them in generation_config.json,"
            " or in config.json where that file has none"
        )
    return tuple(dict.fromkeys(listed))


def _known_ids(token_ids: tuple[int, ...], vocab_size: int, where: str) -> tuple[int, ...]:
    """Those of the ids that the model can draw. Configs often keep the ids of the model they were made from."""
    known = tuple(token_id for token_id in token_ids if 0 <= token_id < vocab_size)
    if known != token_ids:
        logger.warning(
            "%s: of the end-of-sequence ids %s of its configs, those outside the vocabulary, 0 to %d, are ignored",
            *(where, ", ".join(map(str, token_ids)), vocab_size - 1),
        )
    if len(known) >= MAX_STOP_TOKEN_IDS:  # the tokenizer may have one more
        raise UnsupportedModelError(
            f"{where} ends on {len(known)} token ids, the limit is {MAX_STOP_TOKEN_IDS - 1}: shorten eos_token_id in"
            " generation_config.json"
        )
    return known


def _dtype(config: Any, architecture: str, stored: Mapping[str, StoredTensor]) -> str:
    # transformers 4 calls it torch_dtype, and "auto" says nothing. Then the weights tell; without any it is float32,
    # torch's own default.
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or "auto"
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        name = next((_STORED_DTYPES[it.dtype] for it in stored.values() if it.dtype in _STORED_DTYPES), "float32")
    if name not in DTYPE_BYTES:
        raise UnsupportedModelError(f"{architecture} has dtype {name}, supported are {', '.join(DTYPE_BYTES)}")
    return name


def _windows(config: Any, family: Family, architecture: str) -> tuple[int | None, ...]:
    num_layers: int = config.num_hidden_layers
    window: int | None = None if family.windows == "none" else getattr(config, "sliding_window", None)
    if window is not None and window < 1:
        raise UnsupportedModelError(f"{architecture} has sliding_window {window}, the least is 1: null is no window")
    one_type = "full_attention" if window is None else "sliding_attention"
    layer_types: list[str] = getattr(config, "layer_types", None) or [one_type] * num_layers
    by_type = {"full_attention": None, "sliding_attention": window}
    if unknown := set(layer_types) - set(by_type):
        raise UnsupportedModelError(
            f"{architecture} has layer types {', '.join(sorted(unknown))}, supported are {', '.join(by_type)}"
        )
    if len(layer_types) != num_layers:
        raise UnsupportedModelError(f"{architecture} has {num_layers} layers and {len(layer_types)} layer_types")
    if family.windows != "by_layer_type" and set(layer_types) != {one_type}:
        raise UnsupportedModelError(
            f"{architecture} has layer_types that differ by layer, but all its layers are of {one_type}:"
            " correct layer_types, or name the architecture that reads them"
        )
    return tuple(by_type[layer_type] for layer_type in layer_types)
