"""Two engines behind one, real processes on the CPU in float32: one is killed, one drains, and nothing is lost."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from graphgen import ConfigError, Engine, EngineClosedError, EngineDeadError, SamplingParams
from tests import replica_deaths
from tests.ipc.foreign_clients import installed
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


@pytest.mark.parametrize("replica", ["1", True, -1, 1.0, None])
def test_what_is_no_number_of_a_replica_is_refused(engine: Engine, replica: Any) -> None:
    for call in (engine.drain, engine.resume):
        with pytest.raises(ConfigError, match=f"replica is {replica!r}, they are 0 to 1"):
            call(replica)


@pytest.mark.parametrize("seconds", [-1, float("nan"), "5", True])
def test_what_is_no_time_is_refused(engine: Engine, seconds: Any) -> None:
    with pytest.raises(ConfigError, match=f"grace_s is {seconds!r}: use seconds"):
        engine.drain(0, seconds)
    with pytest.raises(ConfigError, match=f"timeout_s is {seconds!r}: use seconds"):
        engine.resume(0, seconds)


def test_closing_ends_a_drain_and_a_closed_engine_refuses_both() -> None:
    """Waiting for what nobody does any more would hang, and what is woken would outlive its program's object."""
    engine = Engine(device="cpu", replicas=2, cpu_threads=1, num_pages=200)
    reader = Reader(engine, PROMPTS[0], SamplingParams(max_tokens=900, ignore_eos=True))
    wait_for(lambda: bool(reader.token_ids), "its first token")
    busy = next(number for number, stats in enumerate(engine.stats().engines) if stats is not None and stats.running)
    with ThreadPoolExecutor() as pool:
        drained = pool.submit(engine.drain, busy, 60.0)
        wait_for(lambda: bool(engine._core._links._states.drains()), "the drain's begin")
        with pytest.raises(EngineDeadError, match=f"engine {busy} drains already"):
            engine.drain(busy)
        engine.close()
        with pytest.raises(EngineClosedError, match="make a new Engine"):
            drained.result(30)
    for call in (engine.drain, engine.resume):
        with pytest.raises(EngineClosedError, match="make a new Engine"):
            call(1)
    reader.thread.join(30)


def test_all_streams_of_a_server_end_right_however_its_engines_end() -> None:
    figures = replica_deaths.run(1, seed=1, replicas=2, streams=12, drains=1, clients=["python", *installed()])
    assert (figures.deaths, figures.drains, figures.streams) == (1, 1, 12)
