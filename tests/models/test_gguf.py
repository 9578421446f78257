"""GGUF files: they are the checkpoints that they were made from, and what cannot be read is refused by name."""

import math
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers.integrations.gguf import dequant
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from graphgen.ipc.errors import CheckpointError, UnsupportedModelError
from graphgen.models.checkpoint import open_checkpoint
from graphgen.models.checkpoint_config import resolve_model
from graphgen.models.decoder import Decoder
from graphgen.models.families import FAMILIES, load_spec
from graphgen.models.generation_config import read_sampling_defaults
from graphgen.models.gguf import checkpoint as gguf_checkpoint
from graphgen.models.gguf.architectures import ARCHITECTURES
from graphgen.models.gguf.header import TENSOR_TYPES, read_header
from graphgen.models.loader import load_decoder
from graphgen.models.spec import ModelSpec
from tests.models import gguf_files, tiny

CPU = torch.device("cpu")
TOKENS: dict[str, Any] = {"tokens": ["<s>", "</s>", "a", "<|eot_id|>"], "token_type": [3, 3, 1, 3], "eos_token_id": 1}
CASES = (
    *("llama", "llama_tied_one_kv_head", "llama_biases_wide_heads", "llama_no_groups", "llama_linear", "llama_yarn"),
    *("qwen2", "qwen3", "qwen3_moe", "smollm3", "olmo2", "granite", "gemma", "gemma2", "gemma3"),
    *("mixtral", "mistral_full", "ministral3", "phi3", "phi3_window_partial", "phi3_longrope"),
)


CHANGES: Mapping[str, Mapping[str, Any]] = {
    "llama_no_groups": {"hidden_act": "silu"},
    "qwen3_moe": {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1, "attention_bias": False},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.6,
        }
    },
    "gemma": {"hidden_act": "gelu_pytorch_tanh", "attention_bias": False},
    "gemma2": {"query_pre_attn_scalar": 12, "head_dim": 12},
    "gemma3": {"query_pre_attn_scalar": 20, "head_dim": 20, "num_hidden_layers": 7, "sliding_window_pattern": 6},
}
"""Traits that no such file has."""


def make(case: str, folder: Path, change: Callable[[gguf.GGUFWriter], object] = lambda writer: None) -> Path:
    """A GGUF file beside the same model's folder."""
    file = folder / f"{case}.gguf"
    gguf_files.write(tiny.save(case, folder / case, **CHANGES.get(case, {})), file, TOKENS, change)
    return file


def load(location: Path) -> Decoder:
    return load_decoder(location, load_spec(location), torch.float32, CPU)


def comparable(spec: ModelSpec) -> ModelSpec:
    """Without what a GGUF file does not say, or says apart."""
    return msgspec.structs.replace(spec, num_tokens=None, bos_token_id=None, eos_token_ids=(), initializer_std=0.0)


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_the_checkpoint_that_it_was_made_from(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = make(case, tmp_path)
    load_spec(file)
    assert not [record for record in caplog.records if record.name.startswith("graphgen")], "a key that is not known"
    found, expected = load(file), load(tmp_path / case)
    assert comparable(found.spec) == comparable(expected.spec)
    weights = dict(expected.named_parameters())
    assert {name for name, _ in found.named_parameters()} == set(weights)
    for name, weight in found.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-6, msg=name)


def test_experts_of_files_of_before_have_a_tensor_each(tmp_path: Path) -> None:
    file, model = tmp_path / "one.gguf", tiny.save("mixtral", tmp_path / "hf")
    gguf_files.write(model, file, TOKENS, stacked=False)
    expected = dict(load(tmp_path / "hf").named_parameters())
    for name, weight in load(file).named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6, msg=name)


