"""GGUF files of models that transformers made, written as llama.cpp's converter writes them.

Names of tensors and of metadata are those of the package gguf. What the converter does to tensors is written here from
its own description, not from graphgen's way back.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from tests.models.tiny import HuggingFaceModel

Array = npt.NDArray[np.float32]
WITH_PAIRS = ("llama", "smollm3", "granite", "mixtral", "mistral", "ministral3")
ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "qwen3_moe": "qwen3moe",
    "mixtral": "llama",
    "mistral": "mistral3",
    "ministral3": "mistral3",
}
"""model_type -> general.architecture, where they are not the same."""


def write(
    model: HuggingFaceModel,
    file: Path,
    tokens: Mapping[str, Any] | None = None,
    change: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
    quantised: gguf.GGMLQuantizationType | None = None,
    stacked: bool = True,
) -> None:
    """tokens: entries of the tokenizer, without "tokenizer.ggml.". change: adds more to the file. quantised: the type
    of matrices. stacked: the experts of a layer, in one tensor."""
    config = model.config
    name = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(file, name)
    _add_config(writer, config)
    for key, value in (tokens or {}).items():
        if isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{key}", value)
        else:
            writer.add_key_value(f"tokenizer.ggml.{key}", value, gguf.GGUFValueType.get_type(value))
    change(writer)
    arch = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for own, tensor in model.state_dict().items():
        if own == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ".experts." in own:
            for name, matrices in _of_experts(own, tensor.float().numpy()).items():
                if stacked:
                    writer.add_tensor(name, matrices)
                    continue
                for number, matrix in enumerate(matrices):
                    writer.add_tensor(name.replace("_exps", f".{number}"), np.ascontiguousarray(matrix))
            continue
        stem, _, suffix = own.rpartition(".")
        stored = _stored(tensor.float().numpy(), stem, config)
        if quantised is not None and stored.ndim == 2:
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", gguf.quantize(stored, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _of_experts(own: str, tensor: Array) -> dict[str, Array]:
    """transformers keeps gate and up in one."""
    layer = own.split(".")[2]
    if own.endswith("down_proj"):
        return {f"blk.{layer}.ffn_down_exps.weight": tensor}
    gate, up = (np.ascontiguousarray(half) for half in np.split(tensor, 2, axis=1))
    return {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}


def _add_config(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config.vocab_size)
    ropes = config.rope_parameters
    ropes = ropes.get("full_attention", ropes)
    if config.model_type == "phi3":
        _add_phi3(writer, config, ropes)
    elif (head_dim := getattr(config, "head_dim", None)) is not None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(ropes["rope_theta"])
    if ropes["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(ropes["rope_type"]))
        writer.add_rope_scaling_factor(ropes["factor"])
    if ropes["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(ropes["original_max_position_embeddings"])
    if config.model_type.startswith("gemma") and getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "ministral3":
        writer.add_rope_scaling_yarn_beta_fast(ropes["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(ropes["beta_slow"])
        writer.add_rope_scaling_yarn_log_mul(ropes["mscale_all_dim"])
        writer.add_attn_temperature_scale(ropes["llama_4_scaling_beta"])
    if config.model_type == "mixtral":
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for name, add in (
        ("attention_multiplier", writer.add_attention_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if getattr(config, name, None) is not None:
            add(getattr(config, name))


def _add_phi3(writer: gguf.GGUFWriter, config: Any, ropes: Mapping[str, Any]) -> None:
    width = config.hidden_size // config.num_attention_heads
    original = config.original_max_position_embeddings
    writer.add_rope_dimension_count(int(width * ropes.get("partial_rotary_factor", 1.0)))
    writer.add_sliding_window(config.sliding_window or 0)
    writer.add_rope_scaling_orig_ctx_len(original)
    if ropes["rope_type"] == "longrope":
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        writer.add_tensor("rope_factors_long.weight", np.array(ropes["long_factor"], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(ropes["short_factor"], np.float32))


def _stored(tensor: Array, stem: str, config: Any) -> Array:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(stem.rpartition(".")[2])
    if count is not None and config.model_type in WITH_PAIRS:
        # llama.cpp turns neighbours: the halves of each head are shuffled into one another.
        halves = tensor.reshape(count, 2, -1, *tensor.shape[1:])
        tensor = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
    if config.model_type.startswith("gemma") and stem.endswith("norm"):
        tensor = tensor + 1
    return tensor
