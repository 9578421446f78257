"""A server under all attacks at once: `python -m tests.frontend.hostile --minutes 5`.

A real `graphgen serve` of the demo model, one good client, and every attack of `attacks.py`, pinned to one core: first
without keys, then with keys, of which the attackers have one. All tokens of the good client must arrive, the memory of
each process stays bounded, and none is started anew. What the attacks cost the good client is printed: the time between
two of its tokens without and with them.
"""

import argparse
import contextlib
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from graphgen import Client, OverloadedError, SamplingParams
from graphgen.server.frontend.keys import Keys
from tests import ROOT
from tests.frontend.attacks import ATTACKS
from tests.serving import ServerProcess, serving

MODULES = ("graphgen.scheduler", "graphgen.worker", "graphgen.server.frontend")
MEMORY_LIMIT_MIB = 256
GROWTH_LIMIT_BYTES = {"graphgen.server.frontend": (MEMORY_LIMIT_MIB + 32) << 20}
OTHER_GROWTH_LIMIT_BYTES = 192 << 20
NUM_PAGES = 1500
"""Of the KV cache, 117 MiB, and part of the worker's growth: memory is the process's from the first time it is written,
and a server that runs for minutes writes every page."""
NUM_TOKENS = 120
SETTLE_S = 2.0


class Found(NamedTuple):
    """What a run measured."""

    calm_gaps_s: list[float]
    gaps_s: list[float]
    streams: int
    lost_streams: list[str]
    grown_bytes: dict[str, int]
    same_processes: bool
    log: str


class GoodClient:
    """Streams one request after another, and notes each token's time."""

    def __init__(self, address: str, **keys: object) -> None:
        self._client = Client(address, **keys)  # type: ignore[arg-type]  # server_key and key_file, or none
        self.gaps_s: list[float] = []
        self.streams = 0
        self.lost: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "GoodClient":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(120)
        if self._thread.is_alive():
            self.lost.append("a stream did not end")
        self._client.close()

    def take_gaps(self) -> list[float]:
        gaps, self.gaps_s = self.gaps_s, []
        return gaps

    def _run(self) -> None:
        sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.0)
        while not self._stop.is_set():
            try:
                self._read(sampling)
            except OverloadedError as error:  # the server says so, and when to come again: nothing is lost
                time.sleep(min(1.0, error.retry_after_s))
            except Exception as error:
                self.lost.append(f"{type(error).__name__}: {error}")

    def _read(self, sampling: SamplingParams) -> None:
        num_tokens, last_s = 0, 0.0
        for piece in self._client.stream("ROMEO:", sampling):
            now_s = time.monotonic()
            if num_tokens and piece.token_ids:
                self.gaps_s.append(now_s - last_s)
            num_tokens += len(piece.token_ids)
            last_s = now_s
        self.streams += 1
        if num_tokens != NUM_TOKENS:
            self.lost.append(f"a stream had {num_tokens} of {NUM_TOKENS} tokens")


class Watch:
    """The processes of a server: whether they are the same, and the most memory that each had beyond its first."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._pids = self._find()
        self._first = {module: resident_bytes(pid) for module, pid in self._pids.items()}
        self.grown_bytes = dict.fromkeys(MODULES, 0)

    def look(self) -> None:
        for module, pid in self._pids.items():
            with contextlib.suppress(OSError, StopIteration):
                grown = resident_bytes(pid) - self._first[module]
                self.grown_bytes[module] = max(self.grown_bytes[module], grown)

    @property
    def are_the_same(self) -> bool:
        try:
            return self._server.process.poll() is None and self._find() == self._pids
        except (OSError, LookupError):
            return False

    def _find(self) -> dict[str, int]:
        return {module: self._server.pid_of(module) for module in MODULES}


def resident_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) << 10


@contextlib.contextmanager
def attacking(server: ServerProcess, kinds: list[str], seconds: float, keys: tuple[str, str]) -> Iterator[None]:
    command = [sys.executable, "-P", "-m", "tests.frontend.attacks"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            arguments = [kind, server.address, server.control, str(seconds), *keys]
            process = subprocess.Popen([*command, *arguments], env=environment)
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def run(folder: Path, calm_s: float, attack_s: float, keys: bool, kinds: list[str]) -> Found:
    """One server, calm and then under attack."""
    settings = ["--memory-limit-mib", str(MEMORY_LIMIT_MIB), "--num-pages", str(NUM_PAGES)]
    options, good_keys, attackers_keys = [], dict[str, object](), ("", "")
    if keys:
        pairs = Keys(folder / "keys")
        server_key = pairs.make(None)[1]
        attackers_keys = (server_key, str(pairs.make("hostile")[0]))
        good_keys = {"server_key": server_key, "key_file": pairs.make("good")[0]}
        options = ["--keys", str(folder / "keys")]
    with (
        serving(folder, *settings, *options) as server,
        GoodClient(server.address, **good_keys) as good,
    ):
        watch = Watch(server)
        time.sleep(SETTLE_S)
        good.take_gaps()
        time.sleep(calm_s)
        calm_gaps_s = good.take_gaps()
        with attacking(server, kinds, attack_s, attackers_keys):
            end_s = time.monotonic() + attack_s
            while time.monotonic() < end_s:
                time.sleep(0.1)
                watch.look()
            gaps_s = good.take_gaps()
            same = watch.are_the_same
        log = server.output
    return Found(calm_gaps_s, gaps_s, good.streams, good.lost, watch.grown_bytes, same, log)


def faults(found: Found) -> list[str]:
    """What must not be."""
    wrong = [f"lost: {what}" for what in found.lost_streams]
    if not found.same_processes:
        wrong.append(f"a process was started anew or ended:\n{found.log}")
    if not found.gaps_s:
        wrong.append("the good client got no token under attack")
    for module, grown in found.grown_bytes.items():
        limit = GROWTH_LIMIT_BYTES.get(module, OTHER_GROWTH_LIMIT_BYTES)
        if grown > limit:
            wrong.append(f"{module} grew by {grown >> 20} MiB, the limit is {limit >> 20} MiB")
    return wrong


def percentile_ms(gaps_s: list[float], share: float) -> float:
    ordered = sorted(gaps_s) or [math.nan]
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000


def describe(found: Found, keys: bool) -> str:
    lines = [f"{'with keys' if keys else 'without keys'}: {found.streams} streams of {NUM_TOKENS} tokens arrived"]
    for name, gaps_s in (("calm", found.calm_gaps_s), ("attacked", found.gaps_s)):
        shares = ", ".join(f"p{100 * share:g} {percentile_ms(gaps_s, share):.2f} ms" for share in (0.5, 0.99, 0.999))
        lines.append(f"  ITL {name}: {shares}, {len(gaps_s)} gaps")
    grown = ", ".join(f"{module.rpartition('.')[2]} {num >> 20} MiB" for module, num in found.grown_bytes.items())
    lines.append(f"  memory grew by at most: {grown}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    options = parser.parse_args()
    wrong: list[str] = []
    for keys in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            found = run(Path(folder), min(20.0, options.minutes * 6), options.minutes * 30, keys, options.attacks)
        print(describe(found, keys), flush=True)
        wrong += faults(found)
    print("\n".join(wrong) or "every token arrived, no process was started anew, memory stayed within its limits")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
