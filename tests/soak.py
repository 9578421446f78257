"""A server under mixed load for a long time: what it costs in memory, and whether anything of a request stays.

    python -m tests.soak --minutes 30

A server of the embedded model on the CPU and PROGRAMS programs at it: whole outputs and streams, long and short
prompts, n > 1, streams that are left, deadlines that are missed, and requests that are refused. Its worker is killed
twice. At every PAUSES-th of the time the load stops: all pages must be free, and the server's processes must hold as
many objects of requests as there are open requests. Prints a table of the memory of every process, and fails when one
that had BOUND_FROM_S to settle and be watched grows by more than BOUND_MIB_PER_H.

All processes run with an allocator that gives back what is freed. As it comes, glibc's keeps a part for each thread
and size, up to some MiB in an hour of such load until it is full, and the worker's free memory goes up and down by
5 MiB with the sizes of its steps: that hides what a program holds.
"""

import argparse
import collections
import contextlib
import gc
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from graphgen import Client, DeadlineError, InvalidRequestError, OverloadedError, SamplingParams
from graphgen.remote.requests import RemoteRequest
from tests.kills import becomes_idle
from tests.serving import ServerProcess, serving
from tests.traps import HOOK, Traps
from tests.traps.counting import count_objects

PROGRAMS = 6
SETTLE_S = 300.0
"""Before that a process still fills its caches; half of a run that is shorter than twice this."""
PAUSES = 10
DEATHS_AT = (0.1, 0.2)
"""When the worker is killed, as shares of the time."""
LATE_S = 60.0
"""By so much a run is longer where the machine is so busy that a worker is not replaced in time."""
LOOK_S = 0.5
NUM_SAMPLES = 100
"""Of each process at most: more would be a growth of this program itself."""
SETTINGS = ("--cpu-threads", "1", "--num-pages", "400")
"""So few pages that all have been written to, and all are in the prefix cache, when a process has settled."""
OBJECTS_S = 20.0
"""For steps in flight, and whoever held an object for a moment, to end."""
ALLOCATOR = {
    "GLIBC_TUNABLES": ":".join(
        (
            "glibc.malloc.tcache_count=0",
            "glibc.malloc.arena_max=1",
            "glibc.malloc.trim_threshold=131072",
            "glibc.malloc.mmap_threshold=131072",
        )
    )
}
BOUND_MIB_PER_H = 1.0
BOUND_FROM_S = 900.0
"""Growth is judged over this time at least, the time to settle included: what a process holds moves by some 0.1 MiB."""
HELD = 4
"""Streams that are open while objects are counted."""
MODULES = {
    "supervisor": "graphgen",
    "scheduler": "graphgen.scheduler",
    "frontend": "graphgen.server.frontend",
    "worker": "graphgen.worker",
}


class Sample(NamedTuple):
    """What a process held at a moment."""

    seconds: float  # since the run began
    mib: float


class Memory:
    """Samples of every process, by its name and pid: a worker that was replaced is another process.

    Of each `window_s` it keeps the lowest: what a step needs comes and goes, by some MiB in a worker, and what a
    process does not let go of is there at its lowest, too.
    """

    def __init__(self, window_s: float) -> None:
        self.samples: dict[tuple[str, int], list[Sample]] = collections.defaultdict(list)
        self._window_s = window_s

    def look(self, server: ServerProcess, seconds: float) -> None:
        for name, pid in {"client": os.getpid(), **pids_of(server)}.items():
            with contextlib.suppress(LookupError, OSError):  # it has just ended
                self.take(name, pid, Sample(seconds, anonymous_mib(pid)))

    def take(self, name: str, pid: int, sample: Sample) -> None:
        samples = self.samples[name, pid]
        if not samples or sample.seconds // self._window_s > samples[-1].seconds // self._window_s:
            samples.append(sample)
        elif sample.mib < samples[-1].mib:
            samples[-1] = sample

    def table(self, total_s: float) -> list[str]:
        """One line a process: its memory, and by how much it grew in an hour, once it had settled."""
        lines = [f"{'process':<12}{'pid':>9}{'from s':>9}{'to s':>8}{'MiB':>9}{'at end':>9}{'MiB/h':>9}"]
        for (name, pid), samples in self.samples.items():
            settled = settled_of(samples, total_s)
            first = (settled or samples)[0]
            grown = f"{slope(settled):>9.2f}" if len(settled) > 2 else f"{'-':>9}"
            times = f"{first.seconds:>9.0f}{samples[-1].seconds:>8.0f}"
            lines.append(f"{name:<12}{pid:>9}{times}{first.mib:>9.1f}{samples[-1].mib:>9.1f}{grown}")
        return lines

    def growing(self, total_s: float) -> list[str]:
        """The processes that were watched for long enough and grow beyond the bound."""
        return [
            f"{name} {pid}: {grown:.2f} MiB/h"
            for (name, pid), samples in self.samples.items()
            if samples[-1].seconds - samples[0].seconds >= BOUND_FROM_S
            and (grown := slope(settled_of(samples, total_s))) > BOUND_MIB_PER_H
        ]


