"""The stored step times: found by what they depend on, and passed over, never fatal, when they cannot be believed."""

import json
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from graphgen.base.version import __version__
from graphgen.demo import model_folder
from graphgen.ipc.worker_messages import Bucket, BucketTime, StepTimeTable, WorkerReady
from graphgen.launch.launch_config import LaunchConfig
from graphgen.launch.step_times_store import (
    StepTimesFile,
    StepTimesKey,
    load_step_times,
    save_step_times,
    step_times_path,
    stored_file,
)
from graphgen.models.spec import Norm, RopeSpec
from tests.worker.local_engine import launch_config

BUCKETS = (Bucket(0, 4), Bucket(12, 4))
TIMES = tuple(BucketTime(bucket, 0.1 + bucket.num_rows) for bucket in BUCKETS)
TABLE = StepTimeTable(TIMES, 100, 50, 1e-4 / 3, 2e-6, 3e-4)
READY = WorkerReady(
    device="NVIDIA H200",
    attention="flashinfer (prefill fa3, decode xqa, kernels prebuilt)",
    graphs=True,
    compiled=True,
    buckets=BUCKETS,
    max_chunks=4,
    num_pages=10,
    page_size=64,
    phases=(),
)


@pytest.fixture
def config() -> LaunchConfig:
    return launch_config(model_folder(), device="cpu")


def changed(base: Any, **values: Any) -> Any:  # Any: a Struct of any type
    return msgspec.structs.replace(base, **values)


def test_what_was_saved_is_found(tmp_path: Path, config: LaunchConfig) -> None:
    environment, key = {"GRAPHGEN_CACHE": str(tmp_path)}, StepTimesKey.of(config, READY)
    assert load_step_times(environment, key) is None
    path = save_step_times(environment, key, TABLE)
    assert path == step_times_path(environment, key)
    assert path.name.startswith("nvidia-h200-")
    assert load_step_times(environment, key) == TABLE
    assert stored_file(environment, key, TABLE) == path
    assert stored_file(environment, key, changed(TABLE, prompt_start=51)) is None
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert save_step_times(environment, key, changed(TABLE, prompt_start=51)) == path
    assert load_step_times(environment, key) == changed(TABLE, prompt_start=51)


def test_rare_buckets_that_were_never_captured_may_lack(tmp_path: Path, config: LaunchConfig) -> None:
    environment, key = {"GRAPHGEN_CACHE": str(tmp_path)}, StepTimesKey.of(config, READY)
    part = changed(TABLE, times=TABLE.times[:1])
    save_step_times(environment, key, part)
    assert load_step_times(environment, key) == part
    assert part.has(BUCKETS[:1])
    assert not part.has(BUCKETS)


