"""Ends the worker of an engine again and again while many streams run, and counts what its users lose.

    python -m tests.worker_deaths --times 200
    python -m tests.worker_deaths --times 40 --kinds exit failed garbage starting
    python -m tests.worker_deaths --times 20 --kinds stop hang
    python -m tests.worker_deaths --times 50 --kinds quick
    python -m tests.worker_deaths --times 40 --ranks 2

One engine of the embedded model on the CPU in float32, STREAMS requests at a time. KINDS has the ways in which a worker
ends. Each death strikes at a random moment, while the engine decodes, computes prompts or preempts, or while the worker
before has only just begun to serve, and waits until every open stream has a new token since the death before. Those in
quick succession wait for a token of any stream: then a request may fail as one that ends workers, as none could tell.

Afterwards every output must be that of an undisturbed run, token for token. Nothing may be left of a dead worker, nor
of the engine when it is closed. Prints, as median and maximum:

    seen        until a death was seen; what a hang takes is printed for itself
    resumed     from there until every stream that was being served had its next token
    recomputed  the part of it after the next worker served: prompts and outputs are computed again, in order of service
    all         until every stream had one, those too that had none due: there are fewer slots than streams
"""

import argparse
import itertools
import logging
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import zmq

from graphgen import Client, Engine, PoisonedRequestError, SamplingParams
from graphgen.ipc.codec import Codec
from graphgen.ipc.engine_messages import EngineStats
from graphgen.ipc.worker_messages import StepResult
from tests.fakes import make_result
from tests.serving import is_alive
from tests.soak import anonymous_mib
from tests.traps import Harm, Traps

STREAMS = 64
SETTINGS = {"device": "cpu", "dtype": "float32", "cpu_threads": 1, "num_pages": 400, "max_num_seqs": 48}
WAIT_S = 120.0
COMPANY = (1, 4, 16)
"""How many of a request run together where its output is compared once more."""
SERVED_S = 0.5
"""A stream whose newest token is younger than this is being served: every step has a token for it."""


class Reader:
    """One request and the tokens it has."""

    def __init__(self, engine: Engine | Client, prompt: Sequence[int], sampling: SamplingParams) -> None:
        self.token_ids: list[int] = []
        self.error: Exception | None = None
        self.ended = False
        self._newest_s = 0.0
        self._stream = engine.stream(prompt, sampling)
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        try:
            for piece in self._stream:
                self.token_ids += piece.token_ids
                self._newest_s = time.monotonic()
        except Exception as error:
            self.error = error
        self.ended = True

    @property
    def is_served(self) -> bool:
        """It has a slot, and its prompt is computed."""
        return not self.ended and time.monotonic() - self._newest_s < SERVED_S


class Reading(Protocol):
    """A request of any client."""

    token_ids: list[int]
    ended: bool


Request = TypeVar("Request", bound=Reading)


class LossNotices(logging.Handler):
    """When the engine said that its worker is lost, as time.time(), and why, and when the next one served: what an
    operator's log would show.

    Listens without asking the engine anything, since every question would make it look at its worker.
    """

    def __init__(self) -> None:
        super().__init__()
        self._heard: list[tuple[float, str]] = []
        self.served_s = 0.0
        """When a worker last began to serve in the place of another."""

    def emit(self, record: logging.LogRecord) -> None:
        if "wait for the worker that replaces it" in record.getMessage():
            self._heard.append((record.created, record.getMessage()))
        elif "a new worker serves" in record.getMessage():
            self.served_s = record.created

    def first_after(self, moment_s: float) -> tuple[float, str] | None:
        """The first loss that was told after that: when, and in which words."""
        return next((one for one in self._heard if one[0] >= moment_s), None)

    def __enter__(self) -> Self:
        logging.getLogger("graphgen").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("graphgen").removeHandler(self)


# --- the ways in which a worker ends -----------------------------------------------------------------------------


class Victim(NamedTuple):
    """An engine whose worker is to end, and what helps with it."""

    engine: Engine
    traps: Traps
    notices: LossNotices
    chance: random.Random
    helpers: list[Reader]
    """Requests that were sent so that there is a step."""

    @property
    def pid(self) -> int:
        """Of one of its ranks; each time it is asked for, of any."""
        pids = self.engine.pids
        return self.chance.choice([pids[name] for name in sorted(pids) if name.startswith("worker-")])

    @property
    def folder(self) -> Path:
        return self.engine._core.folder