def settled_of(samples: list[Sample], total_s: float) -> list[Sample]:
    """Those after a process has filled its caches."""
    settled_s = samples[0].seconds + min(SETTLE_S, total_s / 2)
    return [sample for sample in samples if sample.seconds >= settled_s]


def slope(samples: list[Sample]) -> float:
    """MiB in an hour, by least squares."""
    fit = statistics.linear_regression([one.seconds for one in samples], [one.mib for one in samples])
    return fit.slope * 3600.0


def anonymous_mib(pid: int) -> float:
    """What a process has written to: neither files nor what it shares with others."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024.0


def pids_of(server: ServerProcess) -> dict[str, int]:
    """Of the processes that run now; a worker may be missing for a moment."""
    found = {"supervisor": server.process.pid}
    for name in ("scheduler", "frontend", "worker"):
        try:
            found[name] = server.pid_of(MODULES[name])
        except (LookupError, OSError):
            continue
    return found


# --- the load --------------------------------------------------------------------------------------------------


class Load:
    """Programs that ask at random until they are told to pause or to end."""

    def __init__(self, client: Client, seed: int) -> None:
        self._client = client
        self._may_run = threading.Event()
        self._ends = False
        self._num_resting = 0
        self._lock = threading.Lock()
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: list[Exception] = []
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(seed + number),), daemon=True)
            for number in range(PROGRAMS)
        ]
        for thread in self._threads:
            thread.start()

    def resume(self) -> None:
        self._may_run.set()

    def pause(self) -> None:
        """Returns when every program has ended what it was doing."""
        self._may_run.clear()
        while self._num_resting < PROGRAMS and not self.faults:
            time.sleep(0.01)
        if self.faults:
            raise self.faults[0]

    def end(self) -> None:
        self._ends = True
        self._may_run.set()
        for thread in self._threads:
            thread.join(30.0)

    def _run(self, chance: random.Random) -> None:
        try:
            while not self._ends:
                with self._lock:
                    self._num_resting += 1
                self._may_run.wait()
                with self._lock:
                    self._num_resting -= 1
                if not self._ends:
                    kind = chance.choice(KINDS)
                    kind(self._client, chance)
                    self.counts[kind.__name__] += 1
        except Exception as error:
            self.faults.append(error)


def prompt_of(chance: random.Random) -> list[int]:
    return [chance.randrange(1, 1000) for _ in range(chance.choice([1, 20, 100, 600]))]


def whole(client: Client, chance: random.Random) -> None:
    """A whole output, with a stop string for one in two."""
    stops = ("the",) if chance.random() < 0.5 else ()
    sampling = SamplingParams(max_tokens=chance.randint(1, 60), stop=stops, seed=chance.randrange(9))
    (output,) = client.generate([prompt_of(chance)], sampling)
    assert output.token_ids


def left(client: Client, chance: random.Random) -> None:
    """A stream that is left after some pieces."""
    with client.stream(prompt_of(chance), SamplingParams(max_tokens=300, ignore_eos=True)) as stream:
        for _ in range(chance.randint(0, 10)):
            next(stream)


def samples(client: Client, chance: random.Random) -> None:
    """Several outputs of one prompt, as a stream."""
    sampling = SamplingParams(n=chance.randint(2, 4), max_tokens=chance.randint(2, 30), ignore_eos=True)
    tokens = collections.Counter[int]()
    for piece in client.stream(prompt_of(chance), sampling):
        tokens[piece.sample_index] += len(piece.token_ids)
    assert set(tokens.values()) == {sampling.max_tokens}, "every sample has its tokens"


def late(client: Client, chance: random.Random) -> None:
    """A deadline that cannot be met."""
    try:
        client.generate([prompt_of(chance)], SamplingParams(max_tokens=400, ignore_eos=True, deadline_ms=30.0))
    except (DeadlineError, OverloadedError):
        return
    raise AssertionError("400 tokens came within 30 ms")


def refused(client: Client, chance: random.Random) -> None:
    """What the server must refuse."""
    bad: list[int] = chance.choice([[], [5000], [7] * 2000])
    try:
        client.generate([bad], SamplingParams(max_tokens=4))
    except InvalidRequestError:  # PromptTooLongError is one
        return
    raise AssertionError("a request was served that cannot be")


KINDS = (whole, left, samples, late, refused)


# --- the run ---------------------------------------------------------------------------------------------------


def check_pause(server: ServerProcess, client: Client, traps_folder: Path) -> None:
    """Nothing of the requests is left, and what open requests hold is theirs. Raises AssertionError."""
    assert becomes_idle(client, 10.0), client.stats()
    check_objects(server, traps_folder, num_open=0)
    held = SamplingParams(max_tokens=None, ignore_eos=True)
    streams = [client.stream([7, 8, 9], held) for _ in range(HELD)]
    for stream in streams:
        next(stream)
    check_objects(server, traps_folder, num_open=HELD)
    assert client.stats().open_requests == HELD, "they ran until here"
    for stream in streams:
        stream.close()
    assert becomes_idle(client, 10.0), client.stats()


def check_objects(server: ServerProcess, traps_folder: Path, num_open: int) -> None:
    """The objects of requests in scheduler, frontend and this program are those of so many open ones, as soon as the
    steps that were in flight for others have ended."""
    expected = {
        "scheduler": {"Request": num_open, "RunningRequest": num_open},
        "frontend": {"PublicRequest": num_open, "OpenRequest": num_open},
        "client": {"RemoteRequest": num_open},
    }
    deadline_s = time.monotonic() + OBJECTS_S
    while (found := count_all(server, traps_folder)) != expected:
        assert time.monotonic() < deadline_s, f"{num_open} requests are open, and there are {found}"
        time.sleep(0.05)


def count_all(server: ServerProcess, traps_folder: Path) -> dict[str, dict[str, int]]:
    """By process, the objects of requests by kind."""
    found = {name: count_objects(traps_folder, server.pid_of(MODULES[name])) for name in ("scheduler", "frontend")}
    gc.collect()
    here = sum(isinstance(one, RemoteRequest) for one in gc.get_objects())
    return {
        "scheduler": {kind: found["scheduler"][kind] for kind in ("Request", "RunningRequest")},
        "frontend": {kind: found["frontend"][kind] for kind in ("PublicRequest", "OpenRequest")},
        "client": {"RemoteRequest": here},
    }


def num_replaced(server: ServerProcess) -> int:
    """Workers that serve in the place of one that was killed."""
    return server.output.count("a new worker serves")


def run(total_s: float, seed: int = 0, num_pauses: int = PAUSES) -> tuple[list[str], list[str]]:
    """The table, and what grows. Raises AssertionError when something of a request stays, or one is served wrongly."""
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        traps_folder = folder / "traps"
        traps_folder.mkdir()
        with (
            Traps(traps_folder).in_environment(),
            serving(folder, *SETTINGS, python_path=str(HOOK)) as server,
        ):
            with Client(server.address) as client:
                memory, load, begun_s = Memory(total_s / NUM_SAMPLES), Load(client, seed), time.monotonic()
                deaths_at_s, num_deaths = [share * total_s for share in DEATHS_AT], 0
                for number in range(num_pauses):
                    load.resume()
                    is_last = number == num_pauses - 1
                    while (seconds := time.monotonic() - begun_s) < (number + 1) * total_s / num_pauses or (
                        is_last and num_replaced(server) < len(DEATHS_AT) and seconds < total_s + LATE_S
                    ):
                        if len(deaths_at_s) > num_deaths == num_replaced(server) and seconds > deaths_at_s[num_deaths]:
                            os.kill(server.pid_of(MODULES["worker"]), signal.SIGKILL)
                            num_deaths += 1
                        memory.look(server, seconds)
                        time.sleep(LOOK_S)
                    load.pause()
                    check_pause(server, client, traps_folder)
                load.end()
            assert num_replaced(server) == len(DEATHS_AT), server.output
            calls = f"{sum(load.counts.values())} calls: {dict(load.counts)}"
            return [*memory.table(total_s), calls], memory.growing(total_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not ALLOCATOR.items() <= os.environ.items():  # read by the allocator before a program's first line
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})
    table, growing = run(arguments.minutes * 60.0, arguments.seed)
    print("\n".join(table))
    if growing:
        sys.exit(f"more than {BOUND_MIB_PER_H:g} MiB/h: {', '.join(growing)}")


if __name__ == "__main__":
    main()
