"""Ends engines of a server again and again while many streams run, and counts what its clients lose.

    python -m tests.replica_deaths --times 100     # Python, Node and C++ clients: after `make clients`
    python -m tests.replica_deaths --times 100 --clients python
    python -m tests.replica_deaths --times 40 --replicas 2 --kinds engine worker --drains 0

A server with REPLICAS engines of the embedded model on the CPU in float32, STREAMS requests at a time, shared among
clients in these languages, each in a process of its own; Python's is this one. KINDS has what happens to an engine: its
scheduler or its worker gets a SIGKILL at a random moment, whatever it does then, starting included. DRAINS times,
evenly between the deaths, one that serves drains and comes back. Each waits until every open stream has a new token
since the one before: a request that three deaths strike without a token between them would fail as poisoned.

Afterwards every output must be that of an undisturbed run, token for token, every engine must serve again, and no page
may be held. Prints how many streams and tokens were compared, and the median and the longest time until every stream
had its next token.
"""

import argparse
import contextlib
import itertools
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from msgspec import Struct

from graphgen import Client, SamplingParams
from graphgen.server.operator import Wish, ask
from tests.ipc.foreign_clients import LANGUAGES
from tests.ipc.foreign_streams import foreign_streams
from tests.kills import becomes_idle
from tests.serving import ServerProcess, is_alive, serving
from tests.worker_deaths import Reader, Reading, all_have_more, check_tokens, make_requests, wait_for

REPLICAS, STREAMS, DRAINS = 4, 64, 20
CLIENTS = ["python", *(one.name for one in LANGUAGES)]
OPTIONS = ("--dtype", "float32", "--cpu-threads", "1", "--num-pages", "400", "--max-num-seqs", "24")


def kill(module: str) -> Callable[[ServerProcess, random.Random], None]:
    """One of the processes that run the module, at random."""

    def strike(server: ServerProcess, chance: random.Random) -> None:
        try:
            pid = chance.choice(server.pids_of(module))
        except (LookupError, FileNotFoundError):  # all of them, or one that was looked at, have just ended
            return
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not is_alive(pid), "its end")

    return strike


def folder_of(server: ServerProcess) -> Path:
    return Path(next(line for line in server.said if "graphgen replicas --server" in line).split("`")[1].split()[-1])


def resume_all(server: ServerProcess) -> None:
    """Those that were killed so often while they started that they are left for a while."""
    folder = folder_of(server)
    for number, state in enumerate(ask(folder, Wish("show")).engines):
        if state == "ended":
            ask(folder, Wish("resume", number))


def drain(server: ServerProcess, chance: random.Random) -> None:
    """One that serves is taken out of service while it has much to do, and comes back."""
    folder = folder_of(server)
    states = ask(folder, Wish("show")).engines
    if states.count("serving") < 2:
        return
    number = chance.choice([one for one, state in enumerate(states) if state == "serving"])
    told = ask(folder, Wish("drain", number, chance.choice([0.0, 0.2, 2.0])))
    assert not told.error, told
    wait_for(lambda: ask(folder, Wish("show")).engines[number] != "draining", "its end")
    told = ask(folder, Wish("resume", number))
    assert not told.error, told


KINDS = {"engine": kill("graphgen.scheduler"), "worker": kill("graphgen.worker")}
EVENTS = {**KINDS, "drain": drain}


class Figures(Struct):
    """What was compared and measured."""

    deaths: int = 0
    drains: int = 0
    streams: int = 0
    tokens: int = 0
    resumed_s: list[float] = []

    def __str__(self) -> str:
        return (
            f"{self.deaths} deaths and {self.drains} drains; {self.streams} streams of {self.tokens} tokens, none lost"
            f" or doubled; every stream went on after {statistics.median(self.resumed_s):.3g} s in the median and"
            f" {max(self.resumed_s):.3g} s at most"
        )


