"""Rare buckets on a GPU: captured between requests, the tokens as without, and a device without memory does no harm."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import msgspec
import pytest
import torch

from graphgen import Engine, SamplingParams
from graphgen.demo import model_folder
from graphgen.ipc.engine_messages import EngineStats
from graphgen.ipc.worker_messages import Bucket
from graphgen.launch.launch_config import LaunchConfig
from graphgen.worker.late_captures import LateCaptures
from tests.gpu.test_engine_gpu import SHAPE_8B, assert_equal_but_for_near_ties, prompts
from tests.gpu.test_step_timing_gpu import leave_out_step_times
from tests.worker.local_engine import LocalEngine, launch_config
from tests.worker_deaths import wait_for

SAMPLING = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
PATIENCE_S = 120.0


def tokens_of(engine: Engine) -> list[list[int]]:
    return [list(output.token_ids) for output in engine.generate(prompts(), SAMPLING)]


def check_steps(stats: EngineStats) -> None:
    assert (stats.eager_steps, stats.recompilations, stats.graph_replays) == (0, 0, stats.steps)


def is_whole(engine: Engine) -> bool:
    stats = engine.stats()
    return stats.buckets_captured == stats.buckets_total


def test_requests_get_the_same_tokens_while_rare_buckets_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without stored step times, so that what is captured is timed too."""
    leave_out_step_times(tmp_path, monkeypatch)
    runs: list[list[list[int]]] = []
    for when in ("essential", "all"):
        with Engine(device="cuda", token_budget=512, max_num_seqs=64, captured_at_start=when) as engine:
            worker = engine.info.worker
            assert bool(worker.rare) == (when == "essential")
            runs.append(tokens_of(engine))
            deadline_s = time.monotonic() + PATIENCE_S
            rng = random.Random(0)
            while not is_whole(engine):
                assert time.monotonic() < deadline_s, engine.stats()
                time.sleep(rng.uniform(0.9, 1.4))  # about as long as a capture waits
                engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
            runs.append(tokens_of(engine))
            stats = engine.stats()
            check_steps(stats)
            assert stats.buckets_captured == len(worker.buckets)
            print(f"{when}: {len(worker.captured)} of {stats.buckets_total}, longest {stats.capture_ms_max:.0f} ms")
    for one in runs[:-1]:
        assert_equal_but_for_near_ties(one, runs[-1])


def test_an_8b_engine_captures_within_the_time_that_a_request_may_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first start, which times what it captures, and a second one, which finds all times stored."""
    leave_out_step_times(tmp_path, monkeypatch)
    tables = []
    for start in ("first", "second"):
        with Engine(str(SHAPE_8B), load_format="dummy", device="cuda", max_model_len=16384) as engine:
            ready_s = time.monotonic()
            worker = engine.info.worker
            wait_for(lambda: is_whole(engine), "all are captured")
            took_s = time.monotonic() - ready_s
            stats = engine.stats()
            phases = {phase.name: phase.seconds for phase in worker.phases}
            assert len(engine.generate([[1, 2, 3]], SAMPLING)[0].token_ids) == 48
            check_steps(engine.stats())
        tables.append(worker.step_times)
        print(
            f"{start} start: {len(worker.captured)} of {stats.buckets_total} captured at ready in"
            f" {phases['capture']:.2f} s, timing {phases.get('timing', 0.0):.2f} s; all after {took_s:.2f} s more, the"
            f" longest {stats.capture_ms_max:.0f} ms"
        )
        assert stats.capture_ms_max < (600.0 if start == "first" else 300.0)
    first, second = tables
    assert first is not None
    assert second is not None
    assert not first.has(worker.buckets)
    assert second.has(worker.buckets), "what was timed later is stored, too"


@pytest.fixture
def config() -> LaunchConfig:
    config = launch_config(model_folder(), device="cuda", token_budget=128, max_num_seqs=16, num_pages=64)
    return msgspec.structs.replace(config, captures_all=False)


@pytest.fixture
def engine(config: LaunchConfig) -> Iterator[LocalEngine]:
    engine = LocalEngine(config)
    yield engine
    engine.close()


def test_a_capture_that_runs_out_of_memory_in_its_midst_is_given_up(engine: LocalEngine, config: LaunchConfig) -> None:
    """Between the beginning and the end of a graph, and before it; then the next one, and requests, find all well."""
    runner = engine.runner
    expected = engine.generate([[1, 2, 3], [4, 5]], 16)
    captures = LateCaptures(runner, config, runner.describe())
    rare, make_step = runner.describe().rare, runner._graphs._make_step

    def failing(fails_in_capture: bool) -> None:
        def make(shape: object) -> object:
            step = make_step(shape)  # type: ignore[arg-type]  # the runner's shapes

            def run() -> None:
                step()
                if torch.cuda.is_current_stream_capturing() == fails_in_capture:
                    torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

            return run

        runner._graphs._make_step = make  # type: ignore[assignment]  # a step that asks for a petabyte

    for fails_in_capture in (False, True):
        failing(fails_in_capture)
        captured = captures.capture(rare[0])
        assert "out of memory" in captured.problem
        assert captured.milliseconds is None
        assert rare[0] in runner.describe().rare
    runner._graphs._make_step = make_step
    for bucket in rare:
        assert captures.capture(bucket).problem == ""
        engine.scheduler.bucket_captured(bucket, None)
    assert engine.generate([[1, 2, 3], [4, 5]], 16) == expected
    assert runner.counters.eager_steps == 0


def test_a_bucket_is_not_tried_where_less_is_free_than_a_graph_takes(engine: LocalEngine, config: LaunchConfig) -> None:
    runner = engine.runner
    runner._graph_bytes = 1 << 50
    captured = LateCaptures(runner, config, runner.describe()).capture(runner.describe().rare[0])
    assert "MiB" in captured.problem


def test_a_capture_on_one_thread_lets_another_use_the_device(engine: LocalEngine, config: LaunchConfig) -> None:
    """As the collector does, and what fills masks."""
    runner = engine.runner
    captures, ended = LateCaptures(runner, config, runner.describe()), False

    def use() -> None:
        host, device = torch.empty(1 << 16, pin_memory=True), torch.ones(1 << 16, device="cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            while not ended:
                host.copy_(device, non_blocking=True)
                stream.synchronize()

    thread = Thread(target=use)
    thread.start()
    buckets: tuple[Bucket, ...] = runner.describe().rare
    problems = [captures.capture(bucket).problem for bucket in buckets]
    ended = True
    thread.join()
    assert problems == [""] * len(buckets)
