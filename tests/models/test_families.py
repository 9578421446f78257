"""A ModelSpec says what the Hugging Face config says, and what cannot be run is refused by name."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoConfig, Qwen2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from graphgen.ipc.errors import CheckpointError, ConfigError, UnsupportedModelError
from graphgen.launch.config import EngineConfig
from graphgen.launch.resolve import resolve
from graphgen.models.families import FAMILIES, load_spec, spec_from_hf
from graphgen.models.families.document import written
from graphgen.models.families.table import families_of_type
from graphgen.models.spec import ModelSpec, RopeSpec
from tests import ROOT
from tests.models import tiny


def write_config(folder: Path, **changes: Any) -> None:
    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **tiny.SMALL, **changes}
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("case", tiny.CASES)
def test_sizes_equal_those_of_the_reference(case: str) -> None:
    model = tiny.build(case)
    spec = tiny.spec_of(model)
    assert spec.num_parameters == tiny.num_parameters(model)
    assert spec.weight_bytes("bfloat16") == 2 * spec.num_parameters
    text = model.config.get_text_config()
    if (rank := getattr(text, "kv_lora_rank", None)) is not None:
        of_layer = rank + text.qk_rope_head_dim
    else:
        of_layer = 2 * spec.attention.kv_size
    assert spec.kv_bytes_per_token("float32") == 4 * spec.num_layers * of_layer
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=ModelSpec) == spec


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    with pytest.raises(ConfigError, match=r"'int3', supported are float32, bfloat16, float16"):
        load_spec(tmp_path).weight_bytes("int3")


def test_windows_follow_the_family() -> None:
    def windows(case: str) -> tuple[int | None, ...]:
        return tiny.spec_of(tiny.build(case)).windows

    assert windows("llama") == (None, None, None)
    assert windows("mistral_window") == (11, 11, 11)
    assert windows("mistral_full") == (None, None, None)
    assert windows("qwen2") == (None, None, None)
    assert windows("qwen2_window") == (None, 7, 7)


def test_end_of_sequence_ids_come_from_the_generation_config_first(tmp_path: Path) -> None:
    write_config(tmp_path, eos_token_id=[5, 6, 5])
    assert load_spec(tmp_path).eos_token_ids == (5, 6)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5, 8]}))
    assert load_spec(tmp_path).eos_token_ids == (7, 5, 8)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    assert load_spec(tmp_path).eos_token_ids == (5, 6)
    write_config(tmp_path, eos_token_id=None)
    assert load_spec(tmp_path).eos_token_ids == ()


@pytest.mark.parametrize(
    ("written", "read"), [("bfloat16", "bfloat16"), ("float16", "float16"), (None, "float32"), ("auto", "float32")]
)
def test_dtype_is_that_of_the_checkpoint(written: str | None, read: str, tmp_path: Path) -> None:
    write_config(tmp_path, torch_dtype=written)
    assert load_spec(tmp_path).dtype == read


@pytest.mark.parametrize("written", [{}, {"torch_dtype": "auto"}, {"dtype": "auto", "torch_dtype": "float32"}])
def test_where_the_config_names_no_dtype_the_weights_have_it(written: dict[str, str], tmp_path: Path) -> None:
    tiny.build("llama").to(torch.float16).save_pretrained(tmp_path)
    write_config(tmp_path, **written)
    assert load_spec(tmp_path).dtype == "float16"


def test_the_config_of_transformers_4_means_the_same(tmp_path: Path) -> None:
    scaling = {"type": "linear", "factor": 2.0}
    write_config(tmp_path, rope_theta=5000.0, rope_scaling=scaling)
    assert load_spec(tmp_path).ropes[0] == RopeSpec("linear", 5000.0, 2.0, 512)
    config = SimpleNamespace(  # what transformers 4 makes of the same file
        **{
            **tiny.SMALL,
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "rope_theta": 5000.0,
            "rope_scaling": scaling,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
    )
    spec = spec_from_hf(config)
    assert spec.ropes[0] == RopeSpec("linear", 5000.0, 2.0, 512)
    assert spec.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "MambaForCausalLM and its model_type 'mamba'"),
        ({"architectures": ["NobodysModel"], "model_type": "nobody"}, "NobodysModel"),
        ({"architectures": None, "model_type": "nobody"}, "is none and its model_type 'nobody'"),
        (
            {"architectures": ["MistralForCausalLM"]},
            "MistralForCausalLM and the model_type 'llama', which do not belong",
        ),
        ({"hidden_act": "tanh"}, "hidden_act 'tanh', supported are silu"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "'proportional', supported are default, linear"),
        (
            {"rope_scaling": {"rope_type": "longrope", "long_factor": [2.0] * 4, "short_factor": [1.0] * 3}},
            "3 values in short_factor, its rotation needs 4",
        ),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised \\(bitsandbytes\\)"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "6 heads, 4 KV heads"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"dtype": "float64"}, "dtype float64"),
        ({"mlp_bias": "false"}, "mlp_bias is 'false', expected true or false"),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "layer_types that differ by layer",
        ),
        ({"layer_types": ["full_attention"]}, "3 layers and 1 layer_types"),
        ({"eos_token_id": list(range(3, 19))}, "ends on 16 token ids, the limit is 15"),
        # keys of other models and of forks: nothing of ours reads them
        ({"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0"),
        ({"logits_scaling": 8}, "logits_scaling = 8"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"no_rope_layers": [1, 1, 0]}, r"no_rope_layers = \[1, 1, 0\]"),
        ({"use_mrope": True}, "use_mrope = True"),
        ({"sliding_window": 64}, "sliding_window = 64"),
        ({"use_qk_norm": True}, "use_qk_norm = True"),
        ({"is_causal": False}, "is_causal = False"),
        ({"per_layer_config": {"0": {"intermediate_size": 40}}}, "per_layer_config = "),
    ],
)
def test_what_cannot_run_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_config(tmp_path, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        load_spec(tmp_path)


def test_foreign_keys_at_their_neutral_values_are_no_hindrance(tmp_path: Path) -> None:
    neutral = {
        "sliding_window": 64,
        "use_sliding_window": False,
        "embedding_multiplier": 1.0,
        "logit_scale": None,
        "use_mrope": False,
        "is_causal": True,
    }
    write_config(tmp_path, **neutral, no_rope_layers=[1, 1, 1], qk_layernorm=False, per_layer_config={})
    load_spec(tmp_path)


def test_a_key_that_is_unknown_and_says_something_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_config(tmp_path, use_cache=True, summary_type="cls_index", off=False, nothing=None, empty={})
    load_spec(tmp_path)
    assert not caplog.records
    write_config(tmp_path, gate_every=2, off=False)
    load_spec(tmp_path)
    (record,) = caplog.records
    assert f"{tmp_path}: config.json has keys that graphgen does not know in a LlamaForCausalLM: gate_every = 2." in (
        record.getMessage()
    )


@pytest.mark.parametrize("model_type", dict.fromkeys(family.model_type for family in FAMILIES.values()))
def test_every_key_of_a_class_is_read_or_known_to_change_nothing(
    model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    """So that a trait that transformers' class learns cannot slip in unseen."""
    # GLM-4.5's defaults rotate an odd number of dimensions, DeepSeek V2's choose no number of experts.
    needed = {"glm4_moe": {"head_dim": 128}, "deepseek_v2": {"num_experts_per_tok": 6}}
    config = AutoConfig.for_model(model_type, **needed.get(model_type, {}))
    config.architectures = [families_of_type(model_type)[0].architecture]
    with caplog.at_level(logging.WARNING, logger="graphgen"):
        spec_from_hf(config)
    assert "does not know" not in caplog.text
    (config if model_type not in tiny.TOWERS else config.text_config).new_trait = 0.5
    with caplog.at_level(logging.WARNING, logger="graphgen"):
        spec_from_hf(config)
    assert "does not know in a" in caplog.text
    assert "new_trait = 0.5" in caplog.text


