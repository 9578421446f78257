"""A worker that dies, in whatever way, is replaced, and its requests go on: real processes, on the CPU in float32."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphgen import Engine, EngineDeadError, SamplingParams
from graphgen.launch.starts import MAX_STARTS
from graphgen.scheduler.worker_processes import BEHIND_ANOTHER
from tests import poison, worker_deaths
from tests.serving import is_alive
from tests.traps import Traps
from tests.worker_deaths import (
    KINDS,
    LossNotices,
    Victim,
    check_idle,
    die,
    has_another_worker,
    leftovers,
    num_files,
    wait_for,
)

PROMPT = [5, 6, 7]
SAMPLING = SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True)
SEEN_S = 0.1
"""A death is seen within this even on a busy machine, and so by its end and not by a look at the clock (LOOK_S). How
long it really takes, `python -m tests.worker_deaths` prints."""
HUNG_S = 2.0
"""Instead of ten; `tests/scheduler/test_step_watch.py` has the ten."""


def test_many_streams_lose_nothing_however_the_worker_ends() -> None:
    """A death of each kind, one after the other. What must be so then, `tests.worker_deaths` checks."""
    figures = worker_deaths.run(len(KINDS), seed=1, kinds=list(KINDS), streams=24, hung_s=HUNG_S)
    assert figures["deaths"] == len(KINDS)
    assert figures["hang_seen_max_s"] < 5 * HUNG_S, "a hang is seen by the time that a step takes"


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    traps = Traps(tmp_path_factory.mktemp("traps"))
    with LossNotices() as notices, Engine(device="cpu", dtype="float32", cpu_threads=1, num_pages=400) as engine:
        yield Victim(engine, traps, notices, random.Random(0), [])


@pytest.mark.alone
def test_a_death_is_seen_at_once_and_an_idle_engine_replaces_its_worker_too(victim: Victim) -> None:
    """An idle engine is woken by nothing else; the other one has a step in flight."""
    engine = victim.engine
    engine.generate([[5, 6]], SAMPLING)
    idle_s = die(victim, KINDS["kill"])
    assert len(engine.generate([[5, 6]], SAMPLING)[0].token_ids) == 120
    stream = engine.stream([5, 6, 7], SamplingParams(max_tokens=300, ignore_eos=True))
    next(stream)
    busy_s = die(victim, KINDS["kill"])
    assert sum(len(piece.token_ids) for piece in stream) == 299
    assert max(idle_s, busy_s) < SEEN_S, f"idle {idle_s:.3f} s, busy {busy_s:.3f} s"
    stats = engine.stats()
    assert stats.worker_restarts == 2
    assert "the worker-0 process was killed by SIGKILL" in stats.worker_loss
    assert stats.worker_pause_s > 0


def test_cancelling_in_the_gap_ends_a_request(victim: Victim) -> None:
    engine = victim.engine
    stream = engine.stream([5, 6, 7], SamplingParams(max_tokens=None, ignore_eos=True))
    next(stream)
    os.kill(victim.pid, signal.SIGKILL)
    stream.close()
    wait_for(lambda: (engine.stats().running, engine.stats().waiting) == (0, 0), "it is gone")
    assert len(engine.generate([[5, 6]], SAMPLING)[0].token_ids) == 120
    check_idle(engine.stats())


def test_the_process_that_stands_by_takes_over_and_ends_with_the_engine() -> None:
    with Engine(device="cpu", cpu_threads=1, num_pages=100, standby=True) as engine:
        expected = engine.generate(PROMPT, SAMPLING)[0].token_ids
        wait_for(lambda: "standby-0" in engine.pids, "one stands by")
        standby = engine.pids["standby-0"]
        assert BEHIND_ANOTHER.encode() in Path(f"/proc/{standby}/cmdline").read_bytes().split(b"\0")
        stream = engine.stream(PROMPT, SAMPLING)
        token_ids = list(next(stream).token_ids)
        os.kill(engine.pids["worker-0"], signal.SIGKILL)
        for piece in stream:
            token_ids += piece.token_ids
        assert token_ids == list(expected)
        assert engine.pids["worker-0"] == standby
        wait_for(lambda: engine.pids.get("standby-0") not in (standby, None), "the next one stands by")
        os.kill(engine.pids["standby-0"], signal.SIGKILL)
        assert engine.generate(PROMPT, SAMPLING)[0].token_ids == expected
        assert engine.stats().worker_restarts == 1, "what only stood by is nobody's loss"
        folder, pids = engine._core.folder, engine.pids
        os.kill(pids["scheduler"], signal.SIGKILL)
        wait_for(lambda: not any(map(is_alive, pids.values())), "nothing outlives it")
    assert not leftovers(folder)


def test_a_worker_that_never_computes_a_step_ends_the_engine_and_leaves_nothing() -> None:
    files_before = num_files(os.getpid())
    with Engine(device="cpu", cpu_threads=1, num_pages=100) as engine:
        for _ in range(MAX_STARTS + 1):
            pid = engine.pids["worker-0"]
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: has_another_worker(engine, pid) or is_dead(engine), "the next worker, or the end")  # noqa: B023  # called before the next turn
        with pytest.raises(EngineDeadError, match=f"the worker ended {MAX_STARTS + 1} times within 10 minutes"):
            engine.generate([[5]], SAMPLING)
        folder = engine._core.folder
    assert not leftovers(folder)
    assert num_files(os.getpid()) == files_before


def is_dead(engine: Engine) -> bool:
    try:
        engine.stats()
    except EngineDeadError:
        return True
    return False


def test_a_request_that_ends_every_worker_fails_alone() -> None:
    assert poison.run(num_others=8, seed=2)["deaths"] == poison.DEATHS["chunks"]
