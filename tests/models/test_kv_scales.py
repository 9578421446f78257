"""Scales of fp8 keys and values in a checkpoint: each tool's names, what they do, and what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graphgen.ipc.errors import CheckpointError, UnsupportedModelError
from graphgen.launch.config import EngineConfig
from graphgen.launch.resolve import resolve
from graphgen.models.decoder import Decoder
from graphgen.models.families import load_spec
from graphgen.models.formats.kv_scheme import kv_format_of
from graphgen.models.layers import Attention
from graphgen.models.loader import load_decoder
from tests.models import tiny
from tests.models.driver import Driver
from tests.models.edits import WEIGHTS, edit_config
from tests.models.formats.checkpoints import Packed, in_fp8, write
from tests.models.splits import tokens

ATTENTION = "model.layers.{layer}.self_attn."
LAYERS, KV_HEADS = 2, 3
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def save(folder: Path, scales: Mapping[str, Tensor], layers: int = LAYERS) -> None:
    """A tiny model; scales: of each of its first layers, by their names in its attention."""
    tiny.save("llama", folder, num_hidden_layers=LAYERS)
    tensors = load_file(folder / WEIGHTS)
    for layer in range(layers):
        for name, scale in scales.items():
            tensors[ATTENTION.format(layer=layer) + name] = (scale + layer).clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load(folder: Path, kept_as: str = "fp8") -> Decoder:
    return load_decoder(folder, load_spec(folder), torch.float32, torch.device("cpu"), kept_as=kept_as)


def logits(decoder: Decoder, kept_as: str | None) -> Tensor:
    driver = Driver(decoder, kept_as=kept_as)
    return driver.step([(driver.request(tokens(40)), 40)])[0]


ONE, EACH = torch.tensor(0.5), torch.tensor([0.5, 1.5, 2.5])


@pytest.mark.parametrize(
    ("scales", "k", "v"),
    [
        ({"k_scale": ONE, "v_scale": 2 * ONE}, ONE, 2 * ONE),
        ({"k_scale": EACH.view(3, 1, 1), "v_scale": ONE.view(1), "q_scale": ONE}, EACH, ONE),
        ({"k_proj.k_scale": ONE, "v_proj.v_scale": EACH, "k_zero_point": -torch.arange(1)}, ONE, EACH),
        ({"k_proj.output_scale": ONE, "v_proj.output_scale": ONE, "q_proj.output_scale": ONE}, ONE, ONE),
        ({"attn.k_scale": ONE.bfloat16(), "attn.v_scale": ONE.bfloat16()}, ONE, ONE),
        ({"kv_scale": EACH}, EACH, EACH),
    ],
)
def test_every_tools_names_reach_their_layers(scales: dict[str, Tensor], k: Tensor, v: Tensor, tmp_path: Path) -> None:
    zero_points = {name: scale for name, scale in scales.items() if name.endswith("zero_point")}
    save(tmp_path, {name: scale for name, scale in scales.items() if name not in zero_points})
    if zero_points:
        tensors = load_file(tmp_path / WEIGHTS)
        tensors |= {ATTENTION.format(layer=0) + name: scale for name, scale in zero_points.items()}
        save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    for number, layer in enumerate(load(tmp_path).decoder_layers):
        assert isinstance(layer.attention, Attention)
        assert torch.equal(layer.attention.k_scales, (k + number).expand(KV_HEADS))
        assert torch.equal(layer.attention.v_scales, (v + number).expand(KV_HEADS))


def test_values_beyond_the_range_of_fp8_need_their_scale(tmp_path: Path) -> None:
    """The same model with values a thousand times as large: what multiplies them is smaller by as much."""
    factor = 1024.0
    save(tmp_path, {"k_scale": ONE, "v_scale": ONE})
    tensors = load_file(tmp_path / WEIGHTS)
    for number in range(LAYERS):
        prefix = ATTENTION.format(layer=number)
        tensors[f"{prefix}v_proj.weight"] *= factor * 64
        tensors[f"{prefix}o_proj.weight"] /= factor * 64
        tensors[f"{prefix}v_scale"] = torch.tensor(factor)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    decoder = load(tmp_path)
    want, got = logits(decoder, None), logits(decoder, "fp8")
    for layer in decoder.decoder_layers:
        assert isinstance(layer.attention, Attention)
        layer.attention.v_scales.fill_(1.0)
    without = logits(decoder, "fp8")
    assert (got - want).norm() < 0.1 * (without - want).norm()


@pytest.mark.parametrize("beside", [False, True])
def test_scales_stand_beside_quantised_weights(beside: bool, tmp_path: Path) -> None:
    """As ModelOpt writes them, its config in a file of its own too."""

    def pack(module: str, weight: Tensor) -> Packed | None:
        made = in_fp8(weight, None, None)
        side = module.rpartition(".")[2].removesuffix("_proj")
        scale = {f"{side}_scale": torch.tensor({"k": 0.25, "v": 0.75}[side])} if side in ("k", "v") else {}
        return None if module == "lm_head" else made._replace(tensors={**made.tensors, **scale})

    config = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    folder = write(tmp_path, {"quant_method": "modelopt", **config}, pack).quantised
    if beside:
        edit_config(folder, quantization_config=None)
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": config}))
    assert load_spec(folder).kv_format == "fp8"
    for layer in load(folder).decoder_layers:
        assert isinstance(layer.attention, Attention)
        assert torch.equal(layer.attention.k_scales, torch.full((KV_HEADS,), 0.25))
        assert torch.equal(layer.attention.v_scales, torch.full((KV_HEADS,), 0.75))


@pytest.mark.parametrize(
    ("scales", "layers", "message"),
    [
        ({"k_scale": ONE, "v_scale": ONE}, 1, "2 scales of keys and values and none for the k of layer 1"),
        ({"k_scale": ONE}, 2, "2 scales of keys and values and none for the v of layer 0"),
        ({"k_scale": torch.zeros(1), "v_scale": ONE}, 2, "a scale is above 0 and finite"),
        ({"k_scale": ONE * torch.nan, "v_scale": ONE}, 2, "a scale is above 0 and finite"),
        ({"k_scale": torch.ones(2), "v_scale": ONE}, 2, "holds 2 scales for 3 KV heads"),
        ({"k_scale": ONE, "k_proj.k_scale": ONE, "v_scale": ONE}, 2, "which mean the same"),
        ({"k_scale": ONE, "v_scale": ONE, "k_zero_point": ONE}, 2, "is not zero, keys and values have no zero points"),
        ({"k_scales": ONE}, 2, "has no place in a LlamaForCausalLM"),
    ],
)
def test_scales_that_no_layer_can_take_are_refused(
    scales: dict[str, Tensor], layers: int, message: str, tmp_path: Path
) -> None:
    save(tmp_path, scales, layers)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_checkpoint_that_asks_for_fp8_gets_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, {"k_scale": ONE, "v_scale": ONE})
    assert load_spec(tmp_path).kv_format is None
    edit_config(tmp_path, quantization_config={"quant_method": "compressed-tensors", "kv_cache_scheme": SCHEME})
    spec = load_spec(tmp_path)

    def chosen(asked_for: str) -> str:
        return resolve(EngineConfig(device="cpu", kv_cache_dtype=asked_for), spec, tmp_path).kv_format  # type: ignore[arg-type]  # a name

    assert [chosen(name) for name in ("auto", "fp8", "int8", "float32")] == ["fp8", "fp8", "int8", "float32"]
    load(tmp_path, "fp8")
    assert not caplog.text
    load(tmp_path, "float32")
    assert "brings scales of fp8 keys and values, which kv_cache_dtype='fp8' would use" in caplog.text
    save(tmp_path, {})
    edit_config(tmp_path, quantization_config={"quant_method": "compressed-tensors", "kv_cache_scheme": SCHEME})
    load(tmp_path, "fp8")
    assert "asks for fp8 keys and values and brings no scales: they are 1" in caplog.text


@pytest.mark.parametrize(
    "config",
    [
        {"kv_cache_scheme": SCHEME},
        {"kv_cache_scheme": "static"},
        {"kv_cache_quant_algo": "FP8"},
        {"quantization": {"kv_cache_quant_algo": "FP8", "quant_algo": "FP8"}},
        {"kv_cache_scheme": {**SCHEME, "strategy": "attn_head"}},
    ],
)
def test_every_tools_words_for_fp8(config: dict[str, object]) -> None:
    assert kv_format_of(config, "x") == "fp8"


@pytest.mark.parametrize(
    "config",
    [
        {"kv_cache_scheme": {**SCHEME, "type": "int"}},
        {"kv_cache_scheme": {**SCHEME, "num_bits": 4}},
        {"kv_cache_scheme": {**SCHEME, "dynamic": True}},
        {"kv_cache_scheme": {**SCHEME, "symmetric": False}},
        {"kv_cache_scheme": {**SCHEME, "strategy": "channel"}},
        {"kv_cache_quant_algo": "NVFP4"},
    ],
)
def test_other_schemes_are_refused_by_name(config: dict[str, object]) -> None:
    with pytest.raises(UnsupportedModelError, match="'x' asks for keys and values with kv_cache"):
        kv_format_of(config, "x")


def test_a_config_without_a_scheme_asks_for_nothing() -> None:
    assert kv_format_of(None, "x") is None
    assert kv_format_of({"quant_method": "fp8", "kv_cache_scheme": None, "kv_cache_quant_algo": "none"}, "x") is None
