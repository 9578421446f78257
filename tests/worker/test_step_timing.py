"""Timed steps: every row live, nothing left behind, and slopes that follow from the times."""

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from graphgen.capture.stream import Mark
from graphgen.demo import model_folder
from graphgen.ipc.attended import Attended
from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.step_schema import live_entries
from graphgen.ipc.worker_messages import TIMING_PHASE, Bucket, Progress, SamplerParams, StepPlan, WorkerReady
from graphgen.launch.launch_config import LaunchConfig
from graphgen.scheduler.cost_model import CostModel
from graphgen.worker import step_timing
from graphgen.worker.runner import LaunchedStep, ModelRunner
from graphgen.worker.step_timing import Depth, Places, StepTimer, measure_step_times, open_timer, with_step_times
from tests.worker.local_engine import LocalEngine, launch_config

PROMPTS = [[number * 7 % 1000 for number in range(1, length)] for length in (4, 40, 71)]
SAMPLERS = [
    SamplerParams(),
    SamplerParams(repetition_penalty=1.4, frequency_penalty=0.6),
    SamplerParams(temperature=0.9, presence_penalty=0.5, seed=5),
]
ONCE = Depth(settling=0, repeats=2)


def make_config(**settings: object) -> LaunchConfig:
    fixed = {"device": "cpu", "token_budget": 64, "cpu_threads": 1, "prefix_cache": False}
    return launch_config(model_folder(), 256, **fixed, **settings)


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    engine = LocalEngine(make_config(num_pages=80))
    yield engine
    engine.close()


def test_nothing_of_the_timing_is_left(engine: LocalEngine) -> None:
    """Pages are clean, counters at 0, and requests with penalties and a seed get the tokens they would have got."""
    before = engine.generate(PROMPTS, 16, SAMPLERS)  # the engine keeps no prefixes: a timing clears their pages
    table = measure_step_times(engine.runner, make_config(num_pages=80), ONCE)
    assert all(time.milliseconds > 0.0 for time in table.times)
    cache = engine.runner.kv_cache
    assert all(not pages.any() for pages in (*cache.k_pages, *cache.v_pages))
    counters = engine.runner.counters
    assert (counters.graph_replays, counters.eager_steps, counters.recompilations) == (0, 0, 0)
    assert engine.generate(PROMPTS, 16, SAMPLERS) == before


def test_pages_hold_no_zeros_while_steps_are_timed(engine: LocalEngine) -> None:
    with open_timer(engine.runner, make_config(num_pages=80), Places(256, 0)):
        assert all(bool((pages[:80] != 0).any(-1).all()) for pages in engine.runner.kv_cache.k_pages)


# --- plans, read by a runner that takes the time its formula says ------------------------------------------------


class ReachedMark(Mark):
    def __init__(self, at_s: float) -> None:
        self._at_s = at_s

    def wait(self) -> float:
        return self._at_s


