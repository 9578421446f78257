"""Experts keep the format of their checkpoint or of --quantization, and compute what their dequantised weights do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from graphgen.ipc.errors import CheckpointError, ConfigError
from graphgen.models.experts.block import MixtureOfExperts
from graphgen.models.experts.operator import run_experts
from graphgen.models.families import load_spec
from graphgen.models.formats.layout import dequantised
from graphgen.models.formats.linear import LinearStack
from graphgen.models.loader import load_decoder
from graphgen.models.spec import WHOLE, Experts, LinearFormat, Router, Shard, format_at_load
from tests.models import tiny
from tests.models.edits import edit
from tests.models.expert_cases import make, quantised_like
from tests.models.format_cases import FORMATS
from tests.models.formats.checkpoints import Packed, in_awq, in_fp8, in_gptq, write
from tests.models.formats.test_readers import BLOCKS, CPU, E4M3, FP8, check, layers_only, logits, per_tensor

SIZES: dict[str, Any] = {"hidden_size": 96, "moe_intermediate_size": 160, "num_experts": 5, "mlp_only_layers": []}
"""No multiple of 64 or of 128."""
KEPT = [form for form in FORMATS.values() if not form.permuted]


def sizes(experts_size: int = 160) -> dict[str, Any]:
    return {**SIZES, "moe_intermediate_size": experts_size, "num_attention_heads": 6, "num_key_value_heads": 2}


@pytest.mark.parametrize("form", KEPT, ids=lambda form: form.name)
def test_the_operator_computes_what_its_dequantised_weights_do(form: LinearFormat) -> None:
    plain = make(20, hidden=96, size=160 if form.rows == 1 else 128, biases=True, every_third_row_dead=True)
    if form.rows > 1:
        plain = make(20, hidden=128, size=128, biases=True, every_third_row_dead=True)
    quantised, meant = quantised_like(plain, form)
    got, want = run_experts(*quantised.arguments), run_experts(*meant.arguments)
    got, want = plain.of_experts(got), plain.of_experts(want)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.std()))


# --- checkpoints -----------------------------------------------------------------------------------------------


def stacks(folder: Path, layer: int = 0) -> tuple[LinearStack, LinearStack]:
    decoder = load_decoder(folder, load_spec(folder), torch.float32, CPU)
    block = decoder.decoder_layers[layer].mlp
    assert isinstance(block, MixtureOfExperts)
    return block.gate_up, block.down


def test_gate_and_up_of_every_expert_keep_the_scale_of_their_tensor(tmp_path: Path) -> None:
    def pack(module: str, weight: Tensor) -> Packed | None:
        return None if module == "lm_head" else in_fp8(weight * (8.0 if "up_proj" in module else 1.0), None, None)

    pair = write(tmp_path, FP8, pack, case="qwen3_moe", **sizes())
    check(pair, E4M3)
    gate_up, down = stacks(pair.quantised)
    assert gate_up.weight.dtype == down.weight.dtype == torch.float8_e4m3fn
    assert gate_up.scale is not None
    assert len(gate_up.scale.unique()) == 2 * 5


def test_blocks_of_experts(tmp_path: Path) -> None:
    """128 divides one expert's rows of gate, 384, and not the other model's, 160: there each row has scales."""
    pack = layers_only(lambda weight: in_fp8(weight, 128, 128, "weight_scale_inv"))
    config = {**FP8, "weight_block_size": [128, 128]}
    pair = write(tmp_path / "whole", config, pack, case="qwen3_moe", **sizes(384) | {"hidden_size": 384})
    check(pair, BLOCKS)
    assert [stack.format for stack in stacks(pair.quantised)] == [BLOCKS, BLOCKS]
    pair = write(tmp_path / "cut", config, pack, case="qwen3_moe", **sizes(160) | {"hidden_size": 384})
    check(pair, BLOCKS)
    assert [stack.format for stack in stacks(pair.quantised)] == [replace(BLOCKS, rows=1), BLOCKS]


def test_a_shared_expert_beside_them(tmp_path: Path) -> None:
    pair = write(
        tmp_path,
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        layers_only(lambda weight: in_awq(weight, 32)),
        case="qwen2_moe",
        **{"hidden_size": 96, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 160},
        **{"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 96},
    )
    check(pair, LinearFormat(storage="int4", group=32, scale_dtype="float16", zeros=True))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq(bits: int, symmetric: bool, tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": symmetric, "desc_act": False}
    pair = write(
        tmp_path, config, layers_only(lambda weight: in_gptq(weight, bits, 32, symmetric)), case="qwen3_moe", **sizes()
    )
    storage: Any = "int4" if bits == 4 else "int8"
    check(pair, LinearFormat(storage=storage, group=32, scale_dtype="float16", zeros=not symmetric))
    assert all(stack.format is not None for stack in stacks(pair.quantised))


def test_experts_with_orders_of_their_own_are_dequantised(tmp_path: Path) -> None:
    """Each has its columns in an order of its own (desc_act), which all of them cannot have in one weight."""
    orders = iter(torch.randperm(96, generator=torch.Generator().manual_seed(seed)) for seed in range(1000))
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True}

    def pack(module: str, weight: Tensor) -> Packed | None:
        own = next(orders) if ".experts." in module and weight.shape[1] == 96 else None
        return None if module == "lm_head" else in_gptq(weight, 4, 32, True, order=own)

    pair = write(tmp_path, config, pack, case="qwen3_moe", **sizes())
    check(pair, LinearFormat(storage="int4", group=32, scale_dtype="float16", permuted=True))
    assert [stack.format for stack in stacks(pair.quantised)] == [None, None]


def test_experts_of_several_formats_are_dequantised(tmp_path: Path) -> None:
    """One expert was left out."""

    def pack(module: str, weight: Tensor) -> Packed | None:
        return None if module == "lm_head" or ".experts.3." in module else per_tensor(weight)

    pair = write(tmp_path, FP8, pack, case="qwen3_moe", **sizes())
    check(pair, E4M3)
    assert [stack.format for stack in stacks(pair.quantised)] == [None, None]


@pytest.mark.parametrize(
    ("config", "pack", "part"),
    [
        (FP8, per_tensor, "weight_scale"),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
            lambda weight: in_awq(weight, 32),
            "qzeros",
        ),
    ],
)
def test_a_missing_scale_of_one_expert_is_refused_by_name(
    config: dict[str, Any], pack: Callable[[Tensor], Packed], part: str, tmp_path: Path
) -> None:
    pair = write(tmp_path, config, layers_only(pack), case="qwen3_moe", **sizes())
    name = f"model.layers.1.mlp.experts.3.down_proj.{part}"
    edit(pair.quantised, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.") + " is missing"):
        logits(pair.quantised)


# --- quantised as they are loaded ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("case", ["qwen3_moe", "gpt_oss"])
def test_experts_are_quantised_as_they_are_loaded(kind: Any, case: str, tmp_path: Path) -> None:
    """gpt-oss stores all experts of a layer in one tensor, transposed, with rows of gate and up in turn."""
    tiny.save(case, tmp_path, **(sizes() if case == "qwen3_moe" else {}))
    plain = load_decoder(tmp_path, load_spec(tmp_path), torch.float32, CPU)
    spec = load_spec(tmp_path).with_formats(lambda _, place: format_at_load(kind, place.num_columns))
    decoder = load_decoder(tmp_path, spec, torch.float32, CPU)
    for name, own in decoder.named_modules():
        if isinstance(own, LinearStack):
            assert own.format is not None
            whole: Any = plain.get_submodule(name)
            worth = dequantised(own.rows(0, own.out_features), torch.float32)
            limit = {"fp8": 0.04, "int8": 0.012, "int4": 0.15}[kind]
            assert ((worth - whole.weight).norm() / whole.weight.norm()).item() < limit


@pytest.mark.parametrize(("kind", "share"), [("fp8", 0.57), ("int8", 0.57), ("int4", 0.36)])
def test_experts_take_as_few_bytes_as_their_format_says(kind: Any, share: float) -> None:
    """In the shape of Qwen3-30B-A3B, of the whole block with its router, against bfloat16."""
    experts = Experts(num_experts=128, top_k=8, size=768, activation="silu", router=Router())

    def num_bytes(spec: Experts) -> int:
        with torch.device("meta"):
            block = MixtureOfExperts(spec, 2048, torch.bfloat16, WHOLE)
        return sum(parameter.nbytes for parameter in block.parameters())

    formats = {f"{name}_format": format_at_load(kind, columns) for name, columns in (("gate_up", 2048), ("down", 768))}
    assert num_bytes(replace(experts, **formats)) <= share * num_bytes(experts)


def test_a_rank_has_its_columns_of_quantised_experts() -> None:
    form = LinearFormat(storage="int4", group=32)
    spec = Experts(
        num_experts=3, top_k=1, size=128, activation="silu", router=Router(), gate_up_format=form, down_format=form
    )
    block = MixtureOfExperts(spec, 96, torch.float32, Shard(1, 2))
    assert (block.gate_up.format, block.down.format, block.down.in_features) == (form, form, 64)
    with pytest.raises(ConfigError, match="the down projection of experts is int4 g32, of which 2 ranks"):
        replace(spec, size=80).shared_by(2)
