"""A worker that dies, in whatever way, is replaced, and its requests go on: real processes, on the CPU in float32."""

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from graphgen import Engine, EngineDeadError, SamplingParams
from graphgen.ipc.codec import Codec
from graphgen.ipc.messages import StepResult, WorkerCounters
from graphgen.launch.starts import MAX_STARTS
from tests import worker_deaths
from tests.worker_deaths import check_idle, wait_for

PROMPTS = [[5, 6, 7], list(range(1, 120)), [9] * 30]
SAMPLING = SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(device="cpu", dtype="float32", cpu_threads=1, num_pages=400) as engine:
        yield engine


def crash(engine: Engine) -> None:
    os.kill(engine.pids["worker-0"], signal.SIGKILL)


def send_garbage(engine: Engine) -> None:
    """As a worker that has gone mad would."""
    (folder,) = engine._core.folder.glob("epoch-*")
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.connect(f"ipc://{folder}/worker-0.up")
        socket.send(b"no message at all")
        time.sleep(0.2)


def send_a_foreign_result(engine: Engine) -> None:
    (folder,) = engine._core.folder.glob("epoch-*")
    codec: Codec[StepResult, StepResult] = Codec(StepResult)
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.connect(f"ipc://{folder}/worker-0.up")
        socket.send(codec.encode(StepResult(10**6, b"", 0.0, 0.0, 0.0, 0.0, WorkerCounters())))
        time.sleep(0.2)


def crash_again_while_it_starts(engine: Engine) -> None:
    first = engine.pids["worker-0"]
    crash(engine)
    wait_for(lambda: engine.pids.get("worker-0") not in (first, None), "the next worker")
    crash(engine)


@pytest.mark.parametrize("harm", [crash, send_garbage, send_a_foreign_result, crash_again_while_it_starts])
def test_every_stream_goes_on_where_it_was(engine: Engine, harm: Callable[[Engine], None]) -> None:
    expected = [output.token_ids for output in engine.generate(PROMPTS, SAMPLING)]
    restarts, pid = engine.stats().worker_restarts, engine.pids["worker-0"]
    outputs: list[list[tuple[int, ...]]] = []
    thread = threading.Thread(
        target=lambda: outputs.append([output.token_ids for output in engine.generate(PROMPTS, SAMPLING)])
    )
    thread.start()
    wait_for(lambda: engine.stats().running == 3, "they run")
    harm(engine)
    thread.join(60)
    assert outputs == [expected]
    stats = engine.stats()
    check_idle(stats)
    assert stats.worker_restarts > restarts
    assert "worker" in stats.worker_loss
    assert stats.worker_pause_s > 0
    assert engine.pids["worker-0"] != pid


def test_an_idle_engine_replaces_its_worker_too(engine: Engine) -> None:
    restarts = engine.stats().worker_restarts
    crash(engine)
    wait_for(lambda: engine.stats().worker_restarts > restarts, "a restart")
    assert len(engine.generate([[5, 6]], SAMPLING)[0].token_ids) == 120


def test_cancelling_in_the_gap_ends_a_request(engine: Engine) -> None:
    stream = engine.stream([5, 6, 7], SamplingParams(max_tokens=None, ignore_eos=True))
    next(stream)
    crash(engine)
    stream.close()
    wait_for(lambda: (engine.stats().running, engine.stats().waiting) == (0, 0), "it is gone")
    assert len(engine.generate([[5, 6]], SAMPLING)[0].token_ids) == 120


def test_nothing_of_a_dead_worker_stays(engine: Engine) -> None:
    old = engine.pids["worker-0"]
    crash(engine)
    engine.generate([[5, 6]], SAMPLING)
    assert not Path(f"/proc/{old}").exists()
    folder = engine._core.folder
    assert len(list(folder.glob("epoch-*"))) == 1
    assert len(list(folder.glob("*.pid"))) == 1


def test_a_worker_that_never_computes_a_step_ends_the_engine() -> None:
    with Engine(device="cpu", cpu_threads=1, num_pages=100) as engine:
        for _ in range(MAX_STARTS + 1):
            pid = engine.pids["worker-0"]
            os.kill(pid, signal.SIGKILL)
            wait_for(functools.partial(has_another_worker, engine, pid), "the next worker, or the end")
        with pytest.raises(EngineDeadError, match=f"the worker ended {MAX_STARTS + 1} times within 10 minutes"):
            engine.generate([[5]], SAMPLING)


def has_another_worker(engine: Engine, pid: int) -> bool:
    return engine.pids.get("worker-0") not in (pid, None) or is_dead(engine)


def is_dead(engine: Engine) -> bool:
    try:
        engine.stats()
    except EngineDeadError:
        return True
    return False


def test_many_streams_survive_many_deaths() -> None:
    figures = worker_deaths.run(times=3, seed=1)
    assert figures["deaths"] == 3
