"""What a generation_config.json says of drawing: as transformers reads it, and no value that is wrong stops a start."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from graphgen.ipc.ggp.messages import SamplingDefaults
from graphgen.models.generation_config import read_sampling_defaults

LLAMA_3 = {
    "bos_token_id": 128000,
    "do_sample": True,
    "eos_token_id": [128001, 128009],
    "temperature": 0.6,
    "top_p": 0.9,
}
QWEN_2 = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20}


def write(folder: Path, text: str) -> Path:
    (folder / "generation_config.json").write_text(text)
    return folder


@pytest.mark.parametrize("stated", [LLAMA_3, QWEN_2, {"top_k": 50, "min_p": 0.05}, {"temperature": 1}, {}])
def test_values_are_those_that_transformers_reads_and_the_others_are_off(
    tmp_path: Path, stated: dict[str, Any]
) -> None:
    found = read_sampling_defaults(write(tmp_path, json.dumps(stated)))
    reference = GenerationConfig.from_pretrained(str(tmp_path))
    for name in SamplingDefaults.__struct_fields__:
        expected = getattr(reference, name) if name in stated else getattr(SamplingDefaults(), name)
        assert getattr(found, name) == expected, name


@pytest.mark.parametrize(
    ("stated", "temperature"),
    [
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 0.9}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": None, "temperature": 0.9}, 0.9),
    ],
)
def test_a_model_that_says_not_to_sample_is_greedy_as_it_is_in_transformers(
    tmp_path: Path, stated: dict[str, Any], temperature: float
) -> None:
    assert read_sampling_defaults(write(tmp_path, json.dumps(stated))).temperature == temperature
    if stated["do_sample"] is not None:
        is_greedy = GenerationConfig(**stated).get_generation_mode() is GenerationMode.GREEDY_SEARCH
        assert is_greedy == (temperature == 0.0)


def test_minus_one_is_off(tmp_path: Path) -> None:
    assert read_sampling_defaults(write(tmp_path, '{"top_k": -1}')) == SamplingDefaults()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "0.7"),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", True),
        ("top_k", 2.5),
        ("top_k", -2),
        ("top_k", [20]),
        ("top_p", 0),
        ("top_p", 1.5),
        ("min_p", {"a": 1}),
        ("repetition_penalty", 0.0),
        ("do_sample", "no"),
    ],
)
def test_a_wrong_value_costs_a_warning_with_file_and_key_and_the_others_hold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, value: object
) -> None:
    good = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}
    folder = write(tmp_path, json.dumps({**good, key: value}))
    with caplog.at_level(logging.WARNING, logger="graphgen"):
        found = read_sampling_defaults(folder)
    good.pop(key, None)
    assert found == SamplingDefaults(**good)  # type: ignore[arg-type]  # top_k is an int
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{folder / 'generation_config.json'}: {key} {value!r} ")


@pytest.mark.parametrize("text", ["", "[1]", "{", "null", '{"temperature": 0.5', "\udcff"])
def test_a_file_that_cannot_be_read_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    (tmp_path / "generation_config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert read_sampling_defaults(tmp_path) == SamplingDefaults()
    (record,) = caplog.records
    assert "generation_config.json" in record.getMessage()


def test_a_folder_without_the_file_states_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_sampling_defaults(tmp_path) == SamplingDefaults()
    assert caplog.records == []


def test_rules_that_are_not_followed_are_named_and_neutral_ones_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stated = {"num_beams": 4, "typical_p": 0.9, "no_repeat_ngram_size": 0, "suppress_tokens": [], "penalty_alpha": None}
    read_sampling_defaults(write(tmp_path, json.dumps(stated)))
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(": ", 1)[1].split(" is a rule")[0] for message in messages] == [
        "num_beams 4",
        "typical_p 0.9",
    ]