class Struck(NamedTuple):
    """A worker that was harmed."""

    pid: int
    at_s: float  # as time.time()


class Kind(NamedTuple):
    """A way to end."""

    strike: Callable[[Victim], Struck]
    loss: str
    """What the engine says of it, among other words."""
    words: str = ""
    """What an operator finds in the scheduler's output besides: the worker's last words. Of a traceback its end: where
    the machine stalls, stacks of a step that is late come before it, and the output is told from its end."""
    is_hang: bool = False
    is_quick: bool = False
    """It waits for a new token of any stream, not of all."""


def by_signal(number: signal.Signals) -> Callable[[Victim], Struck]:
    def strike(victim: Victim) -> Struck:
        struck = Struck(victim.pid, time.time())
        os.kill(struck.pid, number)
        return struck

    return strike


def by_trap(harm: Harm) -> Callable[[Victim], Struck]:
    """In the next step that is launched; there is one, since a request is sent for it."""

    def strike(victim: Victim) -> Struck:
        pid = victim.pid
        victim.traps.set_for_next_step(harm)
        victim.helpers.append(Reader(victim.engine, [1], SamplingParams(max_tokens=1)))
        wait_for(lambda: victim.traps.sprung_s is not None, "a step that springs the trap")
        sprung_s = victim.traps.sprung_s
        assert sprung_s is not None
        return Struck(pid, sprung_s)

    return strike


def by_message(content: bytes) -> Callable[[Victim], Struck]:
    """As a worker that has gone mad would send it."""

    def strike(victim: Victim) -> Struck:
        (folder,) = victim.folder.glob("epoch-*")
        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
            socket.connect(f"ipc://{folder}/worker-0.up")
            struck = Struck(victim.pid, time.time())
            socket.send(content)
            wait_for(lambda: victim.notices.first_after(struck.at_s) is not None, "a word of the loss")
        return struck

    return strike


def while_starting(victim: Victim) -> Struck:
    """The successor of a worker that was killed, before it serves."""
    first = by_signal(signal.SIGKILL)(victim)
    wait_for(lambda: victim.notices.first_after(first.at_s) is not None, "a word of the first loss")
    wait_for(lambda: has_another_worker(victim.engine, first.pid), "another worker process")
    time.sleep(victim.chance.random() * victim.engine.start_s / 2)
    return by_signal(signal.SIGKILL)(victim)


def _foreign_result() -> bytes:
    codec: Codec[StepResult, StepResult] = Codec(StepResult)
    return codec.encode(make_result(10**6, []))


KINDS = {
    "kill": Kind(by_signal(signal.SIGKILL), "killed by SIGKILL"),
    "exit": Kind(by_trap("exit"), "ended with exit code 3", "springs its trap"),
    "failed": Kind(by_trap("raise"), "failed with RuntimeError", "RuntimeError: a trap in launch"),
    "failed-later": Kind(by_trap("raise later"), "failed with RuntimeError", "RuntimeError: a trap in the collector"),
    "garbage": Kind(by_message(b"no message at all"), "sent what cannot be"),
    "foreign": Kind(by_message(_foreign_result()), "sent what cannot be"),
    "starting": Kind(while_starting, "killed by SIGKILL"),
    "stop": Kind(by_signal(signal.SIGSTOP), "hung: a step did not end", is_hang=True),
    "hang": Kind(by_trap("hang"), "hung: a step did not end", "in _do", is_hang=True),  # the words are its stacks
    "quick": Kind(by_signal(signal.SIGKILL), "killed by SIGKILL", is_quick=True),
}


# --- the run -----------------------------------------------------------------------------------------------------


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


def check_tokens(
    engine: Engine | Client,
    request: tuple[list[int], SamplingParams],
    token_ids: Sequence[int],
    expected: Sequence[int],
) -> None:
    """Raises AssertionError for an output that no undisturbed run gives.

    expected: of one such run. Where two tokens are as likely to the sixth digit, it hangs on what else a step computes
    which of them comes: products of other shapes round otherwise. So runs in other company count as well.
    """
    if list(token_ids) == list(expected):
        return
    prompt, sampling = request
    for count in COMPANY:
        outputs = engine.generate([prompt] * count, [sampling] * count)
        if any(list(token_ids) == list(output.token_ids) for output in outputs):
            return
    pairs = enumerate(zip(token_ids, expected, strict=False))
    place = next((at for at, (one, other) in pairs if one != other), min(len(token_ids), len(expected)))
    raise AssertionError(
        f"tokens were lost, doubled or changed: {len(token_ids)} came, {len(expected)} were expected, from {place} on"
        f" {list(token_ids[place : place + 8])} instead of {list(expected[place : place + 8])}; {request}"
    )


