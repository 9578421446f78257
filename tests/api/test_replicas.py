"""Two engines behind one, real processes on the CPU in float32: one is killed, one drains, and nothing is lost."""

import os
import signal
from collections.abc import Iterator

import pytest

from graphgen import ConfigError, Engine, EngineDeadError, SamplingParams
from tests import replica_deaths
from tests.worker_deaths import Reader, leftovers, wait_for

PROMPTS = [[1 + number, 5, 6] * 3 for number in range(10)]
SAMPLING = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.8, seed=3)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(device="cpu", dtype="float32", replicas=2, cpu_threads=1, num_pages=200) as engine:
        folders = [one.folder for one in engine._core._engines]
        yield engine
    assert not [what for folder in folders for what in leftovers(folder)]


def test_requests_of_a_killed_engine_go_on_and_those_of_one_that_drains_too(engine: Engine) -> None:
    expected = [list(output.token_ids) for output in engine.generate(PROMPTS, SAMPLING)]
    stats = engine.stats()
    assert stats.finished == len(PROMPTS)
    assert all(one is not None and one.finished for one in stats.engines), "each has served some"
    readers = [Reader(engine, prompt, SAMPLING) for prompt in PROMPTS]
    wait_for(lambda: all(reader.token_ids for reader in readers), "first tokens")
    os.kill(engine.pids["engine-0/scheduler"], signal.SIGKILL)
    for reader in readers:
        reader.thread.join(60)
    assert [reader.token_ids for reader in readers] == expected
    wait_for(lambda: engine.stats().engines[0] is not None, "the engine that is started again")

    readers = [Reader(engine, prompt, SAMPLING) for prompt in PROMPTS]
    wait_for(lambda: all(reader.token_ids for reader in readers), "first tokens")
    engine.drain(1, grace_s=0.05)
    assert "engine-1/worker-0" not in engine.pids
    for reader in readers:
        reader.thread.join(60)
    assert [reader.token_ids for reader in readers] == expected
    assert engine.stats().engines[1] is None
    with pytest.raises(EngineDeadError, match="engine 0 is the only one"):
        engine.drain(0)
    assert [list(output.token_ids) for output in engine.generate(PROMPTS, SAMPLING)] == expected
    engine.resume(1)
    assert engine.stats().engines[1] is not None


def test_a_replica_that_there_is_not_is_refused(engine: Engine) -> None:
    for call in (engine.drain, engine.resume):
        with pytest.raises(ConfigError, match="replica is 2, they are 0 to 1"):
            call(2)


def test_all_streams_of_a_server_end_right_however_its_engines_end() -> None:
    figures = replica_deaths.run(2, seed=1, replicas=2, streams=12, kinds=("engine", "drain"))
    assert figures["deaths"] == 2
