"""Checkpoints that the package compressed-tensors packs mean what that package says; which modules are quantised."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graphgen.ipc.errors import CheckpointError
from graphgen.models.families import load_spec
from graphgen.models.formats.readers.compressed_tensors import CompressedTensorsReader
from graphgen.models.spec import LinearFormat
from tests.models.edits import edit
from tests.models.formats.checkpoints import Packed, Pair, write
from tests.models.formats.test_readers import E4M3, SIZES, check

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import (
    NaiveQuantizationCompressor,
    PackedQuantizationCompressor,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

FLOAT = {"num_bits": 8, "type": "float"}
DYNAMIC = {**FLOAT, "strategy": "token", "dynamic": True}


def weights(**settings: Any) -> dict[str, Any]:
    return {"num_bits": 4, "type": "int", "symmetric": True, **settings}


CASES: Mapping[str, tuple[dict[str, Any], str, LinearFormat]] = {
    "fp8 channel": (
        {"weights": {**FLOAT, "strategy": "channel"}, "input_activations": DYNAMIC},
        "float-quantized",
        E4M3,
    ),
    "fp8 tensor": ({"weights": {**FLOAT, "strategy": "tensor"}, "input_activations": DYNAMIC}, "float-quantized", E4M3),
    "fp8 block": (
        {"weights": {**FLOAT, "strategy": "block", "block_structure": [32, 32]}, "input_activations": DYNAMIC},
        "float-quantized",
        LinearFormat(storage="e4m3", rows=32, group=32, activation="e4m3"),
    ),
    "fp8 weights alone": (
        {"weights": {**FLOAT, "strategy": "channel"}},
        "naive-quantized",
        LinearFormat(storage="e4m3"),
    ),
    "int8 channel": (
        {"weights": weights(num_bits=8, strategy="channel")},
        "int-quantized",
        LinearFormat(storage="int8"),
    ),
    "int8 with zeros": (
        {"weights": weights(num_bits=8, strategy="channel", symmetric=False)},
        "int-quantized",
        LinearFormat(storage="int8", zeros=True),
    ),
    "int4 group": (
        {"weights": weights(strategy="group", group_size=32)},
        "pack-quantized",
        LinearFormat(storage="int4", group=32, scale_dtype="bfloat16"),
    ),
    "int4 group with zeros": (
        {"weights": weights(strategy="group", group_size=32, symmetric=False)},
        "pack-quantized",
        LinearFormat(storage="int4", group=32, scale_dtype="bfloat16", zeros=True),
    ),
    "int4 in a static order": (
        {"weights": weights(strategy="group", group_size=32, actorder="static")},
        "pack-quantized",
        LinearFormat(storage="int4", group=32, scale_dtype="bfloat16"),
    ),
    "int4 channel": ({"weights": weights(strategy="channel")}, "pack-quantized", LinearFormat(storage="int4")),
    "int8 packed": (
        {"weights": weights(num_bits=8, strategy="group", group_size=32, symmetric=False)},
        "pack-quantized",
        LinearFormat(storage="int8", group=32, scale_dtype="bfloat16", zeros=True),
    ),
}


def reduced(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """(least, greatest) of what each scale is for, shaped as scales are."""
    rows, columns = weight.shape
    match str(args.strategy):
        case "tensor":
            parts = weight.reshape(1, 1, -1)
        case "channel":
            parts = weight.reshape(rows, 1, -1)
        case "group":
            parts = weight.reshape(rows, columns // args.group_size, -1)
        case _:
            high, wide = args.block_structure
            padded = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % high))
            parts = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).transpose(1, 2).flatten(2)
    least, most = parts.amin(-1), parts.amax(-1)
    return (least[0], most[0]) if str(args.strategy) == "tensor" else (least, most)


def pack(weight: Tensor, scheme: QuantizationScheme, kind: str) -> Packed:
    compressor = PackedQuantizationCompressor if kind == "pack-quantized" else NaiveQuantizationCompressor
    scale, zeros = calculate_qparams(*reduced(weight, scheme.weights), scheme.weights)
    scale = scale.bfloat16()  # the model's dtype, as its writers keep it
    state = {"weight": weight, "weight_scale": scale}
    if not scheme.weights.symmetric:
        state["weight_zero_point"] = zeros.to(torch.int8)
    made = compressor.compress(state, scheme)
    return Packed(made, compressor.decompress({**made, "weight_scale": scale.float()}, scheme)["weight"])


def checkpoint(folder: Path, group: dict[str, Any], kind: str, **config: Any) -> Pair:
    scheme = QuantizationScheme(targets=["Linear"], **group)
    written = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format=kind).to_dict()
    written = {**written, "quantization_status": "compressed", **config}
    return write(
        folder, written, lambda module, weight: None if module == "lm_head" else pack(weight, scheme, kind), **SIZES
    )


@pytest.mark.parametrize("case", CASES)
def test_a_packed_checkpoint_means_what_its_package_says(case: str, tmp_path: Path) -> None:
    group, kind, form = CASES[case]
    check(checkpoint(tmp_path, group, kind), form)


def test_a_missing_scale_is_an_error(tmp_path: Path) -> None:
    group, kind, _ = CASES["int4 group"]
    pair = checkpoint(tmp_path, group, kind)
    name = "model.layers.1.self_attn.k_proj"
    edit(pair.quantised, lambda tensors: tensors.pop(f"{name}.weight_scale"))
    with pytest.raises(CheckpointError, match=rf"tensor {name}.weight_scale is missing, though {name} is quantised"):
        load_spec(pair.quantised)


def reader(groups: dict[str, Any], ignore: list[str]) -> CompressedTensorsReader:
    return CompressedTensorsReader.of({"config_groups": groups, "ignore": ignore, "format": "pack-quantized"})


def test_targets_and_ignored_modules_are_names_patterns_or_a_class() -> None:
    int4 = {"weights": weights(strategy="group", group_size=64)}
    int8 = {"weights": weights(num_bits=8, strategy="channel")}
    groups = {"a": {**int4, "targets": [r"re:.*mlp\..*", "model.layers.0.o"]}, "b": {**int8, "targets": ["Linear"]}}
    found = reader(groups, ["lm_head", r"re:model\.layers\.3\..*", "model.layers.2.mlp.up"])

    def storage(module: str) -> str | None:
        form = found.expected(module)
        return None if form is None else form.storage

    assert storage("model.layers.0.mlp.up") == "int4"
    assert storage("model.layers.0.o") == "int4"
    assert storage("model.layers.0.q") == "int8"
    assert storage("model.layers.2.mlp.up") is None
    assert storage("model.layers.3.q") is None
    assert storage("lm_head") is None
    assert reader({"FP8_BLOCK": ["Linear"]}, []).expected("model.layers.0.q") == LinearFormat(
        storage="e4m3", rows=128, group=128, activation="e4m3"
    )
