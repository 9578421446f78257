"""A worker that dies, in whatever way, is replaced, and its requests go on: real processes, on the CPU in float32."""

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from graphgen import Engine, EngineDeadError, SamplingParams
from graphgen.ipc.codec import Codec
from graphgen.ipc.messages import StepResult
from graphgen.launch.starts import MAX_STARTS
from tests import poison, worker_deaths
from tests.fakes import make_result
from tests.serving import is_alive
from tests.traps import Harm, Traps
from tests.worker_deaths import LossNotices, check_idle, leftovers, num_files, wait_for

PROMPTS = [[5, 6, 7], list(range(1, 120)), [9] * 30]
SAMPLING = SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True)


SEEN_S = 0.1
"""A death is seen within this even on a busy machine, and so by its end and not by a look at the clock (LOOK_S). How
long it really takes, `python -m tests.worker_deaths` prints."""
TRAP = 1023
"""A token of no other prompt."""


@pytest.fixture(scope="module")
def traps(tmp_path_factory: pytest.TempPathFactory) -> Traps:
    return Traps(tmp_path_factory.mktemp("traps"))


@pytest.fixture(scope="module")
def engine(traps: Traps) -> Iterator[Engine]:
    with traps.in_environment(), Engine(device="cpu", dtype="float32", cpu_threads=1, num_pages=400) as engine:
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
        socket.send(codec.encode(make_result(10**6, [])))
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


@pytest.mark.parametrize(
    ("harm", "loss"),
    [
        ("exit", "ended with exit code 3"),
        ("raise", "failed with RuntimeError"),
        ("raise later", "failed with RuntimeError"),
        ("hang", "hung: a step did not end"),
    ],
)
def test_a_worker_that_fails_in_a_step_is_replaced(engine: Engine, traps: Traps, harm: Harm, loss: str) -> None:
    sampling = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    expected = list(engine.generate([[5, 6, 7]], sampling)[0].token_ids)
    stream = engine.stream([5, 6, 7], sampling)
    token_ids = list(next(stream).token_ids)
    # A step like it runs before: one of a kind that has not run is given minutes.
    engine.generate([[TRAP - 1]], SamplingParams(max_tokens=2, ignore_eos=True))
    traps.set(TRAP, harm, once=True)
    assert len(engine.generate([[TRAP]], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2
    for piece in stream:
        token_ids += piece.token_ids
    assert token_ids == expected
    assert loss in engine.stats().worker_loss
    said = (engine._core.folder / "scheduler.log").read_text()
    words = "in _do" if harm == "hang" else "springs its trap"  # of one that hung its stacks
    assert words in said.rpartition(loss)[2], "an operator reads the worker's last words"


@pytest.mark.alone
def test_a_death_is_seen_at_once(engine: Engine) -> None:
    """By an idle engine, which nothing else wakes, and by one with a step in flight."""
    engine.generate([[5, 6]], SAMPLING)
    with LossNotices() as notices:
        idle_s = worker_deaths.kill(engine, signal.SIGKILL, notices)
        wait_for(lambda: engine.stats().worker_pause_s > 0, "a pause")
        stream = engine.stream([5, 6, 7], SamplingParams(max_tokens=300, ignore_eos=True))
        next(stream)
        busy_s = worker_deaths.kill(engine, signal.SIGKILL, notices)
        assert sum(len(piece.token_ids) for piece in stream) == 299
    assert max(idle_s, busy_s) < SEEN_S, f"idle {idle_s:.3f} s, busy {busy_s:.3f} s"


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
    assert not is_alive(old)
    folder = engine._core.folder
    assert len(list(folder.glob("epoch-*"))) == 1
    assert len(list(folder.glob("*.pid"))) == 1


def test_the_process_that_stands_by_takes_over_and_ends_with_the_engine() -> None:
    with Engine(device="cpu", cpu_threads=1, num_pages=100, standby=True) as engine:
        expected = engine.generate(PROMPTS[0], SAMPLING)[0].token_ids
        wait_for(lambda: "standby-0" in engine.pids, "one stands by")
        standby = engine.pids["standby-0"]
        stream = engine.stream(PROMPTS[0], SAMPLING)
        token_ids = list(next(stream).token_ids)
        crash(engine)
        for piece in stream:
            token_ids += piece.token_ids
        assert token_ids == list(expected)
        assert engine.pids["worker-0"] == standby
        wait_for(lambda: engine.pids.get("standby-0") not in (standby, None), "the next one stands by")
        os.kill(engine.pids["standby-0"], signal.SIGKILL)
        assert engine.generate(PROMPTS[0], SAMPLING)[0].token_ids == expected
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
            wait_for(functools.partial(has_another_worker, engine, pid), "the next worker, or the end")
        with pytest.raises(EngineDeadError, match=f"the worker ended {MAX_STARTS + 1} times within 10 minutes"):
            engine.generate([[5]], SAMPLING)
        folder = engine._core.folder
    assert not leftovers(folder)
    assert num_files(os.getpid()) == files_before


def has_another_worker(engine: Engine, pid: int) -> bool:
    return engine.pids.get("worker-0") not in (pid, None) or is_dead(engine)


def is_dead(engine: Engine) -> bool:
    try:
        engine.stats()
    except EngineDeadError:
        return True
    return False


def test_a_request_that_ends_every_worker_fails_alone() -> None:
    assert poison.run(num_others=8, seed=2)["deaths"] == poison.DEATHS["chunks"]


def test_many_streams_survive_many_deaths() -> None:
    figures = worker_deaths.run(times=3, seed=1)
    assert figures["deaths"] == 3