def test_times_are_those_of_this_version(config: LaunchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the distribution is called: a name that no package has would have the times of every version."""
    assert StepTimesKey.of(config, READY).graphgen == __version__
    monkeypatch.setattr("graphgen.launch.step_times_store.__version__", "99.0")
    assert StepTimesKey.of(config, READY).graphgen == "99.0"


def test_everything_that_changes_the_time_changes_the_key(config: LaunchConfig) -> None:
    key = StepTimesKey.of(config, READY)
    others = [
        StepTimesKey.of(config, changed(READY, **change))
        for change in (
            {"device": "NVIDIA H100"},
            {"attention": "flashinfer (prefill fa2, decode fa2, kernels prebuilt)"},
            {"compiled": False},
            {"buckets": BUCKETS[:1]},
            {"page_size": 32},
        )
    ]
    others += [StepTimesKey.of(changed(config, **change), READY) for change in ({"dtype": "x"}, {"cpu_threads": 3})]
    spec, layer = config.spec, config.spec.layers[0]
    specs = [changed(spec, vocab_size=spec.vocab_size + 1), changed(spec, hidden_size=spec.hidden_size + 1)]
    layers = [changed(layer, feed_forward=changed(layer.feed_forward, size=layer.feed_forward.size + 1))]
    for name in ("num_heads", "num_kv_heads", "head_dim"):
        layers.append(changed(layer, mixer=changed(layer.mixer, **{name: getattr(layer.mixer, name) + 1})))
    specs += [changed(spec, layers=(*spec.layers, layer)), *(changed(spec, layers=(other,)) for other in layers)]
    others += [StepTimesKey.of(changed(config, spec=spec), READY) for spec in specs]
    digests = {other.digest for other in (key, *others)}
    assert len(digests) == len(others) + 1


def test_what_does_not_change_the_time_does_not_change_the_key(config: LaunchConfig) -> None:
    key = StepTimesKey.of(config, READY)
    layers = tuple(changed(layer, input_norm=Norm(eps=1e-3)) for layer in config.spec.layers)
    spec = changed(config.spec, layers=layers, eos_token_ids=(1, 2, 3), ropes=(RopeSpec(theta=1.0),))
    assert StepTimesKey.of(changed(config, spec=spec, num_pages=7, seed=3), changed(READY, num_pages=7)) == key
    built = "flashinfer (prefill fa3, decode xqa, kernels: 1 prebuilt, 1 built)"
    assert StepTimesKey.of(config, changed(READY, attention=built)) == key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 1}, "format"),
        ({"ms": {"0+4": 4.0, "0+5": 4.0}}, "measure again"),
        ({"ms": {"0+4": 4.0, "12+4": 0.0}}, "> 0"),
        ({"ms": {"0+4": 4.0, "12+4": "5"}}, "float"),
        ({"ms": {"0+4": 4.0, "large": 5.0}}, "regex"),
        ({"ms_per_prompt_pair": -1.0}, ">= 0"),
        ({"decode_context": None}, "int"),
        ({"more": 1}, "more"),
        (None, "truncated"),
    ],
)
def test_a_damaged_file_is_passed_over_with_a_warning(
    tmp_path: Path,
    config: LaunchConfig,
    change: dict[str, object] | None,
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    environment, key = {"GRAPHGEN_CACHE": str(tmp_path)}, StepTimesKey.of(config, READY)
    path = save_step_times(environment, key, TABLE)
    assert path is not None
    content = path.read_bytes()
    path.write_bytes(content[:-20] if change is None else json.dumps({**json.loads(content), **change}).encode())
    with caplog.at_level(logging.WARNING, "graphgen.step_times"):
        assert load_step_times(environment, key) is None
    (message,) = caplog.messages
    assert words in message
    assert "graphgen tune" in message


def test_a_file_under_another_name_is_not_believed(
    tmp_path: Path, config: LaunchConfig, caplog: pytest.LogCaptureFixture
) -> None:
    environment, key = {"GRAPHGEN_CACHE": str(tmp_path)}, StepTimesKey.of(config, READY)
    other = changed(key, device="NVIDIA H100")
    path = save_step_times(environment, other, TABLE)
    assert path is not None
    path.rename(step_times_path(environment, key))
    assert load_step_times(environment, key) is None
    assert "NVIDIA H100" in caplog.text


def test_a_time_beyond_floats_is_not_believed(tmp_path: Path, config: LaunchConfig) -> None:
    path = tmp_path / "times.json"
    path.write_bytes(StepTimesFile.of(StepTimesKey.of(config, READY), TABLE, "test").encode())
    assert StepTimesFile.read(path).table == TABLE
    path.write_bytes(path.read_bytes().replace(b"4.1", b"4e999"))
    with pytest.raises(ValueError, match=r"finite|range"):
        StepTimesFile.read(path)


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, config: LaunchConfig, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "step-times").write_text("a file where a folder should be")
    key = StepTimesKey.of(config, READY)
    environment = {"GRAPHGEN_CACHE": str(tmp_path)}
    assert save_step_times(environment, key, TABLE) is None
    assert stored_file(environment, key, TABLE) is None
    assert "GRAPHGEN_CACHE" in caplog.text
