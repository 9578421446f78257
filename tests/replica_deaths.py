"""Ends engines of a server again and again while many streams run, and counts what its clients lose.

    python -m tests.replica_deaths --times 100
    python -m tests.replica_deaths --times 40 --replicas 2 --kinds engine worker drain
    python -m tests.replica_deaths --times 100 --clients node cpp     # after `make clients`

A server with REPLICAS engines of the embedded model on the CPU in float32, STREAMS requests at a time from a client in
another process. KINDS has what happens to an engine: its scheduler or its worker gets a SIGKILL at a random moment,
whatever it does then, starting included; or it drains and comes back. Each waits until every open stream has a new
token since the one before. With --clients as many streams again are those of programs in these languages.

Afterwards every output must be that of an undisturbed run, token for token, every engine must serve again, and no page
may be held. Prints the median and the longest time until every stream had its next token.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from graphgen import Client, SamplingParams
from graphgen.server.operator import Wish, ask
from tests.ipc.foreign_clients import LANGUAGES, lines_of, prepare, start
from tests.kills import becomes_idle
from tests.serving import ServerProcess, is_alive, serving
from tests.worker_deaths import WAIT_S, Reader, all_have_more, make_requests, wait_for

REPLICAS, STREAMS = 4, 64
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


KINDS = {"drain": drain, "engine": kill("graphgen.scheduler"), "worker": kill("graphgen.worker")}


def run(
    times: int,
    seed: int,
    replicas: int = REPLICAS,
    streams: int = STREAMS,
    kinds: Sequence[str] = ("engine",),
    clients: Sequence[str] = (),
) -> dict[str, float]:
    """Deaths of these kinds in turn. Raises AssertionError when a token is lost, doubled or another, or when something
    is left. The figures otherwise."""
    chance = random.Random(seed)
    left = list(itertools.islice(itertools.cycle(kinds), times))
    resumed_s: list[float] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), "--replicas", str(replicas), *OPTIONS) as server,
        Client(server.address) as client,
    ):
        while left:
            with other_clients(clients, Path(folder), server, client, chance, streams):
                _one_round(server, client, chance, left, streams, resumed_s)
            wait_for(lambda: client.health().ready, "an engine that serves")
        resume_all(server)
        wait_for(lambda: num_serving(client) == replicas, "all engines to serve again")
        assert becomes_idle(client), client.stats()
    return {
        "deaths": times,
        "resumed_p50_s": statistics.median(resumed_s),
        "resumed_max_s": max(resumed_s),
    }


@contextlib.contextmanager
def other_clients(
    names: Sequence[str], folder: Path, server: ServerProcess, client: Client, chance: random.Random, streams: int
) -> Iterator[None]:
    """Programs in other languages have as many streams open; each must get what an undisturbed one gets."""
    started = []
    for language in (one for one in LANGUAGES if one.name in names):
        prepare(language)
        requests = make_requests(chance, streams)
        expected = [list(output.token_ids) for output in client.generate(*map(list, zip(*requests, strict=True)))]
        plan = [{"prompt_ids": prompt, "sampling": as_json(sampling)} for prompt, sampling in requests]
        steps = [{"do": "streams", "requests": plan}]
        started.append((start(language, folder, {"address": server.address, "steps": steps}), expected))
    yield
    for process, expected in started:
        (results,) = lines_of(process)
        assert [result["outputs"][0]["ids"] for result in results] == expected, (
            "another client lost or got a token twice"
        )


def as_json(sampling: SamplingParams) -> dict[str, int | float | bool | None]:
    names = ("max_tokens", "ignore_eos", "temperature", "seed", "presence_penalty")
    return {name: getattr(sampling, name) for name in names}


def num_serving(client: Client) -> int:
    metrics = client.stats().engines
    return sum(engine.serves for engine in metrics)


def _one_round(
    server: ServerProcess,
    client: Client,
    chance: random.Random,
    left: list[str],
    streams: int,
    resumed_s: list[float],
) -> None:
    """Requests from their first token to their last, and as many of the deaths as strike meanwhile."""
    requests = make_requests(chance, streams)
    expected = [output.token_ids for output in client.generate(*map(list, zip(*requests, strict=True)))]
    readers = [Reader(client, *request) for request in requests]
    while left and any(not reader.ended for reader in readers):
        resume_all(server)
        time.sleep(chance.random() * 0.3)
        counts = {reader: len(reader.token_ids) for reader in readers}
        KINDS[left.pop(0)](server, chance)
        resumed_s.append(wait_for(lambda: all_have_more(counts, readers), "everybody's turn"))  # noqa: B023  # called before the next turn
    for reader, token_ids in zip(readers, expected, strict=True):
        reader.thread.join(WAIT_S)
        assert reader.error is None, f"a stream ended with {reader.error!r}\n{server.output}"
        assert reader.token_ids == list(token_ids), "tokens were lost, doubled or changed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replicas", type=int, default=REPLICAS)
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["engine"], help="these, in turn")
    parser.add_argument("--clients", nargs="*", choices=[one.name for one in LANGUAGES], default=[], help="besides")
    options = parser.parse_args()
    figures = run(options.times, options.seed, options.replicas, options.streams, options.kinds, options.clients)
    print(", ".join(f"{name} {value:.3g}" for name, value in figures.items()), "- no token lost or doubled")


if __name__ == "__main__":
    main()
