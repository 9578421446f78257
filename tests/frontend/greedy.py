"""Two tenants at one server, one greedy in every way that the protocol allows: what does the modest one get?

    python -m tests.frontend.greedy --seconds 20
    python -m tests.frontend.greedy --seconds 20 --paced --replicas 2

A `graphgen serve` of the embedded model on the CPU. There all processes and several engines share the cores: what the
modest client gets then hangs on what else runs, the greedy client and other programs included. --paced has workers that
wait for a device of their own instead (`benchmarks.paced`); all else is real. Steps of that device take what they would
on a CPU: so much for each row.

The modest client sends one request after another, first alone, then beside a greedy client in a process of its own,
which keeps as many samples open as a client may: priority 9, n of 16, prompts and outputs up to the model's context,
targets that nothing meets. Alone on half of the server the modest one would get its first token after twice the time
and its tokens at half the rate.

When a request of the modest client comes, the steps on the device are the greedy one's alone, with as many decodes as
the server has slots: what two of them take, by the server's step log, is said beside the figures.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest import mock

import zmq
from msgspec import Struct, structs

from benchmarks.paced.worker import STEP_TIMES_VARIABLE
from benchmarks.simulated_machine import H200_STEP_TIMES
from graphgen.ipc.ggp.framing import client_framing
from graphgen.ipc.ggp.messages import (
    Accepted,
    Delta,
    Done,
    Error,
    Generate,
    Hello,
    Ping,
    Pong,
    Sampling,
    ServerMessage,
    Welcome,
)
from graphgen.launch.step_times_store import StepTimesFile
from tests import ROOT
from tests.scheduler.virtual_time import even_step_ms
from tests.serving import serving
from tests.traps import HOOK, WORKER_VARIABLE

PROMPT_LEN, OUTPUT_LEN = 200, 40
PAUSE_S = 0.05
"""Between two requests of the modest client."""
VOCABULARY = 200
IMPATIENCE_S = 30.0
"""For a message, and for a whole request of the modest client."""


class Service(Struct, frozen=True):
    """What a client got: medians over its requests."""

    num_requests: int
    first_token_s: float
    tokens_per_s: float

    def __str__(self) -> str:
        return (
            f"first token {self.first_token_s * 1000:.0f} ms, {self.tokens_per_s:.0f} tokens/s"
            f" ({self.num_requests} requests)"
        )


class Peer:
    """A DEALER with a session."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.connect(address)
        self._framing = client_framing()
        self.send(Hello(client="greedy"))
        welcome = self.receive()
        assert isinstance(welcome, Welcome), f"expected welcome, got {welcome}"
        self.welcome = welcome

    def send(self, message: Generate | Hello | Pong) -> None:
        self._socket.send_multipart(self._framing.encode(message))

    def receive(self) -> ServerMessage:
        """The next message, pings answered."""
        while True:
            assert self._socket.poll(int(IMPATIENCE_S * 1000)), f"the server said nothing for {IMPATIENCE_S:g} s"
            message = self._framing.decode(self._socket.recv_multipart())
            if not isinstance(message, Ping):
                return message
            self.send(Pong())

    def close(self) -> None:
        self._socket.close()
        self._context.term()


def be_modest(address: str, seconds: float, seed: int) -> Service:
    """One request after another, of prompts that the seed draws; raises AssertionError when one is refused or loses a
    token."""
    peer, rng = Peer(address), random.Random(seed)
    first_s: list[float] = []
    rates: list[float] = []
    until_s = time.monotonic() + seconds
    number = 0
    while time.monotonic() < until_s:
        number += 1
        sent_s = time.monotonic()
        times_s: list[float] = []
        sampling = Sampling(max_tokens=OUTPUT_LEN, min_tokens=OUTPUT_LEN, temperature=0.0)
        peer.send(Generate(id=number, prompt_ids=random_ids(rng, PROMPT_LEN), sampling=sampling))
        while not isinstance(message := peer.receive(), Done):
            assert not isinstance(message, Error), f"the modest client got {message}"
            if isinstance(message, Delta):
                times_s += [time.monotonic()] * len(message.ids)
            assert time.monotonic() < sent_s + IMPATIENCE_S, f"{len(times_s)} tokens in {IMPATIENCE_S:g} s"
        assert len(times_s) == OUTPUT_LEN, "every token arrives"
        first_s.append(times_s[0] - sent_s)
        rates.append((OUTPUT_LEN - 1) / (times_s[-1] - times_s[0]))
        time.sleep(PAUSE_S)
    peer.close()
    return Service(number, median(first_s), median(rates))


