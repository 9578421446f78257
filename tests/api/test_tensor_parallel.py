"""Ranks that share a model: real processes on the CPU in float32, held to one that has it alone."""

import os
import random
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from graphgen import ConfigError, Engine, EngineConfig, RequestOutput, SamplingParams
from graphgen.calls.structured import Regex
from graphgen.requests.core import launch_config
from tests.traps import Traps
from tests.worker_deaths import KINDS, LossNotices, Victim, die, leftovers, wait_for

SETTINGS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "cpu_threads": 1, "num_pages": 120}
PROMPTS: list[list[int]] = [[5, 6, 7], [number % 900 for number in range(3, 300)], [40, 41], [9] * 20, [70], [71, 72]]
LENGTHS = {"max_tokens": 24, "ignore_eos": True}
SAMPLING = [
    SamplingParams(temperature=0.0, logprobs=3, prompt_logprobs=1, **LENGTHS),  # type: ignore[arg-type]  # a plain dict
    SamplingParams(temperature=0.0, presence_penalty=0.5, **LENGTHS),  # type: ignore[arg-type]
    SamplingParams(temperature=0.9, seed=3, **LENGTHS),  # type: ignore[arg-type]
    SamplingParams(temperature=1.1, top_k=20, top_p=0.9, seed=4, **LENGTHS),  # type: ignore[arg-type]
    SamplingParams(temperature=1.0, seed=5, structured=Regex("[a-f]{3}-[0-9]{9}"), max_tokens=24),
    SamplingParams(temperature=0.8, seed=6, logit_bias={11: 4.0}, **LENGTHS),  # type: ignore[arg-type]
]


def generated(engine: Engine) -> list[RequestOutput]:
    return engine.generate(PROMPTS, SAMPLING)


@pytest.fixture(scope="module")
def alone() -> list[RequestOutput]:
    with Engine(**SETTINGS) as engine:
        return generated(engine)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    traps = Traps(tmp_path_factory.mktemp("traps"))
    with LossNotices() as notices, traps.in_environment(), Engine(tensor_parallel=2, **SETTINGS) as engine:
        yield Victim(engine, traps, notices, random.Random(0), [])
        folder, pids = engine._core.folder, engine.pids
    assert {"worker-0", "worker-1"} <= pids.keys()
    assert not leftovers(folder)


@pytest.fixture
def engine(victim: Victim) -> Engine:
    return victim.engine


def test_two_ranks_draw_what_one_draws(engine: Engine, alone: list[RequestOutput]) -> None:
    """Greedy, drawn, filtered, penalised, biased and structured outputs beside each other."""
    together = generated(engine)
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    for name in ("logprobs", "prompt_logprobs"):
        one, other = ([found.logprob for found in getattr(output, name)] for output in (together[0], alone[0]))
        assert one == pytest.approx(other, abs=1e-4)
    worker, stats = engine.info.worker, engine.stats()
    assert (worker.num_ranks, worker.collectives) == (2, "Gloo")
    assert worker.page_bytes == 16 * 5 * 2 * 64 * 4, "half of two KV heads"
    assert (stats.running, stats.waiting, stats.pages_free) == (0, 0, 120)


def test_a_rank_that_ends_takes_the_others_with_it_and_requests_go_on(victim: Victim) -> None:
    """`python -m tests.worker_deaths --ranks 2` has many streams, and every way to end."""
    engine, sampling = victim.engine, SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    (expected,) = engine.generate([PROMPTS[0]], sampling)
    for kind in ("kill", "failed-later"):
        before = engine.pids
        stream = engine.stream(PROMPTS[0], sampling)
        token_ids = list(next(stream).token_ids)
        die(victim, KINDS[kind])
        for piece in stream:
            token_ids += piece.token_ids
        assert token_ids == list(expected.token_ids)
        assert not {before["worker-0"], before["worker-1"]} & set(engine.pids.values())
    assert re.match(r"the worker-\d failed with RuntimeError", engine.stats().worker_loss), "not another of its end"


def test_ranks_time_the_same_steps_and_a_group_stands_by() -> None:
    """Timed steps are in flight while the ranks agree on what those before them took."""
    sizes = {"token_budget": 16, "max_num_seqs": 4, "step_times": "measure", "standby": True}
    with Engine(tensor_parallel=2, **{**SETTINGS, **sizes}) as engine:
        table = engine.info.worker.step_times
        assert table is not None
        assert len(table.times) == len(engine.info.worker.buckets)
        sampling = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
        (expected,) = engine.generate([[5, 6, 7]], sampling)
        wait_for(lambda: {"standby-0", "standby-1"} <= engine.pids.keys(), "a group stands by")
        standby = [engine.pids[f"standby-{rank}"] for rank in range(2)]
        stream = engine.stream([5, 6, 7], sampling)
        token_ids = list(next(stream).token_ids)
        os.kill(engine.pids["worker-1"], signal.SIGKILL)
        for piece in stream:
            token_ids += piece.token_ids
        assert token_ids == list(expected.token_ids)
        assert [engine.pids[f"worker-{rank}"] for rank in range(2)] == standby


def test_what_cannot_be_shared_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="4 attention heads cannot be shared by 3 ranks: use a number that divides 4"):
        launch_config(EngineConfig(device="cpu", tensor_parallel=3))
    with pytest.raises(ConfigError, match="tensor_parallel is 0"):
        EngineConfig(tensor_parallel=0)
    with pytest.raises(ConfigError, match="4 attention heads cannot be shared by 8 ranks"):
        Engine(tensor_parallel=8, **SETTINGS)
