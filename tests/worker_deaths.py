"""Kills the worker of an engine again and again while many streams run, and counts what its users lose.

    python -m tests.worker_deaths --times 200

One engine of the embedded model on the CPU in float32, STREAMS requests at a time. Each death waits until every open
stream has a new token, and strikes at a random moment: while the engine decodes, computes prompts, preempts, or while
the worker before has only just begun to serve. Afterwards every output must be that of an undisturbed run, token for
token. Prints how long it took to see a death, to serve again, and to the next token of every stream. Nothing may be
left when the engine is closed, and its processes may keep nothing of the dead workers.
"""

import argparse
import logging
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from graphgen import Engine, SamplingParams
from graphgen.ipc.messages import EngineStats

STREAMS = 64
SETTINGS = {"device": "cpu", "dtype": "float32", "cpu_threads": 1, "num_pages": 400, "max_num_seqs": 48}
WAIT_S = 120.0


class Reader:
    """One request and the tokens it has."""

    def __init__(self, engine: Engine, prompt: Sequence[int], sampling: SamplingParams) -> None:
        self.token_ids: list[int] = []
        self.error: Exception | None = None
        self.ended = False
        self._stream = engine.stream(prompt, sampling)
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        try:
            for piece in self._stream:
                self.token_ids += piece.token_ids
        except Exception as error:
            self.error = error
        self.ended = True


class LossNotices(logging.Handler):
    """When the engine said that its worker is lost, as time.time(): what an operator's log would show.

    Listens without asking the engine anything, since every question would make it look at its worker.
    """

    def __init__(self) -> None:
        super().__init__()
        self.times_s: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "wait for the worker that replaces it" in record.getMessage():
            self.times_s.append(record.created)

    def __enter__(self) -> "LossNotices":
        logging.getLogger("graphgen").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("graphgen").removeHandler(self)


def make_requests(chance: random.Random, count: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 200 tokens; greedy ones, and ones with a seed and penalties."""
    requests = []
    for number in range(count):
        prompt = [chance.randrange(1, 1000) for _ in range(chance.choice([1, 5, 17, 60, 200]))]
        temperature, penalty = chance.choice([(0.0, 0.0), (0.9, 0.0), (0.0, 0.5)])
        sampling = SamplingParams(
            max_tokens=chance.randint(20, 150),
            ignore_eos=True,
            temperature=temperature,
            seed=number,
            presence_penalty=penalty,
        )
        requests.append((prompt, sampling))
    return requests


def wait_for(condition: Callable[[], bool], what: str) -> float:
    """Seconds until the condition holds. Raises TimeoutError."""
    begun_s = time.monotonic()
    while not condition():
        if time.monotonic() - begun_s > WAIT_S:
            raise TimeoutError(f"not within {WAIT_S:g} s: {what}")
        time.sleep(0.002)
    return time.monotonic() - begun_s


def run(times: int, seed: int, how: int = signal.SIGKILL) -> dict[str, float]:
    """Raises AssertionError when a token is lost, doubled or another, or when something is left. The figures
    otherwise."""
    chance = random.Random(seed)
    seen_s: list[float] = []
    resumed_s: list[float] = []
    files_before = num_files(os.getpid())
    with LossNotices() as notices, Engine(**SETTINGS) as engine:  # type: ignore[arg-type]  # a plain dict of settings
        start_s, folder, scheduler = engine.start_s, engine._core.folder, engine.pids["scheduler"]
        files_of_scheduler = num_files(scheduler)
        while len(resumed_s) < times:
            requests = make_requests(chance, STREAMS)
            expected = [output.token_ids for output in engine.generate(*map(list, zip(*requests, strict=True)))]
            readers = [Reader(engine, *request) for request in requests]
            while len(resumed_s) < times and any(not reader.ended for reader in readers):
                counts = [len(reader.token_ids) for reader in readers]
                time.sleep(chance.random() * 0.1)
                seen_s.append(kill(engine, how, notices))
                resumed_s.append(
                    wait_for(lambda: all(has_more(*pair) for pair in zip(readers, counts, strict=True)), "new tokens")  # noqa: B023  # called before the next turn
                )
            for reader, token_ids in zip(readers, expected, strict=True):
                reader.thread.join(WAIT_S)
                assert reader.error is None, f"a stream ended with {reader.error!r}"
                assert reader.token_ids == list(token_ids), "tokens were lost, doubled or changed"
        stats = engine.stats()
        check_idle(stats)
        assert stats.worker_restarts == len(resumed_s), f"{len(resumed_s)} deaths, {stats.worker_restarts} restarts"
        assert num_files(scheduler) == files_of_scheduler, "the scheduler keeps files or sockets of dead workers"
    assert not leftovers(folder), leftovers(folder)
    assert num_files(os.getpid()) == files_before, "the engine leaves files or sockets in its program"
    return {
        "deaths": len(resumed_s),
        "start_s": start_s,
        "seen_p50_ms": 1000.0 * statistics.median(seen_s),
        "seen_p99_ms": 1000.0 * sorted(seen_s)[int(0.99 * len(seen_s))],
        "resumed_p50_s": statistics.median(resumed_s),
        "resumed_max_s": max(resumed_s),
        "pause_s": stats.worker_pause_s,
    }


def kill(engine: Engine, how: int, notices: LossNotices) -> float:
    """Returns when another worker is there, so that each death is a death of its own: seconds until it was seen."""
    pid, num_seen = engine.pids["worker-0"], len(notices.times_s)
    killed_s = time.time()
    os.kill(pid, how)
    wait_for(lambda: len(notices.times_s) > num_seen, "a word of the loss")
    wait_for(lambda: engine.pids.get("worker-0") not in (pid, None), "another worker process")
    return notices.times_s[num_seen] - killed_s


def num_files(pid: int) -> int:
    """Open files, sockets and pidfds of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def leftovers(folder: Path) -> list[str]:
    """What is left of an engine that was closed: of its folder, sockets and processes."""
    found = [str(folder)] if folder.exists() else []
    found += [line for line in Path("/proc/net/unix").read_text().splitlines() if str(folder) in line]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:  # it has just ended, or is another user's
            continue
        if os.fsencode(folder) in command:
            found.append(f"process {process.name}: {command[:200]!r}")
    return found


def has_more(reader: Reader, count: int) -> bool:
    return reader.ended or len(reader.token_ids) > count


def check_idle(stats: EngineStats) -> None:
    """Nothing of the requests is left."""
    assert (stats.running, stats.waiting) == (0, 0), stats
    assert stats.pages_free == stats.pages_total, stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["KILL", "STOP"], default="KILL", help="STOP: a worker that hangs")
    arguments = parser.parse_args()
    figures = run(arguments.times, arguments.seed, getattr(signal, f"SIG{arguments.signal}"))
    print(", ".join(f"{name} {value:.3g}" for name, value in figures.items()), "- no token lost or doubled")


if __name__ == "__main__":
    main()