def run(
    times: int,
    seed: int,
    replicas: int = REPLICAS,
    streams: int = STREAMS,
    kinds: Sequence[str] = ("engine",),
    drains: int = 0,
    clients: Sequence[str] = ("python",),
) -> Figures:
    """Deaths of these kinds in turn, and so many drains between them. Raises AssertionError when a token is lost,
    doubled or another, or when something is left. clients: the first is python."""
    chance = random.Random(seed)
    left = events_of(times, kinds, drains)
    figures = Figures()
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), "--replicas", str(replicas), *OPTIONS) as server,
        Client(server.address) as client,
    ):
        while left:
            batches = make_batches(client, chance, streams, clients)
            with contextlib.ExitStack() as stack:
                for batch in batches[1:]:
                    language = next(one for one in LANGUAGES if one.name == batch.client)
                    batch.readers.extend(
                        stack.enter_context(foreign_streams(language, Path(folder), server.address, batch.requests))
                    )
                batches[0].readers.extend(Reader(client, *request) for request in batches[0].requests)
                _one_round(server, client, chance, left, batches, figures)
            wait_for(lambda: client.health().ready, "an engine that serves")
        resume_all(server)
        wait_for(lambda: num_serving(client) == replicas, "all engines to serve again")
        assert becomes_idle(client), client.stats()
    return figures


def events_of(times: int, kinds: Sequence[str], drains: int) -> list[str]:
    """These deaths in turn, with the drains evenly among them."""
    deaths = list(itertools.islice(itertools.cycle(kinds), times))
    places = [(place / max(1, times), kind) for place, kind in enumerate(deaths)]
    places += [((place + 0.5) / drains, "drain") for place in range(drains)]
    return [kind for _, kind in sorted(places)]


class Stream(Reading, Protocol):
    """A request of any client, and why it ended if that was no good end."""

    error: Any


class Batch(NamedTuple):
    """The requests of one client."""

    client: str
    requests: list[tuple[list[int], SamplingParams]]
    expected: list[list[int]]
    """What an undisturbed run gives for them."""
    readers: list[Stream]


def make_batches(client: Client, chance: random.Random, streams: int, names: Sequence[str]) -> list[Batch]:
    """So many requests, shared among clients of these names; none is open yet."""
    batches = []
    for place, name in enumerate(names):
        requests = make_requests(chance, streams // len(names) + (place < streams % len(names)))
        prompts, samplings = map(list, zip(*requests, strict=True))
        expected = [list(output.token_ids) for output in client.generate(prompts, samplings)]
        batches.append(Batch(name, requests, expected, []))
    return batches


def num_serving(client: Client) -> int:
    metrics = client.stats().engines
    return sum(engine.serves for engine in metrics)


def _one_round(
    server: ServerProcess,
    client: Client,
    chance: random.Random,
    left: list[str],
    batches: Sequence[Batch],
    figures: Figures,
) -> None:
    """Requests from their first token to their last, and as many of the deaths as strike meanwhile."""
    readers = [reader for batch in batches for reader in batch.readers]
    while left and any(not reader.ended for reader in readers):
        resume_all(server)
        time.sleep(chance.random() * 0.3)
        counts = {reader: len(reader.token_ids) for reader in readers}
        kind = left.pop(0)
        EVENTS[kind](server, chance)
        figures.deaths += kind != "drain"
        figures.drains += kind == "drain"
        figures.resumed_s.append(wait_for(lambda: all_have_more(counts, readers), "everybody's turn"))  # noqa: B023  # called before the next turn
    wait_for(lambda: all(reader.ended for reader in readers), "the end of every stream")
    for batch in batches:
        for reader, request, token_ids in zip(batch.readers, batch.requests, batch.expected, strict=True):
            assert reader.error is None, (
                f"a stream of the {batch.client} client ended with {reader.error!r}\n{server.output}"
            )
            check_tokens(client, request, reader.token_ids, token_ids)
            figures.streams += 1
            figures.tokens += len(token_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replicas", type=int, default=REPLICAS)
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["engine"], help="these, in turn")
    parser.add_argument("--drains", type=int, default=DRAINS)
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=CLIENTS, help="the first is python")
    options = parser.parse_args()
    if options.clients[0] != "python":
        parser.error("--clients: give python first")
    print(
        run(
            options.times,
            options.seed,
            options.replicas,
            options.streams,
            options.kinds,
            options.drains,
            options.clients,
        )
    )


if __name__ == "__main__":
    main()
