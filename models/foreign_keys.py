"""Keys of a config.json that the family's template does not read: none is ignored in silence.

Owns the tables of those that change what some model computes, which are refused unless their value says «nothing», and
of those that change it in none. Any other costs a warning: forks of Llama keep its class name and add a key, which
ignored would mean wrong tokens without a word. Called by families/reader.py.
"""

import logging
from collections.abc import Mapping, Set
from typing import Any

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.models.families.family import Family
from graphgen.models.families.words import OFF as _OFF
from graphgen.models.families.words import value_at

logger = logging.getLogger("graphgen.models")

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
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": _OFF,
    "softmax_scale": (None,),
    "swiglu_limit": (None,),
    # positions (Llama 4, SmolLM3, Qwen2-VL, Cohere 2, MPT)
    "no_rope_layer_interval": _OFF,
    "rope_interleave": _OFF,
    "rope_interleaved": _OFF,
    "use_mrope": _OFF,
    "alibi": _OFF,
    "use_alibi": _OFF,
    "attn_temperature_tuning": _OFF,
    "rotary_dim": (None,),
    "rotary_pct": _ONE,
    # who sees whom (embedding models, Llama 4, Gemma)
    "is_causal": (None, True),
    "use_bidirectional_attention": _OFF,
    "attention_chunk_size": _OFF,
    "sliding_window_pattern": _OFF,
    "interleaved_sliding_window": _OFF,
    "sliding_window": (None,),  # where no key switches it off
    "use_sliding_window": _OFF,
    "is_encoder_decoder": _OFF,
    "add_cross_attention": _OFF,
    # how a layer is put together (Falcon, GPT-NeoX)
    "parallel_attn": _OFF,
    "use_parallel_residual": _OFF,
    "apply_residual_connection_post_layernorm": _OFF,
    "do_layer_norm_before": (None, True),
    "pruned_heads": _OFF,
}
"""Key -> the values under which it changes nothing. Values differ by key, hence Any."""

_QK_NORM_KEYS = ("use_qk_norm", "qk_norm", "qk_layernorm")
"""Some such norms have no weight that the loader would miss."""


_WITHOUT_ARITHMETIC = frozenset(
    (
        *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "auto_map"),
        *("tokenizer_class", "task_specific_params", "finetuning_task", "language", "prefix", "unsloth_version"),
        *("unsloth_fixed", "is_llama_config", "transformers.js_config", "id2label", "label2id", "num_labels"),
        *("problem_type", "return_dict", "output_hidden_states", "output_attentions", "output_scores"),
        *("return_dict_in_generate", "torchscript", "use_bfloat16", "tf_legacy_loss", "use_cache"),
        *("gradient_checkpointing", "is_decoder", "chunk_size_feed_forward", "attn_implementation"),
        *("ignore_keys_at_rope_validation", "pretraining_tp", "per_layer_config", "attention_dropout"),
        *("attn_dropout", "attn_pdrop", "embd_pdrop", "emb_pdrop", "resid_pdrop", "hidden_dropout"),
        *("residual_dropout", "embedding_dropout", "activation_dropout", "classifier_dropout", "resid_dropout"),
        *("embed_dropout", "dropout", "layerdrop", "initializer_range", "init_std", "initializer_factor"),
        *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "input_jitter_noise"),
        *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type"),
        *("summary_use_proj", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
        *("cls_token_id", "mask_token_id"),
        *("eod_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
        *("begin_suppress_tokens", "suppress_tokens", "bad_words_ids", "max_length", "min_length"),
        *("max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
        *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences"),
        *("remove_invalid_values", "exponential_decay_length_penalty"),
    )
)
"""Of files, training, classification and generation: no logit of the next token follows from them, in no family."""


def check_unread_keys(config: Any, family: Family, read: Set[str], qk_norm: bool, where: str) -> None:
    """Raises UnsupportedModelError for a key whose effect graphgen does not compute, and warns of one that it does not
    know.

    config: an object with the keys as attributes, a transformers config or one that has all that a file says. read:
    keys that the family's template asked for. qk_norm: whether the family norms q and k. where: for the message."""
    neutral = {**_NEUTRAL, **dict.fromkeys(_QK_NORM_KEYS, (*_OFF, True) if qk_norm else _OFF)}
    neutral = {name: values for name, values in neutral.items() if name not in read and name not in family.unread}
    if getattr(config, "use_sliding_window", None) is False:
        neutral.pop("sliding_window", None)
    for name, values in {**neutral, **family.only}.items():
        if (value := value_at(config, name)) is not None and value not in values:
            _refuse(name, value, family.architecture)
    # transformers' layers of unequal shapes: a dictionary in the file, and always some object in a config of its own.
    if isinstance(layers := getattr(config, "per_layer_config", None), dict) and layers:
        _refuse("per_layer_config", layers, family.architecture)
    # One entry a layer, 1 where it rotates.
    if "no_rope_layers" not in read and not all(getattr(config, "no_rope_layers", None) or ()):
        _refuse("no_rope_layers", config.no_rope_layers, family.architecture)
    checked = {*_NEUTRAL, *_QK_NORM_KEYS, *(path.split(".")[0] for path in family.only), "no_rope_layers"}
    known = {*_WITHOUT_ARITHMETIC, *checked, *read, *family.unread, *family.aliases, *family.aliases.values()}
    unknown = {
        name: value
        for name, value in vars(config).items()
        if name not in known and not name.startswith("_") and value not in _OFF
    }
    if unknown:
        logger.warning(
            "%s: config.json has keys that graphgen does not know in a %s: %s. Where one changes what the model"
            " computes, its tokens are wrong here",
            *(where, family.architecture, ", ".join(f"{name} = {value!r:.40}" for name, value in unknown.items())),
        )


def _refuse(name: str, value: Any, architecture: str) -> None:
    raise UnsupportedModelError(
        f"config.json has {name} = {value!r}, which no {architecture} of graphgen computes: choose a checkpoint that"
        " is a plain one, or remove the key if it was added by mistake"
    )