def test_another_factor_of_attention_than_the_lengths_give_is_kept(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop("phi3.rope.scaling.attn_factor")
        writer.add_rope_scaling_attn_factors(1.5)

    assert load_spec(make("phi3_longrope", tmp_path, change)).ropes[0].attention_factor == 1.5


@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_names_and_rows_are_those_that_transformers_reads(case: str, tmp_path: Path) -> None:
    file = make(case, tmp_path)
    model = tiny.build(case)
    expected = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    names = FAMILIES[load_spec(file).family].names
    found = {name: tensor for name, _, tensor in open_checkpoint(file).tensors(names, CPU, torch.float32)}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("number", [number for number in TENSOR_TYPES if number in dequant._DEQUANT])
def test_each_type_is_dequantised_as_transformers_does(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of random bytes, but for the scales, which are small numbers: 5 rows in slabs of 2."""
    kind, block, block_bytes = TENSOR_TYPES[number]
    generator = np.random.default_rng(number)
    blocks = generator.integers(0, 256, (5, 3, block_bytes), dtype=np.uint8)
    half = generator.normal(size=(5, 3, block_bytes // 2)).astype(np.float16).view(np.uint8)
    for place in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0, 2)):
        blocks[..., place : place + 2] = half[..., place : place + 2]
    file = tmp_path / "one.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("output.weight", blocks.reshape(5, -1), raw_dtype=Type(number))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(gguf_checkpoint, "_SLAB_BYTES", 4 * 3 * block * 2)
    names = FAMILIES["LlamaForCausalLM"].names
    ((name, _, found),) = open_checkpoint(file).tensors(names, CPU, torch.float32)
    expected = dequant.dequantize(torch.from_numpy(blocks.reshape(5, -1)), number, torch.float32)
    assert name == names.head
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(found, expected.reshape(found.shape), rtol=1e-6, atol=1e-6)


def test_a_quantised_file_is_computed_in_bfloat16_and_a_plain_one_as_it_is(tmp_path: Path) -> None:
    model = tiny.build("llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96)
    kinds = {Type.Q4_0: "bfloat16", Type.F32: "float32", Type.F16: "float16", Type.BF16: "bfloat16"}
    for quantised, dtype in kinds.items():
        gguf_files.write(model, tmp_path / "one.gguf", quantised=quantised)
        assert load_spec(tmp_path / "one.gguf").dtype == dtype


@pytest.mark.parametrize(("factor", "theta", "head_dim"), [(8.0, 500_000.0, 128), (32.0, 500_000.0, 64)])
def test_factors_of_a_rotation_become_llama_3s_scaling(
    factor: float, theta: float, head_dim: int, tmp_path: Path
) -> None:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": theta}
    sizes: dict[str, Any] = {
        "hidden_size": 2 * head_dim,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": head_dim,
    }
    model = tiny.save("llama", tmp_path / "hf", rope_parameters=scaling, max_position_embeddings=131072, **sizes)
    plain = theta ** -(np.arange(head_dim // 2) / (head_dim // 2))
    factors = (plain / ROPE_INIT_FUNCTIONS["llama3"](model.config, CPU)[0].numpy()).astype(np.float32)
    file = tmp_path / "one.gguf"
    gguf_files.write(model, file, change=lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    assert load_spec(file).ropes == load_spec(tmp_path / "hf").ropes
    load(file)
    gguf_files.write(model, file, change=lambda writer: writer.add_tensor("rope_freqs.weight", factors**1.1))
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight"):
        load_spec(file)

    def twice(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", factors)
        writer.add_rope_scaling_factor(2.0)

    gguf_files.write(model, file, change=twice)
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight and by llama\.rope\.scaling \(linear\)"):
        load_spec(file)


def test_every_token_that_ends_a_turn_ends_an_answer(tmp_path: Path) -> None:
    assert load_spec(make("llama", tmp_path)).eos_token_ids == (1, 3)


def test_unused_tokens_at_the_end_are_padding(tmp_path: Path) -> None:
    file, model = tmp_path / "one.gguf", tiny.build("llama")
    tokens = [*TOKENS["tokens"], "[PAD4]", "b", "[PAD6]", "[PAD7]"]
    gguf_files.write(model, file, {"tokens": tokens, "token_type": [3, 3, 1, 3, 5, 1, 5, 5]})
    assert load_spec(file).num_drawable == 6


def test_sampling_values_are_read(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_float32("general.sampling.temp", 0.6)
        writer.add_int32("general.sampling.top_k", 20)

    defaults = read_sampling_defaults(make("llama", tmp_path, change))
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (0.6, 20, 1.0)


def test_a_split_model_is_read_from_all_of_its_files(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "llama")
    whole = tmp_path / "whole.gguf"
    gguf_files.write(model, whole)
    tensors = list(gguf.GGUFReader(whole).tensors)
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    for file, part in ((first, tensors[::2]), (second, tensors[1::2])):
        writer = gguf.GGUFWriter(file, "llama")
        if file == first:
            gguf_files._add_config(writer, model.config)
        for tensor in part:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    expected = dict(load(whole).named_parameters())
    for name, weight in load(first).named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002\.gguf is missing"):
        load_spec(first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda writer: writer.add_expert_shared_count(1), r"llama\.expert_shared_count = 1"),
        (lambda writer: writer.add_tensor("rope_factors_long.weight", np.ones(4, np.float32)), "needs both in float32"),
        (lambda writer: writer.add_logit_scale(0.5), r"llama\.logit_scale = 0\.5"),
        (lambda writer: writer.add_rope_dimension_count(4), r"llama\.rope\.dimension_count = 4"),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "type = 'longrope'.*none, linear"),
        (lambda writer: writer.add_rope_scaling_yarn_log_mul(0.1), r"llama\.rope\.scaling\.yarn_log_multiplier = 0\.1"),
        (lambda writer: writer.add_float32("llama.rope.scale_alpha", 2.0), r"llama\.rope\.scale_alpha = 2\.0"),
        (lambda writer: writer.add_rope_scaling_attn_factors(0.5), r"llama\.rope\.scaling\.attn_factor = 0\.5"),
    ],
)
def test_a_trait_that_is_not_computed_is_refused_by_name(
    change: Callable[[gguf.GGUFWriter], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        load_spec(make("llama", tmp_path, change))


def test_a_tensor_without_a_place_is_refused_by_name(tmp_path: Path) -> None:
    file = make("llama", tmp_path, lambda writer: writer.add_tensor("blk.0.attn_sinks.weight", np.ones(6, np.float32)))
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_sinks\.weight"):
        load(file)


def test_other_architectures_and_types_are_refused_with_what_there_is(tmp_path: Path) -> None:
    file = tmp_path / "one.gguf"
    writer = gguf.GGUFWriter(file, "clip")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=f"'clip', graphgen reads GGUF files of {', '.join(ARCHITECTURES)}"):
        load_spec(file)
    writer = gguf.GGUFWriter(file, "llama")
    block = np.zeros((1, gguf.GGML_QUANT_SIZES[Type.IQ2_XXS][1]), np.uint8)
    writer.add_tensor("output.weight", block, raw_dtype=Type.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"'output\.weight' .* is of type IQ2_XXS, supported are F32, F16, Q4_0"):
        load_spec(file)


def test_a_broken_file_is_refused_wherever_it_breaks(tmp_path: Path) -> None:
    whole = make("llama", tmp_path).read_bytes()
    file = tmp_path / "cut.gguf"
    begin = min(tensor.begin for tensor in read_header(tmp_path / "llama.gguf").tensors.values())
    for size in [*range(0, begin, math.ceil(begin / 97)), len(whole) - 1]:
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="download it again"):
            read_header(file)
    generator = np.random.default_rng(0)
    for place in generator.integers(0, begin, 200):
        data = bytearray(whole)
        data[place : place + 8] = generator.bytes(8)
        file.write_bytes(data)
        try:
            read_header(file)
        except CheckpointError:
            continue


def _header(*tensors: tuple[bytes, tuple[int, ...], int]) -> bytes:
    """A file of float32 tensors: name, dimensions, offset. 1024 bytes of data."""
    entries = b"".join(
        struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)
        for name, shape, offset in tensors
    )
    return b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0) + entries + bytes(1024)


_ARRAY_OF_ARRAYS = struct.pack("<IQ", 9, 1)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (_header((b"a", (8,), 0), (b"a", (8,), 32)), "two tensors are called 'a'"),
        (_header((b"a", (8, 4), 0), (b"b", (8,), 96)), "'b' begins at byte .*, tensor 'a' ends at"),
        (_header((b"a", (8,), 2**40)), "ends at byte"),
        (_header((b"a", (0, 8), 0)), "the least size is 1"),
        (_header((b"a", (2**62, 2**62), 0)), "ends at byte"),
        (_header((b"a\xff", (8,), 0)), "utf-8"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "things follow"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "things follow"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**50), "things follow"),
        (b"GGUF" + struct.pack("<IQQQcI", 3, 0, 1, 1, b"k", 9) + _ARRAY_OF_ARRAYS * 20_000, "recursion"),
        (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 12, 500) + bytes(800), "4000 bytes"),
    ],
)
def test_a_hostile_header_is_refused_with_what_is_wrong(data: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "hostile.gguf"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{said}.*: download it again"):
        read_header(file)


def test_tensors_that_lie_apart_are_read(tmp_path: Path) -> None:
    file = tmp_path / "good.gguf"
    file.write_bytes(_header((b"b", (8,), 128), (b"a", (8, 4), 0)))
    assert {name: tensor.shape for name, tensor in read_header(file).tensors.items()} == {"a": (4, 8), "b": (8,)}


def test_the_package_that_dequantises_is_asked_for_with_the_way_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make("llama", tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    load_spec(file)
    with pytest.raises(CheckpointError, match="pip install gguf"):
        load(file)


def test_a_folder_of_gguf_files_is_refused_with_one_of_their_names(tmp_path: Path) -> None:
    file = make("llama", tmp_path)
    assert resolve_model(str(file)) == file
    with pytest.raises(CheckpointError, match=r"name the GGUF file, .*llama\.gguf"):
        load_spec(tmp_path)


def test_a_file_of_the_hub_is_named_with_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, file: str, revision: str | None) -> str:
        asked.append((repository, file, revision))
        return str(tmp_path / "file")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert resolve_model("owner/name/sub/model.Q4_K_M.gguf", "v1") == tmp_path / "file"
    assert asked == [("owner/name", "sub/model.Q4_K_M.gguf", "v1")]
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for absent in ("nobody/nothing/one.gguf", "absent.gguf", str(tmp_path / "absent.gguf")):
        with pytest.raises(CheckpointError, match="check the"):
            resolve_model(absent)
