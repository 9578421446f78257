"""Quantised checkpoints that are not read, or not whole, are refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graphgen.ipc.errors import CheckpointError, UnsupportedModelError
from graphgen.models.families import load_spec
from graphgen.models.formats.readers.table import open_reader
from graphgen.models.loader import load_decoder
from tests.models.edits import edit, edit_config
from tests.models.formats.checkpoints import (
    Packed,
    in_awq,
    in_gptq,
    rounded,
    words_along_rows,
    write,
)
from tests.models.formats.test_readers import FP8, SIZES, layers_only, per_tensor

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}


def grouped(**changes: Any) -> dict[str, Any]:
    weights = {**INT4, **changes.pop("weights", {})}
    return {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": weights, **changes}}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, r"\(bitsandbytes\).*--quantization int8 or int4"),
    "gguf": ({"quant_method": "gguf"}, "name the GGUF file itself"),
    "another": ({"quant_method": "hqq"}, r"\(hqq\), graphgen reads fp8, compressed-tensors, modelopt, awq, gptq"),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo NVFP4"),
    "nvfp4 of compressed-tensors": ({**grouped(), "format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
    "mxfp4 of compressed-tensors": ({**grouped(), "format": "mxfp4-pack-quantized"}, "mxfp4-pack-quantized"),
    "a group's own format": (grouped(format="marlin-24"), "marlin-24"),
    "sparsity": ({**grouped(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "a sparsity_config"),
    "transforms": ({**grouped(), "transform_config": {"config_groups": {"u": {}}}}, "a transform_config"),
    "an order of groups": (grouped(weights={"actorder": "group"}), "actorder 'group'.*'static' or 'weight'"),
    "output activations": (grouped(output_activations={"num_bits": 8}), "output_activations"),
    "three bits": (grouped(weights={"num_bits": 3}), "3 bits of type int"),
    "four bits of floating point": (grouped(weights={"type": "float"}), "4 bits of type float"),
    "a strategy": (grouped(weights={"strategy": "tensor_group"}), "'tensor_group'"),
    "transforms of another kind": ({**grouped(), "transform_config": {"x": 1}}, "a transform_config"),
    "no weights": ({**grouped(), "config_groups": {"a": {"weights": None}}}, "without weights"),
    "an unknown preset": ({**grouped(), "config_groups": {"NVFP4": ["Linear"]}}, "scheme 'NVFP4'"),
    "not compressed": ({**grouped(), "quantization_status": "frozen"}, "quantization_status 'frozen'"),
    "AWQ's gemv": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "'gemv'.*version gemm"),
    "AWQ without zeros": ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": False}, "zero points"),
    "GPTQ of three bits": ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "GPTQ of 3 bits"),
    "GPTQ's marlin": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"},
        "'marlin'",
    ),
    "GPTQ without bits": ({"quant_method": "gptq", "group_size": 128}, "bits = None"),
    "a block that is none": (
        {"quant_method": "fp8", "weight_block_size": 128},
        "weight_block_size = 128: it must be two",
    ),
    "names that are one": ({"quant_method": "fp8", "ignored_layers": "lm_head"}, "ignored_layers = 'lm_head'.*a list"),
    "names that are none": ({**grouped(), "ignore": [1]}, r"ignore = \[1\]: it must be a list of names"),
    "a pattern that is none": ({**grouped(), "ignore": ["re:("]}, r"ignore = '\(': it must be a regular expression"),
    "groups of nothing": ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size = 0: it must be a number"),
    "AWQ's groups of nothing": ({"quant_method": "awq", "bits": 4, "group_size": 0}, "group_size = 0"),
    "groups without a size": (grouped(weights={"group_size": None}), "group_size = None"),
    "a word for false": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": "false"},
        "sym = 'false': it must be true or false",
    ),
    "a word for false in a scheme": (grouped(weights={"symmetric": "false"}), "symmetric = 'false'"),
    "groups that are a list": ({**grouped(), "config_groups": [1]}, r"config_groups = \[1\]: it must be an object"),
    "groups that are an empty list": (
        {**grouped(), "config_groups": []},
        r"config_groups = \[\]: it must be an object",
    ),
    "a group that is none": ({**grouped(), "config_groups": {"a": 3}}, "a = 3: it must be an object"),
    "exceptions that are a list": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": ["x"]},
        r"dynamic = \['x'\]",
    ),
    "an exception that is no pattern": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:(": {}}},
        r"dynamic = '\(': it must be a regular",
    ),
    "ModelOpt's names that are one": (
        {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "exclude_modules": "lm_head"}},
        "exclude_modules = 'lm_head'",
    ),
    "e5m2": ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_method_that_is_not_read_is_named(case: str) -> None:
    config, message = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=message):
        open_reader(config, "somewhere")


def test_mxfp4_is_for_a_family_that_says_so(tmp_path: Path) -> None:
    pair = write(tmp_path, {"quant_method": "mxfp4"}, lambda *_: None, **SIZES)
    with pytest.raises(UnsupportedModelError, match=r"quantised \(mxfp4\), which a LlamaForCausalLM"):
        load_spec(pair.quantised)


def test_a_config_that_is_no_object_is_named(tmp_path: Path) -> None:
    pair = write(tmp_path, FP8, lambda *_: None, **SIZES)
    edit_config(pair.quantised, quantization_config=4)
    with pytest.raises(UnsupportedModelError, match="quantization_config is 4"):
        load_spec(pair.quantised)


def test_transposed_matrices_are_not_read(tmp_path: Path) -> None:
    pair = write(tmp_path, FP8, lambda *_: None, case="gpt2")
    with pytest.raises(UnsupportedModelError, match=r"stored as \[in, out\]"):
        load_spec(pair.quantised)


NAME = "model.layers.1.mlp.up_proj"


def test_a_missing_scale_is_an_error(tmp_path: Path) -> None:
    """A weight in e4m3 without one would be 448 times too large, and look like a weight."""
    pair = write(tmp_path, FP8, layers_only(per_tensor), **SIZES)
    edit(pair.quantised, lambda tensors: tensors.pop(f"{NAME}.weight_scale"))
    with pytest.raises(CheckpointError, match=f"tensor {NAME}.weight_scale is missing"):
        load_spec(pair.quantised)


def test_scales_of_another_shape_are_an_error(tmp_path: Path) -> None:
    pair = write(tmp_path, FP8, layers_only(per_tensor), **SIZES)
    edit(pair.quantised, lambda tensors: tensors.update({f"{NAME}.weight_scale": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=f"tensor {NAME}.weight_scale .* has shape .3., a weight of 160 x 96"):
        load_spec(pair.quantised)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
INT4_OF_32 = {**grouped(weights={"group_size": 32, "symmetric": False}, targets=["Linear"]), "ignore": ["lm_head"]}


def packed(weight: Tensor) -> Packed:
    """As compressed-tensors packs, by the same words as GPTQ's."""
    made = rounded(weight, 4, torch.arange(weight.shape[1]) // 32, symmetric=False)
    tensors = {"weight_packed": words_along_rows(made.codes.t(), 4).t(), "weight_scale": made.scales}
    shape = {"weight_shape": torch.tensor(weight.shape)}
    return Packed(tensors | shape | {"weight_zero_point": words_along_rows(made.zeros, 4)}, made.worth)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
DAMAGED: dict[str, tuple[dict[str, Any], Callable[[Tensor], Packed], str, Callable[[Tensor], Tensor], str]] = {
    "words of 64 bits": (GPTQ, lambda w: in_gptq(w, 4, 32, False), "qweight", Tensor.long, "has dtype I64.* I32"),
    "zeros in float32": (GPTQ, lambda w: in_gptq(w, 4, 32, False), "qzeros", Tensor.float, "has dtype F32.* I32"),
    "groups in float32": (
        GPTQ,
        lambda w: in_gptq(w, 4, 32, False),
        "g_idx",
        Tensor.float,
        "has dtype F32.* I64",
    ),
    "codes of three dimensions": (AWQ, lambda w: in_awq(w, 32), "qweight", lambda t: t[None], "two dimensions"),
    "AWQ's zeros in bytes": (AWQ, lambda w: in_awq(w, 32), "qzeros", Tensor.byte, "has dtype U8.* I32"),
    "whole scales": (FP8, per_tensor, "weight_scale", Tensor.int, "has dtype I32.* F32 or BF16"),
    "a scale of nothing": (FP8, per_tensor, "weight_scale", lambda t: t * torch.nan, "a scale of .* not a finite"),
    "a scale without end": (AWQ, lambda w: in_awq(w, 32), "scales", lambda t: t / 0, "a scale of .* not a finite"),
    "packed words in float32": (INT4_OF_32, packed, "weight_packed", Tensor.float, "has dtype F32.* I32"),
    "packed zeros that are short": (INT4_OF_32, packed, "weight_zero_point", lambda t: t[:-1], r"asks for \[20, 3\]"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_part_of_another_dtype_or_shape_is_named(case: str, tmp_path: Path) -> None:
    """Words of 64 bits, or numbers in floating point, would be read as other codes without an error."""
    config, pack, part, change, message = DAMAGED[case]
    pair = write(tmp_path, config, layers_only(pack), **SIZES)
    load_decoder(pair.quantised, load_spec(pair.quantised), torch.float32, torch.device("cpu"))
    edit(pair.quantised, lambda tensors: tensors.update({f"{NAME}.{part}": change(tensors[f"{NAME}.{part}"])}))
    with pytest.raises(CheckpointError, match=message):
        load_decoder(pair.quantised, load_spec(pair.quantised), torch.float32, torch.device("cpu"))


def test_a_tensor_that_no_reader_takes_is_an_error(tmp_path: Path) -> None:
    """Left out in silence it could be a second scale."""
    pair = write(tmp_path, FP8, layers_only(per_tensor), **SIZES)
    edit(pair.quantised, lambda tensors: tensors.update({f"{NAME}.weight_scale_2": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=f"'{NAME}.weight_scale_2' .* has no place"):
        load_decoder(pair.quantised, load_spec(pair.quantised), torch.float32, torch.device("cpu"))


def test_codes_without_a_config_are_an_error(tmp_path: Path) -> None:
    pair = write(tmp_path, FP8, layers_only(per_tensor), **SIZES)
    edit_config(pair.quantised, quantization_config=None)
    with pytest.raises(CheckpointError, match=r"has (no place|dtype torch\.float8_e4m3fn)"):
        load_decoder(pair.quantised, load_spec(pair.quantised), torch.float32, torch.device("cpu"))


def test_groups_that_are_no_groups_are_an_error(tmp_path: Path) -> None:
    """33 columns of one group of 32: a damaged file, or another group size than the config's."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True}
    pair = write(tmp_path, config, layers_only(lambda weight: in_gptq(weight, 4, 32, True)), **SIZES)

    def move(tensors: dict[str, Tensor]) -> None:
        tensors[f"{NAME}.g_idx"][32] = 0

    edit(pair.quantised, move)
    with pytest.raises(CheckpointError, match=f"tensor {NAME}.g_idx does not deal the 96 columns into groups of 32"):
        load_decoder(pair.quantised, load_spec(pair.quantised), torch.float32, torch.device("cpu"))


def test_parts_with_their_inputs_in_different_orders_are_an_error(tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True}

    def pack(weight: Tensor) -> Packed:
        return in_gptq(weight, 4, 32, True, order=torch.randperm(weight.shape[1]))

    pair = write(tmp_path, config, layers_only(pack), **SIZES)
    with pytest.raises(CheckpointError, match="different orders"):
        load_decoder(pair.quantised, load_spec(pair.quantised), torch.float32, torch.device("cpu"))
