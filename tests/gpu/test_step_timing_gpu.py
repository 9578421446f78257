"""Step times on a GPU: measured within seconds at a start that finds none, near those of a thorough measurement."""

import os
from pathlib import Path

import pytest

from benchmarks.report import percentile
from graphgen import Engine, EngineConfig, SamplingParams
from graphgen.base.caches import COMPILER_FOLDERS, ROOT_VARIABLE, cache_root
from graphgen.ipc.worker_messages import TIMING_PHASE

SHAPE = "benchmarks/shapes/llama-3.1-8b"


def leave_out_step_times(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caches folder with everything of the machine's own but its step times: kernels take minutes to build."""
    root = cache_root(os.environ)
    for name in ("kernels", *COMPILER_FOLDERS.values()):
        (root / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(root / name)
    monkeypatch.setenv(ROOT_VARIABLE, str(folder))


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
    for slope in ("ms_per_decode_position", "ms_per_prompt_pair"):
        print(f"{slope}: quick {getattr(quick, slope):.3g}, thorough {getattr(thorough, slope):.3g}")
        assert getattr(quick, slope) == pytest.approx(getattr(thorough, slope), rel=0.3)
    reads = quick.ms_per_chunk_position, thorough.ms_per_chunk_position
    print(f"ms_per_chunk_position: quick {reads[0]:.3g}, thorough {reads[1]:.3g}")
    assert reads[0] == pytest.approx(reads[1], rel=0.5, abs=5e-5)