def wait_for(condition: Callable[[], bool], what: str) -> float:
    """Seconds until the condition holds. Raises TimeoutError."""
    begun_s = time.monotonic()
    while not condition():
        if time.monotonic() - begun_s > WAIT_S:
            raise TimeoutError(f"not within {WAIT_S:g} s: {what}")
        time.sleep(0.002)
    return time.monotonic() - begun_s


class Figures:
    """What was measured, of every death."""

    def __init__(self) -> None:
        self.seen_s: list[float] = []
        self.hangs_seen_s: list[float] = []
        self.resumed_s: list[float] = []
        self.recomputed_s: list[float] = []
        self.all_resumed_s: list[float] = []
        self.num_deaths = 0
        self.num_poisoned = 0

    def table(self, start_s: float, stats: EngineStats, grown_mib: float) -> dict[str, float]:
        figures = {"deaths": self.num_deaths, "start_s": start_s}
        if self.seen_s:
            figures["seen_p50_ms"] = 1000.0 * statistics.median(self.seen_s)
            figures["seen_p99_ms"] = 1000.0 * sorted(self.seen_s)[int(0.99 * len(self.seen_s))]
        if self.hangs_seen_s:
            figures["hang_seen_max_s"] = max(self.hangs_seen_s)
        for name, times_s in (
            ("resumed", self.resumed_s),
            ("recomputed", self.recomputed_s),
            ("all", self.all_resumed_s),
        ):
            if times_s:
                figures |= {f"{name}_p50_s": statistics.median(times_s), f"{name}_max_s": max(times_s)}
        return figures | {
            "pause_s": stats.worker_pause_s,
            "failed_as_poisoned": self.num_poisoned,
            "scheduler_grown_mib": grown_mib,
        }


def run(
    times: int,
    seed: int,
    kinds: Sequence[str] = ("kill",),
    streams: int = STREAMS,
    hung_s: float | None = None,
    ranks: int = 1,
) -> dict[str, float]:
    """Deaths of these kinds in turn. Raises AssertionError when a token is lost, doubled or another, or when something
    is left. The figures otherwise. hung_s: see Traps. ranks: that share the model; any of them ends."""
    chance = random.Random(seed)
    deaths = list(itertools.islice(itertools.cycle([KINDS[name] for name in kinds]), times))
    figures, files_before = Figures(), num_files(os.getpid())
    with tempfile.TemporaryDirectory() as traps_folder:
        traps = Traps(Path(traps_folder))
        settings: dict[str, Any] = {**SETTINGS, "tensor_parallel": ranks}
        with LossNotices() as notices, traps.in_environment(hung_s), Engine(**settings) as engine:
            victim = Victim(engine, traps, notices, chance, [])
            start_s, folder, scheduler = engine.start_s, victim.folder, engine.pids["scheduler"]
            held_before, mib_before = num_held(victim), 0.0
            while deaths:
                _one_round(victim, deaths, streams, figures)
                mib_before = mib_before or anonymous_mib(scheduler)
            stats = engine.stats()
            check_idle(stats)
            assert stats.poisoned == figures.num_poisoned
            assert num_held(victim) == held_before, "the scheduler keeps files, sockets or folders of dead workers"
            grown_mib = anonymous_mib(scheduler) - mib_before
    assert not leftovers(folder), leftovers(folder)
    assert num_files(os.getpid()) == files_before, "the engine leaves files or sockets in its program"
    return figures.table(start_s, stats, grown_mib)


