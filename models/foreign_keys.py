"""Keys of a config.json that change what a model computes and that none of graphgen's families has.

Owns the table of them. Forks of Llama keep its class name and add such a key; ignored, it would mean wrong tokens
without a word. A key that a family's template reads is none of these. Called by families/reader.py.
"""

from collections.abc import Mapping, Set
from typing import Any

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.models.families.family import Family
from graphgen.models.families.words import OFF as _OFF
from graphgen.models.families.words import value_at

_ONE: tuple[Any, ...] = (None, 1)

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # scalars on activations, scores and logits (Granite, MiniCPM, Cohere, Gemma, Falcon-H1)
    "embedding_multiplier": _ONE,
    "residual_multiplier": _ONE,
    "residual_scale": _ONE,
    "attention_multiplier": (None,),
    "key_multiplier": _ONE,
    "lm_head_multiplier": _ONE,
    "logits_scaling": _ONE,
    "logit_scale": _ONE,
    "scale_emb": _ONE,
    "scale_depth": (None,),
    "dim_model_base": (None,),
    "query_pre_attn_scalar": (None,),
    "attn_logit_softcapping": _OFF,
    "final_logit_softcapping": _OFF,
    "clip_qkv": _OFF,
    # positions (Llama 4, SmolLM3, Qwen2-VL, Cohere 2, MPT)
    "no_rope_layer_interval": _OFF,
    "rope_interleave": _OFF,
    "rope_interleaved": _OFF,
    "use_mrope": _OFF,
    "alibi": _OFF,
    "use_alibi": _OFF,
    "attn_temperature_tuning": _OFF,
    # who sees whom (embedding models, Llama 4, Gemma)
    "is_causal": (None, True),
    "use_bidirectional_attention": _OFF,
    "attention_chunk_size": _OFF,
    "sliding_window_pattern": _OFF,
    "interleaved_sliding_window": _OFF,
    # how a layer is put together (Falcon, GPT-NeoX)
    "parallel_attn": _OFF,
    "use_parallel_residual": _OFF,
}
"""Key -> the values under which it changes nothing. Values differ by key, hence Any."""

_QK_NORM_KEYS = ("use_qk_norm", "qk_norm", "qk_layernorm")
"""Some such norms have no weight that the loader would miss."""


def refuse_foreign_keys(config: Any, family: Family, read: Set[str], qk_norm: bool) -> None:
    """Raises UnsupportedModelError for a key whose effect graphgen does not compute.

    config: a transformers config object, which is untyped there. read: keys that the family's template asked for.
    qk_norm: whether the family norms q and k."""
    neutral = {**_NEUTRAL, **dict.fromkeys(_QK_NORM_KEYS, (*_OFF, True) if qk_norm else _OFF)}
    neutral = {name: values for name, values in neutral.items() if name not in read}
    for name, values in {**neutral, **family.only}.items():
        if (value := value_at(config, name)) is not None and value not in values:
            _refuse(name, value, family.architecture)
    # transformers' layers of unequal shapes: a dictionary in the file, and always some object in a config of its own.
    if isinstance(layers := getattr(config, "per_layer_config", None), dict) and layers:
        _refuse("per_layer_config", layers, family.architecture)
    # One entry a layer, 1 where it rotates.
    if "no_rope_layers" not in read and not all(getattr(config, "no_rope_layers", None) or ()):
        _refuse("no_rope_layers", config.no_rope_layers, family.architecture)


def _refuse(name: str, value: Any, architecture: str) -> None:
    raise UnsupportedModelError(
        f"config.json has {name} = {value!r}, which no {architecture} of graphgen computes: choose a checkpoint that"
        " is a plain one, or remove the key if it was added by mistake"
    )
