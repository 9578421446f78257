"""Phi-3, Phi-3.5 and Phi-4: Llama with fused matrices, and a rotation that changes beyond its original length."""

from msgspec.structs import replace

from graphgen.models.families import llama
from graphgen.models.families.family import ATTENTION, RMS, Family, Rotary, TensorNames
from graphgen.models.families.llama import LLAMA_LAYER
from graphgen.models.families.words import uniform, window

PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    checkpoints={"Phi-3 mini": 3.82, "Phi-4-mini": 3.84, "Phi-3 medium, Phi-4": 14.0},
    notes="a request that may become longer than the original length (4096), prompt and max_tokens together, has the"
    " rotation of long ones from its first token on; no prompts are shared where that may be",
    defaults={
        **llama.DEFAULTS,
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 32000,
    },
    layer=replace(LLAMA_LAYER, mixer=replace(ATTENTION, window=window())),
    mixer_kinds=uniform("sliding_window"),
    rotaries=(Rotary(partial=True, kinds={"su": "longrope", "yarn": "longrope"}),),
    final_norm=RMS,
    names=TensorNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
)

FAMILIES = (PHI3,)
