"""Llama and Mistral: pre-norm, gated feed-forward, rotation of whole heads."""

from msgspec.structs import replace

from graphgen.models.families.family import ATTENTION, GATED, RMS, Family, Rotary
from graphgen.models.families.words import flag, uniform, window
from graphgen.models.spec import Layer

LLAMA_LAYER = Layer(mixer=ATTENTION, feed_forward=GATED, input_norm=RMS, ff_norm=RMS)

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    checkpoints={
        "SmolLM2 135M": 0.135,
        "TinyLlama 1.1B": 1.1,
        "Llama 3.2 1B": 1.24,
        "Llama 3.1 8B": 8.03,
        "Llama 3.3 70B": 70.6,
    },
    notes="every rotary scaling; also Llama 1 and 2, Falcon3, Yi, DeepSeek-R1-Distill-Llama and others of this class",
    defaults=DEFAULTS,
    layer=replace(
        LLAMA_LAYER,
        mixer=replace(ATTENTION, qkv_bias=flag("attention_bias"), o_bias=flag("attention_bias")),
        feed_forward=replace(GATED, bias=flag("mlp_bias")),
    ),
    final_norm=RMS,
)

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    checkpoints={"Mistral 7B": 7.25, "Mistral Nemo 12B": 12.2, "Mistral Small 24B": 23.6},
    notes="Hugging Face's files; convert consolidated ones",
    defaults={
        **DEFAULTS,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    layer=replace(LLAMA_LAYER, mixer=replace(ATTENTION, window=window())),
    mixer_kinds=uniform("sliding_window"),
    final_norm=RMS,
)

MINISTRAL3 = replace(
    MISTRAL,
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    checkpoints={"Ministral 3 3B": 3.43, "Ministral 3 8B": 8.49, "Ministral 3 14B": 13.5},
    notes="files in bfloat16",
    defaults={
        **MISTRAL.defaults,
        "vocab_size": 131072,
        "num_hidden_layers": 34,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "rope_parameters": {
            "type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    rotaries=(Rotary(beta="llama_4_scaling_beta"),),
)

FAMILIES = (LLAMA, MISTRAL, MINISTRAL3)
