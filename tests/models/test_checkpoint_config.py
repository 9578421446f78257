"""A config read without transformers gives the same spec as one read by it."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils._paths import filter_repo_objects
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from graphgen.demo import model_folder
from graphgen.ipc.errors import CheckpointError, UnsupportedModelError
from graphgen.models.checkpoint_config import _DOWNLOADED, _NOT_DOWNLOADED
from graphgen.models.families import FAMILIES, load_spec, spec_from_hf
from tests.models import tiny

ROTATES_AN_ODD_NUMBER = "glm4_moe"
"""By the defaults of its class, a share of a head: refused. Its checkpoints have a head_dim."""
CLASSES = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
ARCHITECTURES = {family.model_type: family.architecture for family in FAMILIES.values()}

OLD_FILES: dict[str, dict[str, Any]] = {
    "llama3.1": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "llama with the oldest key": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "qwen2 yarn": {
        "model_type": "qwen2",
        "rope_theta": 1e6,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "qwen2 window": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 20},
    "mistral without a window": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
}


TEXT_TYPES = {"gemma3": "gemma3_text", "mistral3": "mistral", "llama4": "llama4_text"}
LEAST: dict[str, dict[str, Any]] = {
    model_type: {
        "model_type": model_type,
        **({"text_config": {"model_type": TEXT_TYPES[model_type]}} if model_type in tiny.TOWERS else {}),
        **({"num_experts_per_tok": 6} if model_type == "deepseek_v2" else {}),  # which has no default
    }
    for model_type in ARCHITECTURES
}
"""Of each type the least that a config says."""


def write(folder: Path, config: dict[str, Any]) -> Path:
    whole = {"architectures": [ARCHITECTURES[config["model_type"]]], **config}
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


@pytest.mark.parametrize("case", tiny.CASES)
def test_files_of_todays_transformers_are_read_as_it_reads_them(case: str, tmp_path: Path) -> None:
    tiny.save(case, tmp_path)
    assert load_spec(tmp_path) == spec_from_hf(AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES.keys() - {ROTATES_AN_ODD_NUMBER}))
def test_keys_left_out_get_the_values_transformers_gives_them(model_type: str, tmp_path: Path) -> None:
    write(tmp_path, LEAST[model_type])
    assert load_spec(tmp_path) == spec_from_hf(AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", OLD_FILES)
def test_files_of_older_transformers_are_understood(name: str, tmp_path: Path) -> None:
    write(tmp_path, OLD_FILES[name])
    assert load_spec(tmp_path) == spec_from_hf(AutoConfig.from_pretrained(tmp_path))


def test_end_ids_of_the_generation_config_win(tmp_path: Path) -> None:
    write(tmp_path, {"model_type": "llama", "eos_token_id": 5})
    assert load_spec(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load_spec(tmp_path).eos_token_ids == (7, 9)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", "\udcff", '{"eos_token_id": "</s>"}', '{"eos_token_id": 1.5}', '{"eos_token_id": [[7]]}'],
)
def test_a_generation_config_that_is_not_understood_costs_a_warning_with_its_name(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, {"model_type": "llama", "eos_token_id": 5})
    file = tmp_path / "generation_config.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with caplog.at_level(logging.WARNING, logger="graphgen"):
        assert load_spec(tmp_path).eos_token_ids == (5,)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{file}: ")


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES.keys() - {ROTATES_AN_ODD_NUMBER}))
def test_a_config_without_architectures_is_known_by_its_type(model_type: str, tmp_path: Path) -> None:
    """Files made by hand and by converters name one of the two only; transformers goes by the type."""
    write(tmp_path, {**LEAST[model_type], "architectures": None})
    spec = load_spec(tmp_path)
    assert spec.architecture == CLASSES[model_type] == ARCHITECTURES[model_type]
    write(tmp_path, LEAST[model_type])
    assert load_spec(tmp_path) == spec
    (tmp_path / "config.json").write_text(
        json.dumps({**LEAST[model_type], "model_type": None, "architectures": [ARCHITECTURES[model_type]]})
    )
    assert load_spec(tmp_path) == spec


def test_numbers_that_only_pythons_json_knows_are_read(tmp_path: Path) -> None:
    """transformers writes them where a config holds one."""
    write(tmp_path, {"model_type": "llama", "eos_token_id": 5, "time_step_limit": [0.0, float("inf")]})
    (tmp_path / "generation_config.json").write_text('{"length_penalty": NaN, "eos_token_id": 7}')
    assert "Infinity" in (tmp_path / "config.json").read_text()
    assert load_spec(tmp_path).eos_token_ids == (7,)


def test_the_window_switch_of_qwen_means_nothing_to_others(tmp_path: Path) -> None:
    write(tmp_path, {"model_type": "mistral", "use_sliding_window": False, "sliding_window": 9})
    assert load_spec(tmp_path) == spec_from_hf(AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize(("key", "value"), [("hidden_size", "wide"), ("num_hidden_layers", None), ("vocab_size", 1.5)])
def test_a_value_of_the_wrong_type_is_refused_by_name(key: str, value: Any, model_type: str, tmp_path: Path) -> None:
    write(tmp_path, {"model_type": model_type, key: value})
    with pytest.raises(UnsupportedModelError, match="not understood"):
        load_spec(tmp_path)


NAN, HUGE = float("nan"), 2**40
WRONG: list[tuple[str, str, Any, str]] = [
    ("llama", "num_attention_heads", 0, "not understood: integer division"),
    ("llama", "num_attention_heads", -4, "-4 heads"),
    ("llama", "num_key_value_heads", 0, "0 KV heads"),
    ("llama", "num_key_value_heads", -1, "-1 KV heads"),
    ("llama", "num_hidden_layers", HUGE, f"{HUGE} layers, graphgen takes 1 to 10000"),
    ("llama", "num_hidden_layers", 0, "0 layers"),
    ("llama", "hidden_size", -64, "head_dim -"),
    ("llama", "intermediate_size", -1, r"`int` >= 1 - at `\$\.layers"),
    ("llama", "vocab_size", 0, r"`int` >= 1 - at `\$\.vocab_size"),
    ("llama", "vocab_size", HUGE, r"`int` <= 2147483647 - at `\$\.vocab_size"),
    ("llama", "max_position_embeddings", "long", "not understood: .*'long'"),
    ("llama", "rms_norm_eps", NAN, r"nan is no finite number - at `\$\.final_norm\.eps"),
    ("llama", "rms_norm_eps", -1.0, r">= 0.0 - at `\$\.layers"),
    ("gpt_neo", "attention_types", [[["global"], HUGE]], "layers and"),
    ("mixtral", "num_experts_per_tok", 9, "chooses 9 of 8 experts"),
    ("mixtral", "num_experts_per_tok", 0, "chooses 0 of 8 experts"),
    ("mixtral", "num_local_experts", -8, "of -8 experts"),
    ("qwen3_moe", "moe_intermediate_size", 0, r"`int` >= 1 - at `\$\.layers"),
    ("gemma2", "final_logit_softcapping", NAN, "no finite number"),
    ("mpt", "n_heads", 0, "not understood: integer division"),
    ("falcon", "num_attention_heads", 0, "not understood: integer division"),
    ("gpt2", "n_head", 0, "not understood: integer division"),
]


@pytest.mark.parametrize(("model_type", "key", "value", "said"), WRONG)
def test_a_size_that_cannot_be_is_refused(model_type: str, key: str, value: Any, said: str, tmp_path: Path) -> None:
    write(tmp_path, {"model_type": model_type, key: value})
    with pytest.raises(UnsupportedModelError, match=said):
        load_spec(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', '{"a":' * 100_000], ids=lambda text: text[:8])
def test_a_file_that_is_no_json_object_is_a_checkpoint_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_spec(tmp_path)


def test_reading_a_config_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys\nfrom graphgen.models.families import load_spec\n"
        f"load_spec({str(model_folder())!r})\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_download_has_the_templates_of_a_folder_and_no_weights_twice() -> None:
    files = ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "merges.txt"]
    files += ["additional_chat_templates/rag.jinja"]
    others = ["original/config.json", "onnx/model.safetensors", "consolidated.safetensors", "pytorch_model.bin"]
    others += ["original/tokenizer.model", "a/vocab.txt", "README.md"]
    patterns: Any = {"allow_patterns": list(_DOWNLOADED), "ignore_patterns": list(_NOT_DOWNLOADED)}
    assert list(filter_repo_objects([*files, *others], **patterns)) == files