def be_greedy(address: str) -> None:
    """For ever: as many samples as it may have, all of the highest class; what is refused is sent again."""
    peer, rng = Peer(address), random.Random(2)
    limits = peer.welcome.limits
    context_len, number = limits.prompt_tokens, 0
    left, samples_of = limits.open_requests, dict[int, int]()
    while True:
        while left > 0:
            number += 1
            num_samples = min(left, rng.choice([1, 16, 16]))
            prompt_len = rng.choice([1, 100, context_len // 2, context_len - 40])
            sampling = Sampling(
                n=num_samples,
                max_tokens=rng.choice([16, context_len - prompt_len]),
                priority=9,
                itl_target_ms=rng.choice([None, 0.01]),
                ttft_target_ms=rng.choice([None, 1.0, 1000.0]),
                deadline_ms=rng.choice([None, None, 1e8]),
            )
            peer.send(Generate(id=number, prompt_ids=random_ids(rng, prompt_len), sampling=sampling, stream=False))
            samples_of[number], left = num_samples, left - num_samples
        message = peer.receive()
        if isinstance(message, Error):
            time.sleep(0.005)
        if isinstance(message, (Done, Error)) and message.id in samples_of:
            left += samples_of.pop(message.id)
        assert isinstance(message, (Accepted, Delta, Done, Error)), f"unexpected {message}"


def random_ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCABULARY) for _ in range(count)]


@contextlib.contextmanager
def greedy_process(address: str) -> Iterator[None]:
    command = [sys.executable, "-P", "-m", "tests.frontend.greedy", "--greedy", address]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        yield
        assert process.poll() is None, "the greedy client ended"
    finally:
        process.kill()
        process.wait()


class Comparison(NamedTuple):
    alone: Service
    beside: Service
    in_flight_s: float
    """What the steps took that the modest client found on the device, at most."""

    def __str__(self) -> str:
        return (
            f"alone   {self.alone}\n"
            f"beside  {self.beside}\n"
            f"        first token {self.beside.first_token_s / self.alone.first_token_s:.2f} times (half the server: 2)"
            f" with up to {1000 * self.in_flight_s:.0f} ms of steps on the device when it comes,"
            f" rate {self.beside.tokens_per_s / self.alone.tokens_per_s:.2f} times (0.5)"
        )


@contextlib.contextmanager
def greedy_server(folder: Path, *arguments: str, paced: bool = False) -> Iterator[tuple[str, Path]]:
    """The address of a server and its step log; of several engines, what the names of their logs begin with."""
    log, step_times = folder / "steps.jsonl", folder / "step-times.json"
    arguments = ("--step-log", str(log), *arguments)
    environment: dict[str, str] = {}
    if paced:
        table = paced_device()
        step_times.write_bytes(table.encode())
        environment = {WORKER_VARIABLE: "benchmarks.paced.worker", STEP_TIMES_VARIABLE: str(step_times)}
        sizes = ("--num-pages", "4000", "--page-size", str(table.key.page_size), "--token-budget", "512")
        arguments = (*sizes, *arguments)
    with (
        mock.patch.dict(os.environ, environment),
        serving(folder, *arguments, python_path=str(HOOK) if paced else "") as server,
    ):
        yield server.address, log


def paced_device() -> StepTimesFile:
    """With the buckets of an H200."""
    file = StepTimesFile.read(H200_STEP_TIMES)
    return structs.replace(
        file,
        ms={str(time.bucket): even_step_ms(time.bucket) for time in file.table.times},
        ms_per_decode_position=0.0,
        ms_per_prompt_pair=0.0,
        ms_per_chunk_position=0.0,
    )


def compare(address: str, step_log: Path, seconds: float) -> Comparison:
    """The modest client alone, and beside the greedy one."""
    be_modest(address, 1.0, seed=1)  # what a first request pays is not the point
    alone = be_modest(address, seconds / 3, seed=2)
    begun_s = time.monotonic()
    with greedy_process(address):
        time.sleep(3.0)  # its requests fill the server
        beside = be_modest(address, seconds, seed=3)
    logs = step_log.parent.glob(f"{step_log.name}*")  # of several engines each has its own
    lines = (line for log in logs for line in log.read_bytes().splitlines(keepends=True))
    steps = [json.loads(line) for line in lines if line.endswith(b"\n")]
    times_s = sorted(step["finished_s"] - step["started_s"] for step in steps if step["planned_s"] > begun_s)
    return Comparison(alone, beside, 2 * times_s[int(0.99 * len(times_s))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="beside the greedy client")
    parser.add_argument("--greedy", metavar="ADDRESS", help="be the greedy client of a server, for ever")
    parser.add_argument("--slots", type=int, help="requests that the server runs at once; default: its own")
    parser.add_argument("--replicas", type=int, default=1, help="engines of the server")
    parser.add_argument("--paced", action="store_true", help="workers that wait instead of computing")
    options = parser.parse_args()
    if options.greedy is not None:
        be_greedy(options.greedy)
    arguments = [] if options.slots is None else ["--max-num-seqs", str(options.slots)]
    arguments += ["--replicas", str(options.replicas)]
    with (
        tempfile.TemporaryDirectory() as folder,
        greedy_server(Path(folder), *arguments, paced=options.paced) as (address, step_log),
    ):
        print(compare(address, step_log, options.seconds))


if __name__ == "__main__":
    main()