def _one_round(victim: Victim, deaths: list[Kind], streams: int, figures: Figures) -> None:
    """Requests from their first token to their last, and as many of the deaths as strike meanwhile."""
    engine, chance = victim.engine, victim.chance
    requests = make_requests(chance, streams)
    expected = [output.token_ids for output in engine.generate(*map(list, zip(*requests, strict=True)))]
    restarts = engine.stats().worker_restarts
    readers = [Reader(engine, *request) for request in requests]
    num_kills, is_quick = 0, False
    while deaths and any(not reader.ended for reader in readers):
        kind = deaths.pop(0)
        is_quick |= kind.is_quick
        time.sleep(chance.random() * 0.1)
        served = [reader for reader in readers if reader.is_served]
        (figures.hangs_seen_s if kind.is_hang else figures.seen_s).append(die(victim, kind))
        counts = {reader: len(reader.token_ids) for reader in readers}  # what the dead one computed has come by now
        num_kills += 2 if kind.strike is while_starting else 1
        figures.num_deaths += 1
        if deaths and deaths[0].is_quick:
            wait_for(lambda: any_has_more(counts), "a new token")  # noqa: B023  # called before the next turn
        else:
            resumed_s = wait_for(lambda: all_have_more(counts, served), "new tokens")  # noqa: B023  # as above
            if served:
                figures.resumed_s.append(resumed_s)
                figures.recomputed_s.append(time.time() - victim.notices.served_s)
            others_s = wait_for(lambda: all_have_more(counts, readers), "everybody's turn")  # noqa: B023  # as above
            figures.all_resumed_s.append(resumed_s + others_s)
    for reader, request, token_ids in zip(readers, requests, expected, strict=True):
        reader.thread.join(WAIT_S)
        if is_quick and isinstance(reader.error, PoisonedRequestError):
            figures.num_poisoned += 1
            assert reader.token_ids == list(token_ids[: len(reader.token_ids)]), "tokens were lost, doubled or changed"
        else:
            assert reader.error is None, f"a stream ended with {reader.error!r}"
            check_tokens(engine, request, reader.token_ids, token_ids)
    for helper in victim.helpers:
        helper.thread.join(WAIT_S)
    victim.helpers.clear()
    restarts = engine.stats().worker_restarts - restarts
    assert restarts == num_kills, f"{num_kills} deaths, {restarts} restarts"


def die(victim: Victim, kind: Kind) -> float:
    """Returns when another worker is there, so that each death is a death of its own: seconds until it was seen."""
    struck = kind.strike(victim)
    wait_for(lambda: victim.notices.first_after(struck.at_s) is not None, "a word of the loss")
    notice = victim.notices.first_after(struck.at_s)
    assert notice is not None
    seen_s, said = notice
    assert kind.loss in said, said
    wait_for(lambda: has_another_worker(victim.engine, struck.pid), "another worker process")
    assert not is_alive(struck.pid)
    logged = (victim.folder / "scheduler.log").read_text()
    assert kind.words in logged.rpartition(kind.loss)[2], "an operator reads the worker's last words"
    return seen_s - struck.at_s


def has_another_worker(engine: Engine, pid: int) -> bool:
    """Whether no rank is left of the group of that process, and the next one is there."""
    workers = [one for name, one in engine.pids.items() if name.startswith("worker-")]
    return pid not in workers and len(workers) == engine.info.worker.num_ranks


# --- what may be left --------------------------------------------------------------------------------------------


def num_files(pid: int) -> int:
    """Open files, sockets and pidfds of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def num_held(victim: Victim) -> tuple[int, int, int]:
    """What the scheduler holds for its worker: open files, folders of sockets, files with process ids."""
    folder = victim.folder
    pid = victim.engine.pids["scheduler"]
    return num_files(pid), len(list(folder.glob("epoch-*"))), len(list(folder.glob("*.pid")))


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


def all_have_more(counts: Mapping[Request, int], readers: Iterable[Request]) -> bool:
    """More tokens than those counted, or all that they will have."""
    return all(reader.ended or len(reader.token_ids) > counts[reader] for reader in readers)


def any_has_more(counts: Mapping[Reader, int]) -> bool:
    """So that a step was computed. Or all have ended."""
    has_token = any(len(reader.token_ids) > count for reader, count in counts.items())
    return has_token or all(reader.ended for reader in counts)


def check_idle(stats: EngineStats) -> None:
    """Nothing of the requests is left."""
    assert (stats.running, stats.waiting) == (0, 0), stats
    assert stats.pages_free == stats.pages_total, stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["kill"], help="these, in turn")
    parser.add_argument("--ranks", type=int, default=1, help="that share the model; any of them ends")
    arguments = parser.parse_args()
    figures = run(arguments.times, arguments.seed, arguments.kinds, ranks=arguments.ranks)
    print(", ".join(f"{name} {value:.3g}" for name, value in figures.items()), "- no token lost or doubled")


if __name__ == "__main__":
    main()
