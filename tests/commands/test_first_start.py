"""`graphgen prebuild` where the card is: the engine that it starts is the one that will be, but for its weights."""

import pytest

from graphgen import EngineConfig, GraphgenError
from graphgen.commands.first_start import FirstStart, cards_here, start_engine, start_first
from graphgen.ipc.worker_messages import Bucket, BucketTime, StepTimeTable, WorkerReady

HOPPER, AMPERE = (9, 0), (8, 0)
CONFIG = EngineConfig(model="model", device="cuda", token_budget=512, dtype="float16")
TIMES = tuple(BucketTime(Bucket(0, rows), 1.0) for rows in (1, 2, 4))


def started(
    config: EngineConfig, cards: list[tuple[int, int]], fails: str = ""
) -> tuple[FirstStart, list[EngineConfig]]:
    configs: list[EngineConfig] = []

    def start(config: EngineConfig) -> tuple[WorkerReady, float]:
        configs.append(config)
        if fails:
            raise GraphgenError(fails)
        times = StepTimeTable(TIMES, 1, 0, 0.0, 0.0, 0.0)
        return WorkerReady("H200", "none", True, True, (), 4, 8, 64, (), step_times=times), 41.5

    return start_first(config, HOPPER, lambda: cards, start), configs


def test_where_the_card_is_an_engine_starts_with_made_up_weights_and_captures_all() -> None:
    first, configs = started(CONFIG, [HOPPER])
    assert first == FirstStart(41.5, 3, "")
    (config,) = configs
    assert (config.load_format, config.tokenizer, config.captured_at_start) == ("dummy", "none", "all")
    for name in ("model", "device", "token_budget", "dtype", "memory_fraction", "step_times"):
        assert getattr(config, name) == getattr(CONFIG, name), "what decides on kernels and times is as it will be"


@pytest.mark.parametrize(
    ("cards", "ranks", "words"),
    [
        ([], 1, "no GPU"),
        ([AMPERE], 1, "8.0, the one to build for 9.0"),
        ([HOPPER], 2, "2 ranks need as many GPUs, 1 are here"),
    ],
)
def test_elsewhere_none_starts_and_the_reason_is_told(cards: list[tuple[int, int]], ranks: int, words: str) -> None:
    first, configs = started(EngineConfig(model="model", device="cuda", tensor_parallel=ranks), cards)
    assert not configs
    assert words in first.problem


def test_one_that_does_not_start_is_no_failure_of_what_was_built() -> None:
    first, _ = started(CONFIG, [HOPPER], fails="3.00 GiB are left")
    assert first == FirstStart(0.0, 0, "it did not start: 3.00 GiB are left")


def test_a_machine_without_a_gpu_has_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cards_here() == []


def test_the_engine_that_is_started_serves_and_ends() -> None:
    worker, seconds = start_engine(
        EngineConfig(device="cpu", cpu_threads=1, num_pages=64, load_format="dummy", tokenizer="none")
    )
    assert worker.num_pages == 64
    assert seconds > 0
