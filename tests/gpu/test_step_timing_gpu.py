"""Step times on a GPU: measured within seconds at a start that finds none, near those of a thorough measurement."""

import os
from pathlib import Path

import pytest

from benchmarks.report import percentile
from graphgen import Engine, EngineConfig, SamplingParams
from graphgen.base.caches import COMPILER_FOLDERS, ROOT_VARIABLE, cache_root
from graphgen.ipc.attended import Attended
from graphgen.ipc.worker_messages import TIMING_PHASE, Bucket, StepTimeTable
from graphgen.scheduler.cost_model import CostModel

SHAPE = "benchmarks/shapes/llama-3.1-8b"


def leave_out_step_times(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caches folder with everything of the machine's own but its step times: kernels take minutes to build."""
    root = cache_root(os.environ)
    for name in ("kernels", *COMPILER_FOLDERS.values()):
        (root / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(root / name)
    monkeypatch.setenv(ROOT_VARIABLE, str(folder))


def with_chunks_of(num_rows: int, beside: Attended) -> dict[str, Attended]:
    """Steps of so many prompt rows, as prompts of different lengths bring them."""
    tail = num_rows // 4
    return {
        "a beginning": beside.with_chunk(0, num_rows),
        "amidst 2600": beside.with_chunk(1200, num_rows),
        "the end of 2600 beside a beginning": beside.with_chunk(2600 - tail, tail).with_chunk(0, num_rows - tail),
        "far into a long prompt": beside.with_chunk(8192, num_rows),
    }


def longer_than_in_table(table: StepTimeTable, bucket: Bucket, attended: Attended) -> float:
    """By which share of the table's own step."""
    foretold_ms = CostModel(table).predict_ms(bucket, attended)
    assert foretold_ms is not None
    return foretold_ms / next(one.milliseconds for one in table.times if one.bucket == bucket) - 1.0


def test_a_quick_table_is_near_a_thorough_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_step_times(tmp_path, monkeypatch)
    tables = []
    for choice in ("auto", "measure", "auto"):
        sizes = {"model": SHAPE, "load_format": "dummy", "device": "cuda", "max_model_len": 16384}
        config = EngineConfig(**sizes, step_times=choice, captured_at_start="all")  # type: ignore[arg-type]  # as said
        with Engine(config) as engine:
            worker = engine.info.worker
            engine.generate([[1, 2, 3]], SamplingParams(max_tokens=8, ignore_eos=True))
            stats = engine.stats()
        assert (stats.graph_replays, stats.eager_steps, stats.recompilations) == (stats.steps, 0, 0)
        seconds = sum(phase.seconds for phase in worker.phases if phase.name == TIMING_PHASE)
        print(f"step_times={choice}: {len(worker.buckets)} buckets timed in {seconds:.2f} s")
        tables.append((worker.step_times, seconds))
    (quick, quick_s), (thorough, _), (stored, stored_s) = tables
    assert quick is not None
    assert thorough is not None
    assert stored == thorough
    assert stored_s == 0.0
    assert quick_s < 8.0
    ratios = {
        one.bucket: one.milliseconds / other.milliseconds - 1.0
        for one, other in zip(quick.times, thorough.times, strict=True)
    }
    for bucket, ratio in sorted(ratios.items(), key=lambda item: -abs(item[1]))[:8]:
        print(f"{bucket.prefill_rows}+{bucket.decode_rows}: quick / thorough - 1 = {ratio:+.1%}")
    offs = [abs(ratio) for ratio in ratios.values()]
    print(f"quick against thorough: median off {percentile(offs, 50):.1%}, most {max(offs):.1%}")
    assert percentile(offs, 90) < 0.05
    decode_slopes = quick.ms_per_decode_position, thorough.ms_per_decode_position
    print("ms_per_decode_position: quick {:.3g}, thorough {:.3g}".format(*decode_slopes))
    assert decode_slopes[0] == pytest.approx(decode_slopes[1], rel=0.3)
    # What pairs and positions cost is told apart only within what steps vary by; a step is foretold by their sum.
    widest = max((one.bucket for one in quick.times), key=lambda bucket: bucket.prefill_rows)
    decodes = Attended(widest.decode_rows * quick.decode_context)
    for name, attended in with_chunks_of(widest.prefill_rows, decodes).items():
        longer = [longer_than_in_table(table, widest, attended) for table in (quick, thorough)]
        print(f"{name}: {longer[0]:+.1%} quick, {longer[1]:+.1%} thorough, over the step of the table")
        assert longer[0] == pytest.approx(longer[1], abs=0.05)
