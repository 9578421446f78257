"""Buckets that are captured between requests: timed against one that is known, and nothing of it is left."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from graphgen.demo import model_folder
from graphgen.ipc.worker_messages import Bucket, BucketTime, StepPlan, StepTimeTable
from graphgen.launch.launch_config import LaunchConfig
from graphgen.launch.step_times_store import StepTimesKey, load_step_times
from graphgen.worker.late_captures import LateCaptures, stand_in
from graphgen.worker.step_timing import measure_step_times
from tests.worker.local_engine import LocalEngine, launch_config
from tests.worker.test_step_timing import ONCE, PROMPTS, SAMPLERS, FormulaRunner, make_ready, step_ms

BUCKETS = (Bucket(0, 1), Bucket(0, 4), Bucket(0, 8), Bucket(24, 8), Bucket(56, 8), Bucket(120, 8))
RARE = (Bucket(0, 4), Bucket(24, 8))


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHGEN_CACHE", str(tmp_path))


class FormulaCaptures(FormulaRunner):
    """Captures what it is asked to."""

    def __init__(self, config: LaunchConfig, formula_ms: Callable[[StepPlan], float]) -> None:
        super().__init__(config, make_ready(config, BUCKETS, 40, rare=RARE, graphs=True), formula_ms)
        self.trash_page = 40
        self.kv_cache = SimpleNamespace(trash_page=self.trash_page)
        self.num_uncounted = 0

    def capture(self, bucket: Bucket) -> None:
        rare = tuple(one for one in self._ready.rare if one != bucket)
        self._ready = msgspec.structs.replace(self._ready, rare=rare)

    def uncounted(self) -> "FormulaCaptures":
        self.num_uncounted += 1
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def _check_rows(self, plan: StepPlan) -> None:
        """What a step writes lies in the trash page."""
        size = self._config.page_size
        for chunk in plan.chunks:
            for position in range(chunk.start, chunk.start + chunk.length):
                assert self.pages[chunk.slot, position // size] == self.trash_page
            assert all(self.pages[chunk.slot, index] < 40 for index in range(chunk.start // size))
        for slot, position in zip(*(memory_words(plan.decode_slots), memory_words(plan.decode_positions)), strict=True):
            assert self.pages[slot, position // size] == self.trash_page
            assert any(self.pages[slot, index] < 40 for index in range(position // size)), "it reads what lies in pages"


def memory_words(packed: bytes) -> list[int]:
    return memoryview(packed).cast("i").tolist()


def make_config(**changes: object) -> LaunchConfig:
    config = launch_config(model_folder(), 1024, device="cpu", page_size=16, captured_at_start="essential")
    return msgspec.structs.replace(config, num_slots=8, **changes)


def table_of(formula_ms: Callable[[StepPlan], float], config: LaunchConfig) -> StepTimeTable:
    """Of every bucket, timed at a start."""
    runner = FormulaRunner(config, make_ready(config, BUCKETS, 40), formula_ms)
    return measure_step_times(runner, config, ONCE)  # type: ignore[arg-type]  # the part of a runner that is used


@pytest.mark.parametrize("pace", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("bucket", RARE)
def test_a_time_is_that_of_a_warm_device_whatever_pace_the_idle_one_has(bucket: Bucket, pace: float) -> None:
    config = make_config()
    whole = table_of(step_ms, config)
    expected = {time.bucket: time.milliseconds for time in whole.times}[bucket]
    part = msgspec.structs.replace(whole, times=tuple(time for time in whole.times if time.bucket not in RARE))
    num_steps = 0

    def at_its_pace(plan: StepPlan) -> float:
        nonlocal num_steps
        num_steps += 1
        return step_ms(plan) * (pace + 0.002 * num_steps)  # a clock that falls

    runner = FormulaCaptures(config, at_its_pace)
    ready = msgspec.structs.replace(runner.describe(), step_times=part)
    captured = LateCaptures(runner, config, ready).capture(bucket)  # type: ignore[arg-type]  # as above
    assert captured.problem == ""
    assert captured.milliseconds == pytest.approx(expected, rel=0.005)
    assert runner.num_uncounted == 1
    assert num_steps < 24, "a request may wait for them"


def test_times_are_stored_as_they_come_and_known_ones_are_not_measured_again() -> None:
    config = make_config()
    whole = table_of(step_ms, config)
    part = msgspec.structs.replace(whole, times=tuple(time for time in whole.times if time.bucket not in RARE))
    runner = FormulaCaptures(config, step_ms)
    ready = msgspec.structs.replace(runner.describe(), step_times=part)
    key, captures = StepTimesKey.of(config, ready), LateCaptures(runner, config, ready)  # type: ignore[arg-type]  # as above
    for number, bucket in enumerate(RARE):
        assert captures.capture(bucket).milliseconds is not None
        found = load_step_times(os.environ, key)
        assert found is not None
        stored = found
        assert stored.has(RARE[: number + 1])
        assert stored.has(RARE) == (number == 1)
    assert [time.bucket for time in stored.times] == list(BUCKETS)
    num_plans = len(runner.plans)
    again = LateCaptures(runner, config, msgspec.structs.replace(ready, step_times=stored))  # type: ignore[arg-type]
    assert again.capture(RARE[0]).milliseconds is None
    without = LateCaptures(runner, config, msgspec.structs.replace(ready, step_times=None))  # type: ignore[arg-type]
    assert without.capture(RARE[0]).milliseconds is None
    assert len(runner.plans) == num_plans


@pytest.mark.parametrize(
    ("bucket", "expected"),
    [
        (Bucket(0, 2), Bucket(0, 8)),
        (Bucket(0, 8), Bucket(0, 8)),
        (Bucket(0, 9), Bucket(0, 8)),
        (Bucket(24, 8), Bucket(56, 8)),
        (Bucket(57, 1), Bucket(120, 8)),
        (Bucket(100, 9), Bucket(120, 8)),
    ],
)
def test_the_known_bucket_is_the_one_whose_place_it_takes(bucket: Bucket, expected: Bucket) -> None:
    assert stand_in(bucket, (Bucket(0, 1), Bucket(0, 8), Bucket(56, 8), Bucket(120, 8))) == expected


# --- the runner itself -------------------------------------------------------------------------------------------


@pytest.fixture
def config() -> LaunchConfig:
    sizes = {"token_budget": 64, "num_pages": 80, "cpu_threads": 1}
    return launch_config(model_folder(), 256, device="cpu", captured_at_start="essential", **sizes)


@pytest.fixture
def engine(config: LaunchConfig) -> Iterator[LocalEngine]:
    engine = LocalEngine(config)
    yield engine
    engine.close()


def test_a_capture_changes_no_page_no_counter_and_no_token(engine: LocalEngine, config: LaunchConfig) -> None:
    """Also of prompts whose beginnings lie in the prefix cache, and with slots that had grammars and penalties."""
    grammars = ["", "%llguidance {}\nstart: /[a-z]+/", ""]
    before = engine.generate(PROMPTS, 16, SAMPLERS, grammars=grammars)
    runner, ready = engine.runner, engine.runner.describe()
    assert ready.rare
    assert set(ready.captured) | set(ready.rare) == set(ready.buckets)
    times = tuple(BucketTime(bucket, 1.0) for bucket in ready.captured)
    table = StepTimeTable(times, 128, 64, 0.0, 0.0, 0.0)
    captures = LateCaptures(runner, config, msgspec.structs.replace(ready, step_times=table))
    cache = runner.kv_cache
    pages = [one[: cache.num_pages].clone() for one in (*cache.k_pages, *cache.v_pages)]
    assert any(one.any() for one in pages)
    counters = runner.counters
    for bucket in ready.rare:
        captured = captures.capture(bucket)
        assert captured.milliseconds is not None
        assert captured.milliseconds > 0
        engine.scheduler.bucket_captured(bucket, captured.milliseconds)
    assert not runner.describe().rare
    assert runner.counters == counters
    for one, other in zip(pages, (*cache.k_pages, *cache.v_pages), strict=True):
        assert torch.equal(one, other[: cache.num_pages])
    hits = engine.scheduler.counters.prefix_hits
    assert engine.generate(PROMPTS, 16, SAMPLERS, grammars=grammars) == before
    assert engine.scheduler.counters.prefix_hits > hits


def test_without_rare_buckets_all_are_captured_at_once(config: LaunchConfig) -> None:
    engine = LocalEngine(msgspec.structs.replace(config, captures_all=True))
    assert engine.runner.describe().rare == ()
    engine.close()