class FormulaRunner:
    """Takes the plans of timed steps, keeps the block tables they fill, and takes the time that `formula_ms` says."""

    def __init__(self, config: LaunchConfig, ready: WorkerReady, formula_ms: Callable[[StepPlan], float]) -> None:
        self._config = config
        self._ready = ready
        self._formula_ms = formula_ms
        self._now_s = 0.0
        self.pages: dict[tuple[int, int], int] = {}
        self.plans: list[StepPlan] = []
        self.kv_cache = SimpleNamespace(fill_with_noise=lambda num_pages: None, clear=lambda num_pages: None)

    def describe(self) -> WorkerReady:
        return self._ready

    def run_between_steps(self, work: Callable[[], None]) -> None:
        work()

    def restart_counters(self) -> None:
        pass

    def launch(self, plan: StepPlan, received_s: float) -> LaunchedStep:
        entries = live_entries(plan, "new_pages")
        bound = self._ready.max_chunks * -(-self._config.max_model_len // self._config.page_size)
        assert len(entries) <= bound + plan.bucket.decode_rows, "more pages than a step's input holds"
        for _, slot, index, page in entries:
            self.pages[slot, index] = page
        if plan.chunks or plan.decode_slots:
            self._check_rows(plan)
            self.plans.append(plan)
        started = ReachedMark(self._now_s)
        self._now_s += self._formula_ms(plan) / 1000.0
        finished = ReachedMark(self._now_s)
        return SimpleNamespace(started=started, finished=finished, fetched=finished)  # type: ignore[return-value]  # fake

    def _check_rows(self, plan: StepPlan) -> None:
        """Every row is live (but for what the context cannot hold), and every position has a page of the cache."""
        rows = [(chunk.slot, chunk.start + chunk.length - 1) for chunk in plan.chunks]
        slots, positions = unpack_int32(plan.decode_slots), unpack_int32(plan.decode_positions)
        assert len(set(slots)) == len(slots) == plan.bucket.decode_rows
        for slot, position in (*rows, *zip(slots, positions, strict=True)):
            assert position < self._config.max_model_len
            for index in range(position // self._config.page_size + 1):
                assert 0 <= self.pages[slot, index] < self._ready.num_pages
        assert len({chunk.slot for chunk in plan.chunks}) == len(plan.chunks) <= self._ready.max_chunks
        num_tokens = sum(chunk.length for chunk in plan.chunks)
        assert num_tokens == min(plan.bucket.prefill_rows, self._config.max_model_len)


def step_ms(plan: StepPlan) -> float:
    """0.01 ms a row, 1 us for 100 decode positions, 1 us for 1000 prompt pairs, 1 us for 50 positions of a chunk."""
    decodes = Attended(sum(position + 1 for position in unpack_int32(plan.decode_positions)))
    positions, pairs, read = decodes.with_chunks(plan.chunks)
    return 0.01 * plan.bucket.num_rows + 1e-5 * positions + 1e-6 * pairs + 2e-5 * read


def make_ready(config: LaunchConfig, buckets: tuple[Bucket, ...], num_pages: int, **changes: Any) -> WorkerReady:
    ready = WorkerReady(
        device="cpu",
        attention="torch",
        graphs=False,
        compiled=False,
        buckets=buckets,
        max_chunks=4,
        num_pages=num_pages,
        page_size=config.page_size,
        phases=(),
    )
    return msgspec.structs.replace(ready, **changes)


BUCKETS = (Bucket(0, 1), Bucket(0, 8), Bucket(56, 8), Bucket(120, 8))


@pytest.mark.parametrize("max_model_len", [16, 64, 120, 121, 150, 239, 240, 700, 8192])
@pytest.mark.parametrize("num_pages", [1, 7, 5000])
def test_times_and_slopes_are_those_of_the_device(max_model_len: int, num_pages: int) -> None:
    config = msgspec.structs.replace(make_config(page_size=16), max_model_len=max_model_len, num_slots=8)
    runner = FormulaRunner(config, make_ready(config, BUCKETS, num_pages), step_ms)
    table = measure_step_times(runner, config, ONCE)  # type: ignore[arg-type]  # the part of a runner that is used
    assert table.decode_context == min(1024, -(-max_model_len // 2))
    assert table.prompt_start == max(0, min(512, (max_model_len - 120) // 2))
    assert [time.bucket for time in table.times] == list(BUCKETS)
    for time in table.times:
        length = min(time.bucket.prefill_rows, max_model_len)
        _, pairs, read = Attended().with_chunk(table.prompt_start, length)
        of_decodes = 1e-5 * table.decode_context * time.bucket.decode_rows
        expected = 0.01 * time.bucket.num_rows + of_decodes + 1e-6 * pairs + 2e-5 * read
        assert time.milliseconds == pytest.approx(expected)
    assert table.ms_per_decode_position == pytest.approx(1e-5)
    # A context that holds the widest chunk hardly later than at 0 shows nothing of what a later start costs, and one
    # that holds it less than a chunk later shows both at once.
    both = (1e-6, 2e-5) if max_model_len >= 240 else (1e-6 + 2e-5 / 120, 0.0) if max_model_len >= 150 else (0.0, 0.0)
    assert (table.ms_per_prompt_pair, table.ms_per_chunk_position) == pytest.approx(both)


@pytest.mark.parametrize("max_model_len", [121, 150, 239, 240, 500, 8192])
@pytest.mark.parametrize("seed", range(5))
def test_what_steps_vary_by_makes_no_step_look_long_that_is_not(max_model_len: int, seed: int) -> None:
    """Where starts are near each other, what the second one adds is less than the noise of a step."""
    config = msgspec.structs.replace(make_config(page_size=16), max_model_len=max_model_len, num_slots=8)
    random = Random(seed)
    noisy = FormulaRunner(
        config, make_ready(config, BUCKETS, 5000), lambda plan: step_ms(plan) * random.gauss(1.0, 0.005)
    )
    model = CostModel(measure_step_times(noisy, config, step_timing.QUICK))  # type: ignore[arg-type]  # as above
    late = Attended(8 * (max_model_len // 2))
    for _ in range(4):
        late = late.with_chunk(max_model_len - 30, 30)
    predicted_ms = model.predict_ms(BUCKETS[-1], late)
    positions, pairs, read = late
    assert predicted_ms == pytest.approx(1.28 + 1e-5 * positions + 1e-6 * pairs + 2e-5 * read, rel=0.12)


@pytest.mark.parametrize(("num_slots", "max_chunks"), [(8, 1), (1, 4)])
def test_where_a_step_holds_one_chunk_its_pairs_are_all_that_grows(num_slots: int, max_chunks: int) -> None:
    config = msgspec.structs.replace(make_config(page_size=16), max_model_len=8192, num_slots=num_slots)
    buckets = (Bucket(0, 1), Bucket(120, num_slots))
    ready = make_ready(config, buckets, 5000, max_chunks=max_chunks)
    table = measure_step_times(FormulaRunner(config, ready, step_ms), config, ONCE)  # type: ignore[arg-type]  # as above
    assert table.ms_per_prompt_pair == pytest.approx(1e-6 + 2e-5 / 120)
    assert table.ms_per_chunk_position == 0.0


def test_a_second_chunk_that_seems_to_save_time_is_noise() -> None:
    config = msgspec.structs.replace(make_config(page_size=16), max_model_len=8192, num_slots=8)

    def formula(plan: StepPlan) -> float:
        return step_ms(plan) - 0.4 * (len(plan.chunks) > 1)

    runner = FormulaRunner(config, make_ready(config, BUCKETS, 5000), formula)
    table = measure_step_times(runner, config, ONCE)  # type: ignore[arg-type]  # as above
    assert table.ms_per_prompt_pair == pytest.approx(1e-6 + 2e-5 / 120)
    assert table.ms_per_chunk_position == 0.0


def test_the_first_step_of_a_bucket_may_be_slow() -> None:
    config = msgspec.structs.replace(make_config(page_size=16), num_slots=8)
    seen: set[tuple[Bucket, bytes]] = set()

    def slow_at_first(plan: StepPlan) -> float:
        fresh = (plan.bucket, plan.decode_positions) not in seen
        seen.add((plan.bucket, plan.decode_positions))
        return step_ms(plan) + 50.0 * fresh

    runner = FormulaRunner(config, make_ready(config, BUCKETS, 100), slow_at_first)
    table = measure_step_times(runner, config, step_timing.QUICK)  # type: ignore[arg-type]  # as above
    assert max(time.milliseconds for time in table.times) < 5.0
    # Two buckets with prompts in two passes, two without in one. Two of these show one slope; two starts, and prompts
    # that meet, the others.
    quick, slope = step_timing.QUICK, step_timing.PROMPT_SLOPES
    most_timed = (quick.settling + quick.repeats) * (2 * quick.passes + 2 + 2)
    most_timed += 3 * slope.passes * (slope.settling + slope.repeats) + step_timing.HEATING.repeats
    assert most_timed - 40 < len(runner.plans) <= most_timed


@pytest.mark.parametrize("swing_begins_ms", range(500, 900, 20))
def test_a_swing_of_the_clock_moves_no_time(swing_begins_ms: int) -> None:
    """Of as long as a bucket is timed in one pass, wherever it falls. (The narrowest one with prompts ends one pass and
    begins the next, so a swing can be in both; but its steps are not those that a power limit swings.)"""
    config = msgspec.structs.replace(make_config(page_size=16), num_slots=8)

    def measured(swing_ms: float) -> float:
        now_ms = 0.0

        def formula(plan: StepPlan) -> float:
            nonlocal now_ms
            swings = swing_begins_ms <= now_ms < swing_begins_ms + swing_ms
            milliseconds = 10 * step_ms(plan) * (1.3 if swings else 1.0)
            now_ms += milliseconds
            return milliseconds

        runner = FormulaRunner(config, make_ready(config, BUCKETS, 100), formula)
        table = measure_step_times(runner, config, step_timing.QUICK)  # type: ignore[arg-type]  # as above
        return {time.bucket: time.milliseconds for time in table.times}[BUCKETS[-1]]

    assert measured(swing_ms=60.0) == pytest.approx(measured(swing_ms=0.0))


def test_the_first_steps_of_a_device_that_has_idled_do_not_count() -> None:
    config = msgspec.structs.replace(make_config(page_size=16), num_slots=8)
    spent_ms = 0.0

    def fast_while_cool(plan: StepPlan) -> float:
        nonlocal spent_ms
        milliseconds = 10 * step_ms(plan) * (0.8 if spent_ms < 0.9 * step_timing.HEATING.enough_ms else 1.0)
        spent_ms += milliseconds
        return milliseconds

    runner = FormulaRunner(config, make_ready(config, BUCKETS, 100), fast_while_cool)
    table = measure_step_times(runner, config, step_timing.QUICK)  # type: ignore[arg-type]  # as above
    warm = FormulaRunner(config, make_ready(config, BUCKETS, 100), lambda plan: 10 * step_ms(plan))
    assert table == measure_step_times(warm, config, step_timing.QUICK)  # type: ignore[arg-type]  # as above


@pytest.mark.parametrize(("step", "counted"), [(1.0, 20), (200.0, 3), (2000.0, 3)])
def test_slow_steps_are_repeated_less_often(step: float, counted: int) -> None:
    config = msgspec.structs.replace(make_config(page_size=16), num_slots=8)
    runner = FormulaRunner(config, make_ready(config, BUCKETS, 100), lambda plan: step)
    timer = StepTimer(runner, config, BUCKETS)  # type: ignore[arg-type]  # as above
    runner.pages = {(slot, 0): 0 for slot in range(8)}
    assert timer.times_ms(Bucket(0, 8), Places(16, 0), step_timing.FULL) == pytest.approx([step] * counted)


# --- which times a worker starts with ----------------------------------------------------------------------------


def test_measured_times_are_stored_and_thorough_ones_replace_quick_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHGEN_CACHE", str(tmp_path))
    config = msgspec.structs.replace(make_config(page_size=16), num_slots=8)
    without = make_ready(config, BUCKETS, 100)
    with_graphs = msgspec.structs.replace(without, graphs=True)

    def start(ready: WorkerReady, choice: str) -> tuple[WorkerReady, int]:
        asked = msgspec.structs.replace(config, step_times=choice)
        runner = FormulaRunner(asked, ready, step_ms)
        reports: list[Progress] = []
        done = with_step_times(ready, runner, asked, reports.append)  # type: ignore[arg-type]  # as above
        assert [phase.name for phase in done.phases] == [TIMING_PHASE] * bool(reports)
        return done, len(runner.plans)

    assert start(without, "auto") == (without, 0), "a device without graphs measures when it is asked"
    assert start(with_graphs, "off") == (with_graphs, 0)
    quick, num_quick = start(with_graphs, "auto")
    assert quick.step_times is not None
    assert num_quick > 0
    kept, num_steps = start(with_graphs, "auto")
    assert (kept.step_times, num_steps) == (quick.step_times, 0)
    measured, num_measured = start(with_graphs, "measure")
    slope = step_timing.PROMPT_SLOPES
    in_both = step_timing.HEATING.repeats + 3 * slope.passes * (slope.settling + slope.repeats)
    assert num_measured - in_both > 2 * (num_quick - in_both) > 0
    stored, num_steps = start(with_graphs, "auto")
    assert (stored.step_times, num_steps) == (measured.step_times, 0)
    assert start(msgspec.structs.replace(with_graphs, buckets=BUCKETS[1:]), "auto")[1] > 0
    assert start(with_graphs, "off") == (with_graphs, 0)


def test_the_fake_runner_offers_what_the_real_one_does() -> None:
    names = [name for name in vars(FormulaRunner) if not name.startswith("_")]
    assert all(hasattr(ModelRunner, name) for name in names)
