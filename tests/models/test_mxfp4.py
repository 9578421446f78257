"""MXFP4 becomes the numbers that transformers makes of it, and a checkpoint in it the model that it stands for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from graphgen.models.families import load_spec
from graphgen.models.loader import load_decoder
from graphgen.models.mxfp4 import unpack
from tests.models import tiny
from tests.models.driver import Driver
from tests.models.splits import assert_equal_at_every_split


def packed(num_experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Every byte among the blocks, exponents around those of weights."""
    shape = (num_experts, rows, columns // 32)
    count = num_experts * rows * columns // 2
    blocks = torch.arange(count).remainder(256)[torch.randperm(count)].to(torch.uint8).view(*shape, 16)
    return blocks, torch.randint(121, 126, shape, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_those_of_transformers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    blocks, scales = packed(3, 10, 64)
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert torch.equal(unpack(blocks, scales, dtype), wanted)
    assert wanted.unique().numel() > 30


@pytest.mark.parametrize("in_two_files", [False, True])
def test_a_checkpoint_in_mxfp4_is_the_model_that_it_stands_for(in_two_files: bool, tmp_path: Path) -> None:
    model = tiny.save("gpt_oss", tmp_path, hidden_size=64, intermediate_size=32)
    whole = tmp_path / "model.safetensors"
    tensors = load_file(whole)
    for number, layer in enumerate(model.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            stored, weight = f"model.layers.{number}.mlp.experts.{name}", getattr(layer.mlp.experts, name)
            num_experts, columns, rows = weight.shape
            blocks, scales = packed(num_experts, rows, columns)
            weight.data.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
            del tensors[stored]
            tensors |= {f"{stored}_blocks": blocks, f"{stored}_scales": scales}
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if in_two_files:
        whole.unlink()
        shards = {name: f"{'a' if name.endswith('_scales') else 'b'}.safetensors" for name in tensors}
        for shard in set(shards.values()):
            save_file({name: tensors[name] for name in tensors if shards[name] == shard}, tmp_path / shard)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    else:
        save_file(tensors, whole)
    decoder = load_decoder(tmp_path, load_spec(tmp_path), torch.float32, torch.device("cpu"))
    assert_equal_at_every_split(model, Driver(decoder))
