"""Engines with workers that wait: what they serve is what the simulator serves with the same table."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from benchmarks import replicas
from benchmarks.paced.worker import PacedDevice
from benchmarks.simulated_machine import H200_STEP_TIMES
from graphgen.ipc.codec import pack_int32
from graphgen.ipc.messages import Bucket, Probe, StepPlan, StepResult
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


def test_two_engines_serve_what_the_table_lets_two_serve(tmp_path: Path) -> None:
    """Times of steps are ten times those of the table, so that a loaded machine keeps up."""
    slow = msgspec.structs.replace(TABLE, ms={bucket: 10.0 * time_ms for bucket, time_ms in TABLE.ms.items()})
    table = tmp_path / "slow.json"
    table.write_bytes(msgspec.json.encode(slow))
    options = ["--paced", str(table), "--model", str(SHAPE), "--replicas", "1", "2", "--workload", "200/12:4x12"]
    rows = replicas.main([*options, "--json", str(tmp_path / "rows.json")])
    one, two = rows
    assert (one["completed"], two["completed"]) == (12, 24)
    finished = two["finished_each"]
    assert isinstance(finished, list)
    assert min(finished) >= 8, "both serve, the requests before what is measured included"
    assert isinstance(two["times"], float)
    assert 1.5 < two["times"] < 2.5
    decode_ms = one["median_itl_ms"]
    assert isinstance(decode_ms, float)
    assert decode_ms > 0.8 * slow.ms["0+4"]
    assert json.loads((tmp_path / "rows.json").read_text())["about"]["device"] == "paced as an NVIDIA H200"
