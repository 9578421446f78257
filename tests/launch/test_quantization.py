"""What `quantization` makes of a model, where it is refused, and what of the choice the other parts are told."""

from typing import Any

import msgspec
import pytest
import torch

from graphgen import ConfigError, EngineConfig, demo
from graphgen.commands.describe import decisions
from graphgen.launch.launch_config import LaunchConfig
from graphgen.launch.resolve import resolve
from graphgen.launch.step_times_store import StepTimesKey
from graphgen.models.families import load_spec
from graphgen.models.loader import load_decoder
from graphgen.models.spec import LinearFormat, ModelSpec, format_at_load
from tests.fakes import READY

FOLDER = demo.model_folder()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return load_spec(FOLDER)


def launch_of(spec: ModelSpec, **settings: str) -> LaunchConfig:
    return resolve(EngineConfig(**{"device": "cpu", **settings}), spec, FOLDER)  # type: ignore[arg-type]  # of a test


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_every_linear_layer_is_quantised_and_the_ends_are_not(spec: ModelSpec, kind: str) -> None:
    launch = launch_of(spec, quantization=kind)
    assert all(place.format is not None and place.format.storage == kind for place in launch.spec.linears)
    decoder = load_decoder(FOLDER, launch.spec, torch.bfloat16, CPU)
    assert decoder.embedding.weight.dtype == torch.bfloat16
    held = sum(weight.nbytes for weight in decoder.parameters())
    # torch's product of int4 on the CPU has a scale and a zero of two bytes each.
    assert launch.spec.weight_bytes("bfloat16") <= held <= 1.02 * launch.spec.weight_bytes("bfloat16")
    assert held < {"int8": 0.60, "int4": 0.45}[kind] * spec.weight_bytes("bfloat16"), "an eighth is the embedding"


@pytest.mark.parametrize(("num_columns", "group"), [(4096, 128), (704, 64), (96, 32), (80, 32)])
def test_int4_groups_are_the_widest_that_divide_the_columns(num_columns: int, group: int) -> None:
    form = format_at_load("int4", num_columns)
    assert form is not None
    assert form.group == group


def test_an_odd_number_of_columns_stays_as_it_is() -> None:
    assert format_at_load("int4", 95) is None


def test_quantised_weights_make_the_cpu_compute_in_bfloat16(spec: ModelSpec) -> None:
    """torch's products of them take it; who asks for another dtype gets that."""
    assert launch_of(spec).dtype == "float32"
    assert launch_of(spec, quantization="int8").dtype == "bfloat16"
    assert launch_of(spec, quantization="int8", dtype="float32").dtype == "float32"


def test_fp8_needs_a_gpu(spec: ModelSpec) -> None:
    with pytest.raises(ConfigError, match="quantization is 'fp8', which the CPU cannot multiply: use int8"):
        launch_of(spec, quantization="fp8")
    on_cuda = launch_of(spec, quantization="fp8", device="cuda")
    assert on_cuda.spec.formats == {LinearFormat(storage="e4m3", activation="e4m3"): 20}


def test_what_is_quantised_already_is_not_quantised_again(spec: ModelSpec) -> None:
    stored = spec.with_formats(lambda _, place: LinearFormat(storage="int4", group=64))
    with pytest.raises(ConfigError, match=r"quantization is 'int8', .* quantised already \(int4 g64\): leave it out"):
        launch_of(stored, quantization="int8")
    assert launch_of(stored).spec.formats == stored.formats


def test_the_cpu_gets_fp8_weights_dequantised(spec: ModelSpec) -> None:
    stored = spec.with_formats(
        lambda number, place: LinearFormat(storage="e4m3") if number else format_at_load("int8", 8)
    )
    assert launch_of(stored).spec.formats == {LinearFormat(storage="int8"): 4}
    assert len(launch_of(stored, device="cuda").spec.formats) == 2


def test_step_times_of_other_formats_are_others(spec: ModelSpec) -> None:
    ready = READY.worker
    keys = {
        StepTimesKey.of(launch, ready).digest
        for launch in (launch_of(spec, device="cuda", quantization=kind) for kind in ("fp8", "int8", "int4"))
    }
    keys.add(StepTimesKey.of(launch_of(spec, device="cuda"), ready).digest)
    assert len(keys) == 4


def test_info_says_how_many_layers_are_in_which_format(spec: ModelSpec) -> None:
    config = EngineConfig(device="cpu", quantization="int4")
    launch = resolve(config, spec, FOLDER)
    (weights,) = [one for one in decisions(config, launch, READY) if one.what == "weights"]
    assert weights.value == f"{launch.spec.weight_bytes('bfloat16') / 2**20:.0f} MiB"
    assert "15 linear layers in int4 g128 with zeros, 5 linear layers in int4 g64 with zeros: you asked" in weights.why


def test_random_weights_of_a_format_are_those_of_an_untrained_model(spec: ModelSpec) -> None:
    for kind, storage in (("fp8", "e4m3"), ("int8", "int8"), ("int4", "int4")):
        quantised = spec.with_formats(lambda _, place, kind=kind: format_at_load(kind, place.num_columns))  # type: ignore[misc]
        decoder = load_decoder(FOLDER, quantised, torch.float32, CPU, "dummy")
        linear: Any = decoder.decoder_layers[0].mlp.down
        assert linear.format is not None
        assert linear.format.storage == storage
        made = linear(torch.eye(linear.in_features))
        assert float(made.std()) == pytest.approx(spec.initializer_std, rel=0.05)


def test_the_launch_file_carries_the_formats(spec: ModelSpec) -> None:
    launch = launch_of(spec, quantization="int4")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(launch), type=LaunchConfig) == launch
