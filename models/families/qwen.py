"""Qwen 2 and 3, dense."""

from msgspec.structs import replace

from graphgen.models.families import llama
from graphgen.models.families.family import ATTENTION, HEAD_NORM, RMS, Family
from graphgen.models.families.llama import LLAMA_LAYER
from graphgen.models.families.words import FULL, SLIDING, flag, from_layer, listed, window

DEFAULTS = {
    **llama.DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}
_KINDS = listed(otherwise=from_layer("max_window_layers", SLIDING, FULL, switch="use_sliding_window"))
_WINDOW = window("use_sliding_window")

_ATTENTION_2 = replace(ATTENTION, qkv_bias=True)
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    checkpoints={"Qwen2.5 0.5B": 0.49, "Qwen2.5 7B": 7.6, "Qwen2.5 32B": 32.8, "Qwen2.5 72B": 72.7},
    notes="also Qwen1.5, Qwen2, QwQ, DeepSeek-R1-Distill-Qwen; models of a million tokens up to the length of a chunk",
    defaults=DEFAULTS,
    layer=replace(LLAMA_LAYER, mixer=_ATTENTION_2),
    mixers={FULL: _ATTENTION_2, SLIDING: replace(_ATTENTION_2, window=_WINDOW)},
    mixer_kinds=_KINDS,
    final_norm=RMS,
)

_ATTENTION_3 = replace(ATTENTION, qkv_bias=flag("attention_bias"), o_bias=flag("attention_bias"), qk_norm=HEAD_NORM)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    checkpoints={"Qwen3 0.6B": 0.6, "Qwen3 4B": 4.0, "Qwen3 8B": 8.2, "Qwen3 32B": 32.8},
    defaults={**DEFAULTS, "head_dim": 128},
    layer=replace(LLAMA_LAYER, mixer=_ATTENTION_3),
    mixers={FULL: _ATTENTION_3, SLIDING: replace(_ATTENTION_3, window=_WINDOW)},
    mixer_kinds=_KINDS,
    final_norm=RMS,
)

FAMILIES = (QWEN2, QWEN3)
