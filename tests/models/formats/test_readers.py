"""Quantised checkpoints of every kind compute what the same checkpoint does with its weights dequantised.

In float32, so nothing but a wrong bit, scale, zero, row or column can make a difference.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graphgen.models.families import load_spec
from graphgen.models.loader import load_decoder
from graphgen.models.spec import LinearFormat
from tests.models.driver import Driver
from tests.models.edits import edit, edit_config
from tests.models.formats.checkpoints import Pack, Packed, Pair, in_awq, in_fp8, in_gptq, write

CPU = torch.device("cpu")
TOKENS = [5, 9, 3, 77, 8, 41]
SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
"""No multiple of 64 or of 128; of the columns 160 is one of 32 alone."""


def logits(folder: Path) -> Tensor:
    driver = Driver(load_decoder(folder, load_spec(folder), torch.float32, CPU))
    return driver.step([(driver.request(TOKENS), len(TOKENS))])[0]


def formats_of(folder: Path) -> set[LinearFormat]:
    return set(load_spec(folder).formats)


def check(pair: Pair, *expected: LinearFormat) -> None:
    """Equal logits, and weights that are kept in these formats."""
    assert formats_of(pair.quantised) == set(expected)
    made, meant = logits(pair.quantised), logits(pair.plain)
    torch.testing.assert_close(made, meant, rtol=1e-4, atol=1e-4 * float(meant.std()))


def layers_only(pack: Callable[[Tensor], Packed]) -> Pack:
    return lambda module, weight: None if module == "lm_head" else pack(weight)


def per_tensor(weight: Tensor) -> Packed:
    return in_fp8(weight, None, None)


# --- fp8 -------------------------------------------------------------------------------------------------------

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
E4M3 = LinearFormat(storage="e4m3", activation="e4m3")
BLOCKS = LinearFormat(storage="e4m3", rows=128, group=128, activation="e4m3")


def test_parts_of_a_fused_layer_keep_the_scale_of_their_tensor(tmp_path: Path) -> None:
    """q, k and v have one scale each, of which the layer's rows have their own."""

    def pack(module: str, weight: Tensor) -> Packed | None:
        factor = 8.0 if module.endswith("k_proj") else 1.0
        made = in_fp8(weight * factor, None, None)
        return None if module == "lm_head" else made._replace(tensors={**made.tensors, "input_scale": torch.ones(1)})

    pair = write(tmp_path, {**FP8, "activation_scheme": "static"}, pack, **SIZES)
    check(pair, E4M3)
    decoder = load_decoder(pair.quantised, load_spec(pair.quantised), torch.float32, CPU)
    qkv: Any = decoder.decoder_layers[0].attention.qkv
    assert len(qkv.scale.unique()) == 3


def test_a_scale_may_be_a_number_without_dimensions(tmp_path: Path) -> None:
    def pack(weight: Tensor) -> Packed:
        made = in_fp8(weight, None, None)
        return made._replace(tensors={**made.tensors, "weight_scale": made.tensors["weight_scale"].reshape(())})

    check(write(tmp_path, FP8, layers_only(pack), **SIZES), E4M3)


def test_blocks_whose_edges_are_no_whole_ones(tmp_path: Path) -> None:
    """288 = 2 * 128 + 32 rows of q: those of k lie in no block of the layer's, which has scales by row then."""
    sizes = {**SIZES, "hidden_size": 288, "intermediate_size": 384}
    pack = layers_only(lambda weight: in_fp8(weight, 128, 128, "weight_scale_inv"))
    by_row = LinearFormat(storage="e4m3", group=128, activation="e4m3")
    pair = write(tmp_path, {**FP8, "weight_block_size": [128, 128]}, pack, **sizes)
    check(pair, BLOCKS)
    decoder = load_decoder(pair.quantised, load_spec(pair.quantised), torch.float32, CPU)
    layer: Any = decoder.decoder_layers[0]
    assert (layer.attention.qkv.format, layer.mlp.gate_up.format) == (by_row, BLOCKS)


def test_latents_and_experts_in_blocks(tmp_path: Path) -> None:
    """The matrices of latents are kept in blocks, or by row where a rotation moves rows."""
    pack = layers_only(lambda weight: in_fp8(weight, 16, 16, "weight_scale_inv"))
    pair = write(tmp_path, {**FP8, "weight_block_size": [16, 16]}, pack, case="deepseek_v3")
    check(pair, LinearFormat(storage="e4m3", rows=16, group=16, activation="e4m3"))


@pytest.mark.parametrize("beside", [False, True])
def test_modelopt(tmp_path: Path, beside: bool) -> None:
    """Its config stands in config.json, or in a file of its own."""
    inner = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}

    def pack(module: str, weight: Tensor) -> Packed | None:
        made = in_fp8(weight, None, None)
        scaled = module.rpartition(".")[2].removesuffix("_proj")
        extra = {f"{scaled}_scale": torch.ones(())} if scaled in ("k", "v") else {}
        tensors = {**made.tensors, "input_scale": torch.ones(()), **extra}
        return None if module == "lm_head" else made._replace(tensors=tensors)

    pair = write(tmp_path, {"quant_method": "modelopt", **inner}, pack, **SIZES)
    if beside:
        path = pair.quantised / "config.json"
        text = path.read_text()
        config = json.loads(text)
        del config["quantization_config"]
        path.write_text(json.dumps(config))
        (pair.quantised / "hf_quant_config.json").write_text(
            json.dumps({"producer": {"name": "modelopt"}, "quantization": inner})
        )
    check(pair, E4M3)