def test_end_of_sequence_ids_beyond_the_vocabulary_are_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise every request would fail over a stop id that nobody gave."""
    write_config(tmp_path, eos_token_id=[96, 97, 151643, -1])
    launch = resolve(EngineConfig(device="cpu"), load_spec(tmp_path), tmp_path)
    assert launch.eos_token_ids == (96,)
    assert "96, 97, 151643, -1 of its configs, those outside the vocabulary, 0 to 96, are ignored" in caplog.text
    write_config(tmp_path, eos_token_id=5)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [151643, 151645]}))
    assert load_spec(tmp_path).eos_token_ids == ()


@pytest.mark.parametrize("ids", ["</s>", 2.0, True, [2, None], [[2]]], ids=str)
def test_end_of_sequence_ids_that_are_no_ids_are_told_with_their_file(ids: Any, tmp_path: Path) -> None:
    write_config(tmp_path, eos_token_id=ids)
    with pytest.raises(UnsupportedModelError, match=f"eos_token_id of .*{re.escape(repr(ids))}.*config"):
        load_spec(tmp_path)


def test_a_model_of_dual_chunks_is_served_as_far_as_they_are_plain_attention(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_config(tmp_path, dual_chunk_attention_config={"chunk_size": 128, "original_max_position_embeddings": 96})
    assert load_spec(tmp_path).max_position_embeddings == 96
    assert "served up to 96 positions instead of 512" in caplog.text
    write_config(tmp_path, dual_chunk_attention_config={"chunk_size": 128})
    assert load_spec(tmp_path).max_position_embeddings == 512


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_no_position_is_refused(window: int, tmp_path: Path) -> None:
    write_config(tmp_path, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=window)
    with pytest.raises(UnsupportedModelError, match=f"sliding_window {window}, the least is 1"):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "architecture", "nearest"),
    [
        ("mixtral2", "Mixtral2ForCausalLM", "MixtralForCausalLM (mixtral)"),
        ("qwen3_next", "Qwen3NextForCausalLM", "Qwen3ForCausalLM (qwen3)"),
        ("biogpt", "BioGptForCausalLM", "GPT2LMHeadModel (gpt2)"),
        ("nobody", "OtherForCausalLM", "ForCausalLM"),
    ],
)
def test_the_refusal_of_an_architecture_names_the_nearest_that_run(
    model_type: str, architecture: str, nearest: str, tmp_path: Path
) -> None:
    write_config(tmp_path, architectures=[architecture], model_type=model_type)
    with pytest.raises(UnsupportedModelError, match=f"{architecture} .*nearest.*{re.escape(nearest)}.*docs/models.md"):
        load_spec(tmp_path)


def test_every_other_causal_model_of_transformers_is_refused_with_the_nearest_that_run(tmp_path: Path) -> None:
    own = {family.model_type for family in FAMILIES.values()}
    others = {name: kind for name, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name not in own}
    assert len(others) > 100
    classes = {family.architecture for family in FAMILIES.values()}
    for model_type, architecture in others.items():
        write_config(tmp_path, architectures=[architecture], model_type=model_type)
        known = "do not belong together" if architecture in classes else "the nearest that it runs are .*For"
        with pytest.raises(UnsupportedModelError, match=f"{architecture} .*'{model_type}'.*{known}"):
            load_spec(tmp_path)


def test_unknown_layer_types_are_refused() -> None:
    config = Qwen2Config(**{**tiny.SMALL, "use_sliding_window": True, "sliding_window": 4})
    config.architectures = ["Qwen2ForCausalLM"]
    config.layer_types = ["full_attention", "chunked_attention", "sliding_attention"]
    with pytest.raises(UnsupportedModelError, match="layer types chunked_attention"):
        spec_from_hf(config)


@pytest.mark.parametrize("content", [None, "not json"])
def test_a_folder_without_a_readable_config_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_spec(tmp_path)


def test_the_page_of_models_is_made_from_the_families() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    assert page == written(page), "run python -m graphgen.models.families.document docs/models.md"
