"""Rare buckets that are captured while an engine serves: real processes, on the CPU, which walks through the same
messages and captures nothing."""

import os
import random
import signal

import pytest
from msgspec.structs import replace

from graphgen import ConfigError, Engine, EngineConfig, SamplingParams
from tests.worker_deaths import wait_for

SETTINGS = EngineConfig(device="cpu", dtype="float32", cpu_threads=1, num_pages=400)
SAMPLING = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(1, 1000) for _ in range(rng.randint(1, 200))] for _ in range(12)]


def tokens_of(engine: Engine) -> list[list[int]]:
    return [list(output.token_ids) for output in engine.generate(prompts(), SAMPLING)]


def is_whole(engine: Engine) -> bool:
    stats = engine.stats()
    return stats.buckets_captured == stats.buckets_total


@pytest.mark.parametrize("ranks", [1, 2])
def test_requests_get_the_same_tokens_while_buckets_come_and_after_a_death(ranks: int) -> None:
    config = replace(SETTINGS, tensor_parallel=ranks)
    with Engine(replace(config, captured_at_start="all")) as engine:
        expected = tokens_of(engine)
        stats = engine.stats()
        assert engine.info.worker.rare == ()
        assert 0 < stats.buckets_captured == stats.buckets_total
    with Engine(replace(config, captured_at_start="essential")) as engine:
        worker = engine.info.worker
        assert engine.stats().buckets_captured == len(worker.captured) < len(worker.buckets)
        assert tokens_of(engine) == expected
        for epoch in range(2):
            wait_for(lambda: is_whole(engine), "all are captured")
            assert tokens_of(engine) == expected
            if not epoch:
                os.kill(engine.pids[f"worker-{ranks - 1}"], signal.SIGKILL)
                wait_for(lambda: engine.stats().worker_restarts == 1, "it is seen")
                assert tokens_of(engine) == expected
                assert engine.stats().buckets_captured < len(worker.buckets), "the new one begins as the first did"
        stats = engine.stats()
        assert (stats.eager_steps, stats.recompilations) == (0, 0)
        assert stats.capture_ms_max > 0.0


def test_a_measurement_of_all_buckets_captures_all_of_them() -> None:
    with pytest.raises(ConfigError, match="step_times"):
        Engine(replace(SETTINGS, step_times="measure", captured_at_start="essential"))