# --- AWQ and GPTQ ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, 64])
def test_awq(tmp_path: Path, group: int) -> None:
    """64 divides neither 96 nor 160: the last group is shorter."""
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    pair = write(tmp_path, config, layers_only(lambda weight: in_awq(weight, group)), **SIZES)
    check(pair, LinearFormat(storage="int4", group=group, scale_dtype="float16", zeros=True))


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq(tmp_path: Path, bits: int, symmetric: bool, version: str) -> None:
    """Zeros of symmetric weights are never read: here they are 8, less 1 in neither version."""
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": symmetric, "checkpoint_format": version}
    pack = layers_only(lambda weight: in_gptq(weight, bits, 32, symmetric, version))
    pair = write(tmp_path, {**config, "desc_act": False}, pack, **SIZES)
    storage: Any = "int4" if bits == 4 else "int8"
    check(pair, LinearFormat(storage=storage, group=32, scale_dtype="float16", zeros=not symmetric))


def test_gptq_in_the_order_of_activations(tmp_path: Path) -> None:
    """Parts of one layer share their order, as they share their input."""
    generator = torch.Generator().manual_seed(3)
    orders = {size: torch.randperm(size, generator=generator) for size in (96, 160)}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True}
    pack = layers_only(lambda weight: in_gptq(weight, 4, 32, True, order=orders[weight.shape[1]]))
    pair = write(tmp_path, config, pack, **SIZES)
    check(pair, LinearFormat(storage="int4", group=32, scale_dtype="float16", permuted=True))


def test_gptq_with_one_group_has_no_order(tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True, "desc_act": True}
    pair = write(tmp_path, config, layers_only(lambda weight: in_gptq(weight, 4, 2**20, True)), **SIZES)
    check(pair, LinearFormat(storage="int4", scale_dtype="float16"))


def test_modules_that_gptq_left_out_stay_as_they_are(tmp_path: Path) -> None:
    """One part of a fused layer is not quantised, so all of it is dequantised."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    left_out = r"-:model\.layers\.1\.mlp\.(up|down)_proj"

    def pack(module: str, weight: Tensor) -> Packed | None:
        skipped = module == "lm_head" or (".1.mlp." in module and "gate" not in module)
        return None if skipped else in_gptq(weight, 4, 32, True)

    pair = write(tmp_path, {**config, "dynamic": {left_out: {}}}, pack, **SIZES)
    check(pair, LinearFormat(storage="int4", group=32, scale_dtype="float16"))
    mlps = [layer.feed_forward for layer in load_spec(pair.quantised).layers]
    assert [mlp.gate_up_format is None for mlp in mlps] == [False, True, False]


# --- embedding and head ----------------------------------------------------------------------------------------


def test_a_quantised_head_is_dequantised(tmp_path: Path) -> None:
    check(write(tmp_path, FP8, lambda _, weight: in_fp8(weight, None, None), **SIZES), E4M3)


def test_a_quantised_head_of_a_tied_model_is_its_own(tmp_path: Path) -> None:
    """Written from the embedding, which is not quantised: the two differ by the rounding."""
    pair = write(
        tmp_path, FP8, layers_only(lambda weight: in_fp8(weight, None, None)), **SIZES, tie_word_embeddings=True
    )
    head = in_fp8(torch.randn(97, 96), None, None)
    edit(pair.quantised, lambda tensors: tensors.update({f"lm_head.{part}": it for part, it in head.tensors.items()}))
    edit(pair.plain, lambda tensors: tensors.update({"lm_head.weight": head.worth}))
    check(pair, E4M3)


def test_a_quantised_model_without_a_head_uses_its_embedding(tmp_path: Path) -> None:
    pair = write(
        tmp_path, FP8, layers_only(lambda weight: in_fp8(weight, None, None)), **SIZES, tie_word_embeddings=True
    )
    assert load_spec(pair.quantised).head.tied
    check(pair, E4M3)


# --- without weights -------------------------------------------------------------------------------------------


def test_random_weights_have_the_formats_of_the_config(tmp_path: Path) -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    pair = write(tmp_path, config, layers_only(lambda weight: in_awq(weight, 32)), **SIZES)
    stored = formats_of(pair.quantised)
    (pair.quantised / "model.safetensors").unlink()
    assert formats_of(pair.quantised) == stored
    spec = load_spec(pair.quantised)
    decoder = load_decoder(pair.quantised, spec, torch.float32, CPU, "dummy")
    assert all(weight.isfinite().all() for weight in decoder.parameters() if weight.is_floating_point())
    edit_config(pair.quantised, quantization_config={**config, "modules_to_not_convert": ["down_proj"]})
    assert [layer.feed_forward.down_format for layer in load_spec(pair.quantised).layers] == [None] * 3
