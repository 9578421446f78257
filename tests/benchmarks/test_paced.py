"""Engines with workers that wait: their steps take what the table says, and two serve what two such devices would."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from benchmarks import replicas
from benchmarks.options import add_engine_options, make_parser
from benchmarks.paced.worker import PacedDevice
from benchmarks.simulated_machine import H200_STEP_TIMES
from graphgen.ipc.codec import pack_int32
from graphgen.ipc.worker_messages import Bucket, Probe, StepPlan, StepResult
from graphgen.launch.step_times_store import StepTimesFile

TABLE = StepTimesFile.read(H200_STEP_TIMES)
SHAPE = H200_STEP_TIMES.parent


def plan_of(step_id: int, num_decodes: int) -> StepPlan:
    return StepPlan(
        step_id=step_id,
        planned_s=0.0,
        bucket=Bucket(0, num_decodes),
        chunks=(),
        decode_slots=pack_int32(range(num_decodes)),
        decode_positions=pack_int32([TABLE.decode_context - 1] * num_decodes),
    )


def test_steps_follow_one_another_and_take_what_the_table_says() -> None:
    device = PacedDevice(TABLE, vocab_size=1000)
    assert device.next_s is None
    device.take(plan_of(0, 8), now_s=10.0)
    device.take(plan_of(1, 8), now_s=10.001)
    device.take(Probe(5), now_s=10.001)
    step_s = TABLE.ms["0+8"] / 1000.0
    assert device.next_s == pytest.approx(10.0 + step_s)
    assert list(device.ended(10.0 + 0.99 * step_s)) == []
    (first,) = device.ended(10.0 + 1.01 * step_s)
    second, probe = device.ended(10.0 + 2.01 * step_s)
    assert isinstance(first, StepResult)
    assert isinstance(second, StepResult)
    assert second.started_s == first.finished_s, "it was received while the first ran"
    assert second.finished_s - second.started_s == pytest.approx(step_s)
    assert len(np.frombuffer(first.drawn.token_ids, np.int32)) == 8
    assert probe == Probe(5)
    device.take(plan_of(2, 8), now_s=20.0)
    assert device.next_s == pytest.approx(20.0 + step_s), "a device that was idle begins at once"


@pytest.mark.alone
def test_two_engines_serve_what_two_devices_of_the_table_would(tmp_path: Path) -> None:
    """Steps of every bucket take ten times as long, so that a loaded machine keeps up."""
    slow = msgspec.structs.replace(TABLE, ms={bucket: 10.0 * time_ms for bucket, time_ms in TABLE.ms.items()})
    table = tmp_path / "slow.json"
    table.write_bytes(msgspec.json.encode(slow))
    options = ["--paced", str(table), "--model", str(SHAPE), "--replicas", "1", "2", "--workload", "200/12:4x12"]
    one, two = replicas.main([*options, "--json", str(tmp_path / "rows.json")])
    assert (one["completed"], two["completed"]) == (12, 24)
    finished = two["finished_each"]
    assert isinstance(finished, list)
    assert min(finished) >= 8, "both serve, the requests before what is measured included"
    assert isinstance(two["times"], float)
    assert 1.6 < two["times"] < 2.4, "a few requests do not fill two engines evenly"
    decode_ms = one["median_itl_ms"]
    assert isinstance(decode_ms, float)
    assert 0.95 * slow.ms["0+4"] < decode_ms < 1.2 * slow.ms["0+4"]
    assert json.loads((tmp_path / "rows.json").read_text())["about"]["device"] == "paced as an NVIDIA H200"


def test_what_is_given_wins_over_what_the_table_suggests() -> None:
    parser = make_parser(None)
    add_engine_options(parser)
    parser.add_argument("--paced", type=Path)
    asked = ["--paced", str(H200_STEP_TIMES), "--max-num-seqs", "64", "--max-model-len", "4096"]
    settings = replicas.settings_of(parser.parse_args(asked), 3)
    assert (settings["max_num_seqs"], settings["max_model_len"], settings["replicas"]) == (64, 4096, 3)
    assert settings["token_budget"] == 1024
    grown = replicas.settings_of(parser.parse_args([*asked, "--objective", "throughput"]), 1)
    assert grown["token_budget"] == 2048


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--paced", "nowhere.json"], "nowhere.json"),
        (["--paced", str(H200_STEP_TIMES), "--tensor-parallel", "2"], "one rank"),
        (["--replicas", "1", "0"], "replicas is 0, the least is 1"),
    ],
)
def test_what_cannot_be_is_refused_before_an_engine_starts(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        replicas.main(options)
    assert said in capsys.readouterr().err
