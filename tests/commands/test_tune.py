"""The figures of `graphgen tune`, and the command itself on the demo model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from graphgen import Engine
from graphgen.capture.buckets import build_ladder
from graphgen.commands.describe import decisions
from graphgen.commands.tune import describe_figures, padding_by_bucket, tune_figures
from graphgen.ipc.attended import Attended
from graphgen.ipc.engine_messages import ObjectiveName
from graphgen.ipc.worker_messages import Bucket, BucketTime, StepTimeTable
from graphgen.scheduler.buckets import BucketTable
from graphgen.scheduler.cost_model import CostModel


@pytest.mark.parametrize(("token_budget", "num_slots"), [(8, 2), (64, 48), (256, 64), (512, 256)])
def test_padding_is_that_of_all_steps_one_by_one(token_budget: int, num_slots: int) -> None:
    buckets = build_ladder(token_budget, num_slots)
    table = BucketTable(buckets, token_budget)
    shares: dict[Bucket, list[float]] = {}
    for num_decodes in range(table.max_decode_rows + 1):
        for num_prefills in range(table.chunk_room(num_decodes) + 1):
            if num_prefills + num_decodes:
                bucket = table.smallest(num_prefills, num_decodes)
                shares.setdefault(bucket, []).append(1.0 - (num_prefills + num_decodes) / bucket.num_rows)
    found = padding_by_bucket(buckets)
    assert set(found) == set(shares)
    for bucket, padding in found.items():
        assert padding.mean == pytest.approx(sum(shares[bucket]) / len(shares[bucket]))
        assert padding.worst == pytest.approx(max(shares[bucket]))


TABLE = StepTimeTable(
    times=tuple(
        BucketTime(bucket, milliseconds)
        for bucket, milliseconds in ((Bucket(0, 16), 5.0), (Bucket(112, 16), 7.0), (Bucket(496, 16), 14.0))
    ),
    decode_context=1024,
    prompt_start=512,
    ms_per_decode_position=2e-5,
    ms_per_prompt_pair=1e-6,
    ms_per_chunk_position=5e-5,
)


def test_figures_are_rates_slopes_and_the_saturation_point() -> None:
    figures = tune_figures(TABLE, "gpu", "torch", "balanced", None)
    assert [line.rows_per_s for line in figures.buckets] == pytest.approx([3200.0, 128_000 / 7, 512_000 / 14])
    assert [line.saturated for line in figures.buckets] == [False, False, True]
    assert figures.us_per_1000_decode_positions == pytest.approx(20.0)
    later_ms = CostModel(TABLE).predict_ms(Bucket(496, 16), Attended(16_384).with_chunk(1512, 496))
    assert later_ms is not None
    assert figures.us_per_1000_chunk_positions == pytest.approx((later_ms - 14.0) * 1000.0)
    text = "\n".join(describe_figures(figures))
    assert "Saturation point: 512 rows" in text
    assert "a larger --token-budget may compute more" in text
    assert "20.00 us" in text
    assert "Not stored" in text


@pytest.mark.parametrize(
    ("objective", "rows", "said"), [("latency", 2048, "the largest there is"), ("balanced", 1024, "left to queues")]
)
def test_the_largest_steps_of_an_objective_that_grows_them_are_left_to_queues(
    objective: ObjectiveName, rows: int, said: str
) -> None:
    sizes = {Bucket(496, 16): 20.0, Bucket(1008, 16): 35.0, Bucket(2032, 16): 60.0}
    table = msgspec.structs.replace(TABLE, times=tuple(map(BucketTime, sizes, sizes.values())))
    figures = tune_figures(table, "gpu", "torch", objective, None)
    assert figures.saturation_rows == rows
    assert said in "\n".join(describe_figures(figures))


def test_tune_measures_prints_and_stores_what_the_next_start_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHGEN_CACHE", str(tmp_path))
    arguments = (
        "--device",
        "cpu",
        "--token-budget",
        "8",
        "--max-model-len",
        "64",
        "--replicas",
        "2",
        "--json",
        str(tmp_path / "out.json"),
    )
    done = subprocess.run(
        [sys.executable, "-P", "-m", "graphgen", "tune", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "140"},
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    stored = Path(figures["stored_at"])
    for words in ("Steps on cpu", "saturation point", "padding, mean", "decode row", str(stored)):
        assert words in done.stdout
    assert stored.parent == tmp_path / "step-times"
    assert [line["bucket"] for line in figures["buckets"]] == [str(bucket) for bucket in build_ladder(8, 6)]
    with Engine(device="cpu", token_budget=8, max_model_len=64, replicas=2) as engine:
        times = engine.info.worker.step_times
        assert times is not None
        assert [time.milliseconds for time in times.times] == [line["milliseconds"] for line in figures["buckets"]]
        (decision,) = [
            row for row in decisions(engine.config, engine.resolved, engine.info) if row.what == "step times"
        ]
        assert decision.why == "stored by `graphgen tune` or an earlier start"
