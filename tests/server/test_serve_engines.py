"""`graphgen serve --engines` in real processes: two servers on the CPU in float32 with keys, and a frontend before them
that has no engine of its own. One is killed, comes back, drains and is removed, and no token is lost."""

import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from graphgen import Client, SamplingParams
from graphgen.server.frontend.keys import Keys
from graphgen.server.operator import Wish, ask
from tests.replica_deaths import folder_of
from tests.serving import ServerProcess
from tests.worker_deaths import Reader, wait_for

FRONTEND = "graphgen.server.frontend"
OPTIONS = ("--dtype", "float32", "--cpu-threads", "1", "--num-pages", "200")
SAMPLING = SamplingParams(max_tokens=120, ignore_eos=True, temperature=0.8, seed=3)
PROMPTS = [[1 + number, 5, 6] * 3 for number in range(8)]


class Servers(NamedTuple):
    folder: Path
    keys: Path
    engines: list[ServerProcess]
    frontend: ServerProcess

    def client(self) -> Client:
        return Client(self.frontend.address)

    def state(self, number: int) -> str:
        return ask(folder_of(self.frontend), Wish("show")).engines[number]


def result_of(reader: Reader) -> tuple[int, ...]:
    reader.thread.join(60)
    assert reader.error is None
    assert reader.ended
    return tuple(reader.token_ids)


def engine(folder: Path, name: str, keys: Path, *options: str) -> ServerProcess:
    return ServerProcess(folder / f"{name}.log", *OPTIONS, "--keys", str(keys), *options)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("engines")
    keys = Keys(folder / "keys")
    keys.make(None)
    keys.make("frontend", routes=True)
    started = [engine(folder, name, keys.folder) for name in ("a", "b")]
    try:
        addresses = ",".join(one.wait_ready().address for one in started)
        started.append(
            ServerProcess(
                folder / "frontend.log",
                *("--engines", addresses, "--engine-keys", str(keys.folder), "--http", "127.0.0.1:0"),
            )
        )
        yield Servers(folder, keys.folder, started, started[2].wait_ready())
    finally:
        for one in started:
            if one.process.poll() is None:
                one.process.kill()
                one.process.wait()


@pytest.fixture(scope="module")
def reference(servers: Servers) -> list[tuple[int, ...]]:
    """What one engine alone says."""
    own, server_key = servers.keys / "clients" / "frontend.key_secret", servers.keys / "server.key"
    public = server_key.read_text().split('public-key = "')[1].split('"')[0]
    with Client(servers.engines[0].address, server_key=public, key_file=own) as client:
        return [output.token_ids for output in client.generate(PROMPTS, SAMPLING)]


def test_it_says_what_an_engine_alone_says_over_ggp_and_http(
    servers: Servers, reference: list[tuple[int, ...]]
) -> None:
    with servers.client() as client:
        assert [output.token_ids for output in client.generate(PROMPTS, SAMPLING)] == reference
        greedy = SamplingParams(max_tokens=20, temperature=0.0, stop="\n\n")
        [said] = client.generate(["ROMEO:"], greedy)
        assert [one.finished > 0 for one in client.stats().engines] == [True, True]
        assert client.health().ready
    asked = {"model": "demo", "prompt": "ROMEO:", "max_tokens": 20, "temperature": 0, "stop": "\n\n"}
    request = urllib.request.Request(
        f"{servers.frontend.url}/v1/completions", json.dumps(asked).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert json.load(answer)["choices"][0]["text"] == said.text


def test_a_killed_engine_costs_no_token_and_is_there_again(servers: Servers, reference: list[tuple[int, ...]]) -> None:
    with servers.client() as client:
        readers = [Reader(client, prompt, SAMPLING) for prompt in PROMPTS]
        wait_for(lambda: all(len(reader.token_ids) > 5 for reader in readers), "the first tokens")
        address = servers.engines[1].address
        os.kill(servers.engines[1].process.pid, signal.SIGKILL)
        servers.engines[1].process.wait()
        assert [result_of(reader) for reader in readers] == reference
        assert servers.state(1) == "away"
        servers.engines[1] = engine(servers.folder, "b2", servers.keys, "--bind", address).wait_ready()
        wait_for(lambda: servers.state(1) == "serving", "its return")
        assert [output.token_ids for output in client.generate(PROMPTS, SAMPLING)] == reference


def test_an_engine_drains_and_goes_on_running_and_is_removed_and_added(
    servers: Servers, reference: list[tuple[int, ...]]
) -> None:
    folder = folder_of(servers.frontend)
    with servers.client() as client:
        readers = [Reader(client, prompt, SAMPLING) for prompt in PROMPTS]
        wait_for(lambda: all(len(reader.token_ids) > 5 for reader in readers), "the first tokens")
        told = ask(folder, Wish("remove", grace_s=0.0, address=servers.engines[0].address))
        assert (told.error, told.engine) == ("", 0)
        wait_for(lambda: servers.state(0) == "removed", "its end")
        assert [result_of(reader) for reader in readers] == reference
    assert servers.engines[0].process.poll() is None
    assert not ask(folder, Wish("add", address=servers.engines[0].address)).error
    wait_for(lambda: servers.state(0) == "serving", "its return")


def test_a_frontend_that_is_killed_is_started_again_before_the_same_engines(
    servers: Servers, reference: list[tuple[int, ...]]
) -> None:
    os.kill(servers.frontend.pid_of(FRONTEND), signal.SIGKILL)
    wait_for(lambda: "the frontend serves again" in servers.frontend.said, "its successor")
    with servers.client() as client:
        assert [output.token_ids for output in client.generate(PROMPTS, SAMPLING)] == reference
        wait_for(lambda: all(one.serves for one in client.stats().engines), "both engines")
    assert [servers.state(number) for number in range(2)] == ["serving", "serving"]


def test_a_frontend_that_waits_for_its_engines_ends_when_it_is_asked_to(servers: Servers) -> None:
    """One that was started again while all of them are away. The last test: nothing serves after it."""
    for one in servers.engines[:2]:
        one.process.kill()
        one.process.wait()
    killed = servers.frontend.pid_of(FRONTEND)
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: frontends_of(servers.frontend) not in ([], [killed]), "its successor")
    assert servers.frontend.end() == 0, servers.frontend.output


def frontends_of(server: ServerProcess) -> list[int]:
    """None while processes of the server come and go."""
    try:
        return server.pids_of(FRONTEND)
    except (LookupError, OSError):
        return []
