"""GLM-4: half of each head rotates, in pairs side by side; the newer ones have a norm on both sides of each block."""

from msgspec.structs import replace

from graphgen.models.families import llama
from graphgen.models.families.family import ATTENTION, GATED, RMS, Family, Rotary, TensorNames
from graphgen.models.families.llama import LLAMA_LAYER
from graphgen.models.families.words import flag
from graphgen.models.spec import Layer

_ATTENTION = replace(ATTENTION, qkv_bias=flag("attention_bias", True))
_NAMES = TensorNames(gate_up=("mlp.gate_up_proj",))

GLM = Family(
    model_type="glm",
    architecture="GlmForCausalLM",
    checkpoints={"GLM-4 9B": 9.4},
    notes="checkpoints whose names end in -hf",
    defaults={
        **llama.DEFAULTS,
        "vocab_size": 151552,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-7,
        "bos_token_id": None,
        "eos_token_id": [151329, 151336, 151338],
    },
    layer=replace(LLAMA_LAYER, mixer=_ATTENTION),
    rotaries=(Rotary(partial=True, default_share=0.5, interleaved=True),),
    final_norm=RMS,
    float16=False,
    names=_NAMES,
)
GLM4 = replace(
    GLM,
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    checkpoints={"GLM-4 9B 0414": 9.4, "GLM-4 32B 0414": 32.6},
    notes="also GLM-Z1",
    layer=Layer(
        mixer=_ATTENTION,
        feed_forward=GATED,
        input_norm=RMS,
        ff_norm=RMS,
        mixer_output_norm=RMS,
        ff_output_norm=RMS,
    ),
    names=replace(_NAMES, mixer_output_norm="post_self_attn_layernorm", ff_output_norm="post_mlp_layernorm"),
)

FAMILIES = (GLM, GLM4)
