"""`graphgen serve --frontends` as a whole: each serves alone, and the death of one is nobody else's business."""

import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from graphgen import Client, GraphgenError, SamplingParams
from graphgen.server.operator import EngineState, Wish, ask
from tests.serving import START_TIMEOUT_S, ServerProcess, free_address, serving

FRONTEND = "graphgen.server.frontend"
LONG = SamplingParams(max_tokens=80, temperature=0.0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    options = ("--bind", free_address(4), "--frontends", "2", "--http", "127.0.0.1:0", "--http-workers", "2")
    with serving(tmp_path_factory.mktemp("frontends"), *options) as server:
        yield server


def tokens_of(client: Client, prompt: str, sampling: SamplingParams) -> list[int]:
    (output,) = client.generate([prompt], sampling)
    return list(output.token_ids)


def wait_until(holds: Callable[[], bool], server: ServerProcess) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline_s, server.output
        time.sleep(0.05)


class Reader(threading.Thread):
    """Reads one stream; `has_begun` when its first token has come."""

    def __init__(self, client: Client, prompt: str) -> None:
        super().__init__(daemon=True)
        self._stream = client.stream(prompt, LONG)
        self.token_ids: list[int] = []
        self.error: GraphgenError | None = None
        self.has_begun = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            for piece in self._stream:
                self.token_ids += piece.token_ids
                self.has_begun.set()
        except GraphgenError as error:
            self.error = error


def test_both_serve_the_same_model_at_addresses_of_their_own(server: ServerProcess) -> None:
    first, second = server.addresses
    assert int(second.rpartition(":")[2]) == int(first.rpartition(":")[2]) + 2
    with Client(first) as one, Client(second) as other:
        assert one.info.instance != other.info.instance
        assert one.info.frontends == other.info.frontends == [first, second]
        assert tokens_of(one, "ROMEO:", SHORT) == tokens_of(other, "ROMEO:", SHORT)
        assert one.stats().finished == other.stats().finished >= 2, "the engine's counts are whole at each"
        assert one.health().ready
        assert other.health().ready


def test_one_is_killed_while_streams_of_the_other_go_on_and_it_comes_back(server: ServerProcess) -> None:
    """With exact tokens; the engine does not go on with what nobody reads any more."""
    victim, survivor = server.pids_of(FRONTEND)
    with Client(server.addresses[1]) as client:
        expected = {prompt: tokens_of(client, prompt, LONG) for prompt in ("ROMEO:", "JULIET:")}
        with Client(server.addresses[0]) as lost:
            doomed = Reader(lost, "KING:")
            readers = {prompt: Reader(client, prompt) for prompt in expected}
            for reader in (doomed, *readers.values()):
                assert reader.has_begun.wait(60)
            os.kill(victim, signal.SIGKILL)
            for prompt, reader in readers.items():
                reader.join(60)
                assert reader.error is None
                assert reader.token_ids == expected[prompt], "not one is lost, nor comes twice"
            doomed.join(60)
            assert doomed.error is not None
        wait_until(lambda: "the frontend 0 serves again" in server.said, server)
        assert survivor in server.pids_of(FRONTEND)
        assert len(server.pids_of(FRONTEND)) == 2
        with Client(server.addresses[0]) as again:
            assert tokens_of(again, "ROMEO:", LONG) == expected["ROMEO:"]
        stats = client.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.pages_free == stats.pages_total


def test_a_gateway_shows_what_all_frontends_count(server: ServerProcess) -> None:
    def counted() -> float:
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return float(next(line for line in lines if line.startswith("graphgen_output_tokens_total ")).split()[1])

    before = counted()
    for address in server.addresses:
        with Client(address) as client:
            tokens_of(client, "HAMLET:", SHORT)
    for _ in range(4):  # each connection may reach another gateway, of another frontend
        assert counted() == before + 8


def test_engines_die_and_drain_for_all_frontends(tmp_path: Path) -> None:
    """Each frontend moves its own requests, and an engine ends when neither has any left there."""
    with serving(tmp_path, "--bind", free_address(4), "--frontends", "2", "--replicas", "2") as server:
        clients = [Client(address) for address in server.addresses]
        expected = tokens_of(clients[0], "ROMEO:", LONG)
        readers = [Reader(client, "ROMEO:") for client in clients for _ in range(3)]
        for reader in readers:
            assert reader.has_begun.wait(60)
        os.kill(server.pids_of("graphgen.scheduler")[0], signal.SIGKILL)
        for reader in readers:
            reader.join(60)
            assert (reader.error, reader.token_ids) == (None, expected)
        wait_until(lambda: any(line.endswith("serves again") for line in server.said), server)
        folder = Path(next(line for line in server.said if "graphgen replicas" in line).split()[3].strip("`"))
        wishes: tuple[tuple[Wish, EngineState], ...] = (
            (Wish("drain", 1, 5.0), "drained"),
            (Wish("resume", 1), "serving"),
        )
        for wish, state in wishes:
            assert not ask(folder, wish).error
            wait_until(partial(is_known_as, folder, state, clients), server)
            assert [tokens_of(client, "ROMEO:", SHORT) for client in clients] == [expected[:4]] * 2
        for client in clients:
            client.close()


def is_known_as(folder: Path, state: EngineState, clients: Sequence[Client]) -> bool:
    """Engine 1, to the operator and to all frontends."""
    serves = [client.stats().engines[1].serves for client in clients]
    return ask(folder, Wish("show")).engines[1] == state and serves == [state == "serving"] * len(clients)


def test_all_of_them_drain(tmp_path: Path) -> None:
    with serving(tmp_path, "--bind", free_address(4), "--frontends", "2") as server:
        clients = [Client(address) for address in server.addresses]
        readers = [Reader(client, "ROMEO:") for client in clients]
        for reader in readers:
            assert reader.has_begun.wait(60)
        assert server.end(timeout_s=60) == 0
        for reader in readers:
            reader.join(10)
            assert reader.error is None
            assert len(reader.token_ids) == LONG.max_tokens
        for client in clients:
            client.close()
