"""`graphgen serve` as a whole: what clients read, and how it ends, is killed and comes back."""

import asyncio
import contextlib
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

import graphgen
from graphgen import (
    AsyncClient,
    Client,
    ConnectionLostError,
    DeadlineError,
    Engine,
    EngineDeadError,
    GraphgenError,
    InvalidRequestError,
    OverloadedError,
    PromptTooLongError,
    SamplingParams,
    ServerError,
)
from graphgen.base.memory import data_bytes
from graphgen.base.signals import SAME_S
from graphgen.ipc.ggp.messages import Accepted, Delta, Error, Generate, Ping, Sampling
from graphgen.server.frontend.monitor import FRESH_S
from tests import ROOT
from tests.frontend.harness import wait_until
from tests.frontend.raw_peers import send_without_end
from tests.ipc.raw_client import RawClient
from tests.kills import becomes_idle, kill_a_client
from tests.serving import START_TIMEOUT_S, ServerProcess, is_alive, serving

PROMPTS = [
    f"{name}:\n{line}" for name in ("ROMEO", "JULIET", "HAMLET", "First Citizen", "KING") for line in "abcdefghij"
]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)


POISON = """
import sys
if any(name in sys.orig_argv for name in ("graphgen.scheduler", "graphgen.server.frontend")):
    import pickle, pathlib
    def refuse(*_args, **_kwargs):
        pathlib.Path(__file__).with_name("pickled").write_text(repr(sys.orig_argv))
        raise AssertionError("something was unpickled")
    pickle.load = pickle.loads = pickle.Unpickler = pickle._Unpickler = refuse
    pathlib.Path(__file__).with_name(sys.orig_argv[3]).touch()
"""
"""Imported by every Python process that has its folder on the path: unpickling leaves a file and fails."""


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trap")
    (folder / "sitecustomize.py").write_text(POISON)
    return folder


@pytest.fixture(scope="module")
def server(trap: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("serve")
    with serving(folder, "--memory-limit-mib", "128", python_path=str(trap)) as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def test_fifty_streams_at_once_read_what_the_engine_makes(server: ServerProcess) -> None:
    with Engine(device="cpu") as engine:
        expected = engine.generate(PROMPTS, GREEDY)

    async def read_all() -> list[tuple[str, list[int], str | None]]:
        async with await AsyncClient.create(server.address) as client:

            async def read(prompt: str) -> tuple[str, list[int], str | None]:
                text, ids, reason = "", list[int](), None
                async for piece in client.generate(prompt, GREEDY):
                    text, reason = text + piece.text, piece.finish_reason
                    ids += piece.token_ids
                return text, ids, reason

            return await asyncio.gather(*map(read, PROMPTS))

    assert asyncio.run(read_all()) == [
        (output.text, list(output.token_ids), output.finish_reason) for output in expected
    ]
    with Client(server.address) as client:
        whole = client.generate(PROMPTS, GREEDY)
    assert [(output.text, output.prompt_token_ids) for output in whole] == [
        (output.text, output.prompt_token_ids) for output in expected
    ]


def test_samples_are_those_of_an_engine(client: Client) -> None:
    sampling = SamplingParams(n=3, seed=5, max_tokens=8)
    alone = [SamplingParams(seed=5 + sample, max_tokens=8) for sample in range(3)]
    outputs = client.generate("ROMEO:", sampling)
    assert [output.sample_index for output in outputs] == [0, 1, 2]
    assert [output.text for output in outputs] == [client.generate("ROMEO:", one)[0].text for one in alone]
    texts = ["", "", ""]
    for piece in client.stream("ROMEO:", sampling):
        texts[piece.sample_index] += piece.text
    assert texts == [output.text for output in outputs]


def test_a_prompt_that_was_seen_is_cached_within_its_salt(server: ServerProcess, client: Client) -> None:
    prompt = [[7] * 100]
    first, again = (client.generate(prompt, SamplingParams(max_tokens=2))[0] for _ in range(2))
    with Client(server.address) as other:
        elsewhere = other.generate(prompt, SamplingParams(max_tokens=2))[0]
        salted = other.generate(prompt, SamplingParams(max_tokens=2, cache_salt="mine"))[0]
    assert (first.cached_tokens, salted.cached_tokens) == (0, 0)
    assert again.cached_tokens == elsewhere.cached_tokens > 80


def test_what_cannot_meet_its_deadline_is_refused_or_ended(client: Client) -> None:
    with pytest.raises((OverloadedError, DeadlineError)):
        client.generate("ROMEO:", SamplingParams(max_tokens=900, ignore_eos=True, deadline_ms=50.0))
    assert becomes_idle(client)


def test_leaving_a_stream_frees_its_pages(client: Client) -> None:
    with client.stream("ROMEO:", SamplingParams(max_tokens=900)) as stream:
        next(stream)
        assert client.stats().open_requests == 1
    assert becomes_idle(client)


def test_errors_are_those_of_an_engine(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="empty"):
        client.generate("")
    with pytest.raises(InvalidRequestError, match="vocabulary is 0 to 1023"):
        client.generate([5000])
    with pytest.raises(PromptTooLongError, match="max_model_len is 1024"):
        client.generate([[1] * 2000])
    with pytest.raises(InvalidRequestError, match="surrogates"):
        client.generate("\ud800")
    with pytest.raises(InvalidRequestError, match="plain ints"):
        client.generate([[1, "2"]])  # type: ignore[arg-type]  # what an untyped program may do
    with pytest.raises(InvalidRequestError, match="which no request may set"):
        client.generate(graphgen.Chat([{"role": "user", "content": "Hi"}], chat_template_kwargs={"messages": ""}))
    assert client.generate("ROMEO:", GREEDY)[0].finish_reason == "length"


def test_more_prompts_than_a_client_may_have_open_are_sent_in_turn(client: Client) -> None:
    many = client.info.limits.open_requests + 40
    outputs = client.generate([[1, 2, 3]] * many, SamplingParams(max_tokens=2, temperature=0.0))
    assert len({output.token_ids for output in outputs}) == 1
    assert len(outputs) == many


def test_health_comes_from_the_worker(server: ServerProcess, client: Client) -> None:
    assert client.health().ready
    time.sleep(2 * FRESH_S)
    worker = server.pid_of("graphgen.worker")
    os.kill(worker, signal.SIGSTOP)
    try:
        health = client.health()
    finally:
        os.kill(worker, signal.SIGCONT)
    assert (health.status, health.ready) == ("stalled", False)
    # What was asked while it stood still is answered late, which counts as stalled for FRESH_S.
    assert wait_until(lambda: client.health().ready)


def test_neither_frontend_nor_client_loads_torch(server: ServerProcess) -> None:
    for module in ("graphgen.server.frontend", "graphgen.scheduler"):
        assert "libtorch" not in Path(f"/proc/{server.pid_of(module)}/maps").read_text(), module
    code = f"""
        import sys
        from graphgen import Client, SamplingParams
        with Client({server.address!r}) as client:
            client.generate("ROMEO:", SamplingParams(max_tokens=2))
        assert not {{"torch", "transformers", "tokenizers"}} & set(sys.modules)
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def test_pages_of_a_killed_client_are_free_within_three_seconds(server: ServerProcess, client: Client) -> None:
    chance = random.Random(1)
    phases = set()
    for _ in range(4):
        phases.add(kill_a_client(server, chance))
        assert becomes_idle(client)
    assert len(phases) > 1


def test_the_readmes_client_runs(server: ServerProcess) -> None:
    readme = (ROOT / "README.md").read_text()
    (program,) = re.findall(r"```py\n(.*?)```", readme, re.DOTALL)
    assert "Client()" in program
    program = program.replace("Client()", f"Client({server.address!r})")
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "ROMEO" in done.stdout or len(done.stdout) > 100


def test_a_stopped_reader_gets_every_token_when_it_wakes(server: ServerProcess, tmp_path: Path) -> None:
    code = """
        import sys
        from graphgen import Client, SamplingParams
        with Client(sys.argv[1]) as client:
            stream = client.stream([5], SamplingParams(max_tokens=300, ignore_eos=True, temperature=0.0))
            ids = list(next(stream).token_ids)
            print("begun", flush=True)
            for piece in stream:
                ids += piece.token_ids
            print(ids)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), server.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"begun\n"
        reader.send_signal(signal.SIGSTOP)
        with Client(server.address) as other:
            expected = other.generate([[5]], SamplingParams(max_tokens=300, ignore_eos=True, temperature=0.0))[0]
        reader.send_signal(signal.SIGCONT)
        assert reader.stdout.read().decode().strip() == str(list(expected.token_ids))


def test_a_message_without_end_ends_neither_engine_nor_frontend(server: ServerProcess, client: Client) -> None:
    """libzmq keeps a message's frames until its last one: no limit of its own ends that."""
    pids = [server.pid_of(f"graphgen.{name}") for name in ("worker", "scheduler", "server.frontend")]
    assert client.generate("ROMEO:", GREEDY)[0].finish_reason == "length"
    assert send_without_end(server.address, 1 << 17) < 256 << 20
    assert client.generate("ROMEO:", GREEDY)[0].finish_reason == "length"
    assert pids == [server.pid_of(f"graphgen.{name}") for name in ("worker", "scheduler", "server.frontend")]


def wait_for_frontend(server: ServerProcess, starts: int) -> None:
    """Until it has been started anew so many times."""
    deadline_s = time.monotonic() + 15
    while server.output.count("serves again") < starts:
        assert time.monotonic() < deadline_s, server.output
        time.sleep(0.05)


def only_a_ping_tells(client: RawClient) -> None:
    """That the frontend died, as PROTOCOL.md says: libzmq reconnects without a word."""
    document = (ROOT / "ipc" / "PROTOCOL.md").read_text()
    assert "a client that only waits hears nothing more, and learns of it by the answer to its next `ping`" in document
    with contextlib.suppress(zmq.Again):
        while isinstance(client.receive_any(), Delta):  # what was on its way
            pass
        pytest.fail("something was said")
    client.send(Ping())
    assert client.receive(Error).code == "no_session"
    assert client.hello().session


def test_a_frontend_that_dies_is_replaced_and_the_engine_stays(server: ServerProcess, client: Client) -> None:
    worker, frontend = server.pid_of("graphgen.worker"), server.pid_of("graphgen.server.frontend")
    stream = client.stream("ROMEO:", SamplingParams(max_tokens=900))
    next(stream)
    with RawClient(server.address, timeout_ms=1500) as silent:
        silent.hello()
        silent.send(Generate(id=1, text="ROMEO:", sampling=Sampling(max_tokens=900, ignore_eos=True)))
        silent.receive(Accepted)
        starts = server.output.count("serves again")
        os.kill(frontend, signal.SIGKILL)
        wait_for_frontend(server, starts + 1)
        only_a_ping_tells(silent)
    # Its next request finds the session gone, says hello again, and is sent again; the stream is lost.
    assert client.generate("ROMEO:", GREEDY)[0].finish_reason == "length"
    with pytest.raises(ConnectionLostError):
        list(stream)
    assert becomes_idle(client), "the requests of the one that died are cancelled"
    assert server.pid_of("graphgen.worker") == worker
    assert server.pid_of("graphgen.server.frontend") != frontend


def test_no_number_of_dead_frontends_ends_the_engine(server: ServerProcess, client: Client) -> None:
    worker, starts = server.pid_of("graphgen.worker"), server.output.count("serves again")
    for number in range(6):
        os.kill(server.pid_of("graphgen.server.frontend"), signal.SIGKILL)
        wait_for_frontend(server, starts + number + 1)
    assert client.generate("ROMEO:", GREEDY)[0].finish_reason == "length"
    assert server.pid_of("graphgen.worker") == worker


def test_a_second_signal_ends_at_once_with_typed_errors(tmp_path: Path) -> None:
    with serving(tmp_path) as server, Client(server.address) as client:
        stream = client.stream("ROMEO:", SamplingParams(max_tokens=900, ignore_eos=True))
        next(stream)
        failures: list[GraphgenError] = []

        def read() -> None:
            try:
                list(stream)
            except GraphgenError as failure:
                failures.append(failure)

        reader = threading.Thread(target=read)
        reader.start()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(SAME_S + 0.1)
        begun_s = time.monotonic()
        assert server.end(signal.SIGTERM) == 1
        assert time.monotonic() - begun_s < 3
        reader.join(5)
        assert isinstance(failures[0], ServerError)
        assert failures[0].code == "draining"


def test_a_dead_engine_is_started_again_and_its_requests_get_an_error_that_says_so(tmp_path: Path) -> None:
    with serving(tmp_path) as server, Client(server.address) as client:
        stream = client.stream("ROMEO:", SamplingParams(max_tokens=900, ignore_eos=True))
        next(stream)
        frontend, worker = server.pid_of("graphgen.server.frontend"), server.pid_of("graphgen.worker")
        os.kill(server.pid_of("graphgen.scheduler"), signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="scheduler"):
            list(stream)
        assert not client.health().ready
        with pytest.raises(EngineDeadError, match="is being started again"):
            client.generate("ROMEO:", GREEDY)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not client.health().ready:
            assert time.monotonic() < deadline_s, server.output
            time.sleep(0.05)
        assert len(client.generate("ROMEO:", GREEDY)[0].token_ids) > 0
        assert client.stats().open_requests == 0
        assert server.pid_of("graphgen.server.frontend") == frontend, "its clients keep their sessions"
        assert not is_alive(worker)
        assert "the scheduler process was killed by SIGKILL" in server.output
        assert "the engine serves again" in server.output
        assert server.end() == 0


def test_a_dead_worker_costs_no_token_and_clients_and_operators_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path) as server, caplog.at_level(logging.INFO, "graphgen"), Client(server.address) as client:
        stream = client.stream("ROMEO:", SamplingParams(max_tokens=300, ignore_eos=True))
        num_tokens = len(next(stream).token_ids)
        os.kill(server.pid_of("graphgen.worker"), signal.SIGKILL)
        assert num_tokens + sum(len(piece.token_ids) for piece in stream) == 300
        stats = client.stats()
        assert (stats.worker_restarts, stats.poisoned, stats.numerical_errors) == (1, 0, 0)
        assert stats.worker_loss
        told = [text.partition(": ")[2] for text in caplog.messages if text.startswith(f"{server.address}: ")]
        assert [stats.worker_loss in told[0], "a new worker serves" in told[1]] == [True, True]
        assert all(text in server.output for text in told)
        assert server.end() == 0


def test_an_address_in_use_stops_the_start(server: ServerProcess, tmp_path: Path) -> None:
    late = ServerProcess(tmp_path / "late.log", "--bind", server.address)
    assert late.process.wait(60) == 2
    assert f"{server.address} cannot be bound" in " ".join(late.output.split())


def test_an_ipc_address_is_served_by_one_server_and_left_as_it_was(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="gg") as folder:
        address = f"ipc://{folder}/g.sock"
        (Path(folder) / "g.txt").write_text("precious")
        with serving(tmp_path, "--bind", address) as server, Client(address) as client:
            for taken, why in ((address, "in use by another server"), (f"ipc://{folder}/g.txt", "is a file")):
                late = ServerProcess(tmp_path / "late.log", "--bind", taken)
                assert late.process.wait(60) == 2
                assert why in " ".join(late.output.split())
            assert client.generate("ROMEO:", GREEDY)[0].finish_reason == "length"
            os.kill(server.pid_of("graphgen.server.frontend"), signal.SIGKILL)
            wait_for_frontend(server, 1)
            assert client.generate("ROMEO:", GREEDY)[0].finish_reason == "length"
            assert server.end() == 0
        assert [path.name for path in Path(folder).iterdir()] == ["g.txt"]
        with serving(tmp_path, "--bind", address) as server:
            os.kill(server.pid_of("graphgen.scheduler"), signal.SIGKILL)
            deadline_s = time.monotonic() + START_TIMEOUT_S
            while "the engine serves again" not in server.output:
                assert time.monotonic() < deadline_s, server.output
                time.sleep(0.05)
            assert server.end() == 0
        assert [path.name for path in Path(folder).iterdir()] == ["g.txt"]


def test_a_public_address_without_keys_is_refused_before_anything_starts(tmp_path: Path) -> None:
    begun_s = time.monotonic()
    late = ServerProcess(tmp_path / "late.log", "--bind", "tcp://0.0.0.0:0")
    assert late.process.wait(30) == 2
    assert "insecure-public" in " ".join(late.output.split())
    assert time.monotonic() - begun_s < 20


def test_nothing_is_unpickled_in_scheduler_or_frontend(trap: Path, client: Client) -> None:
    assert client.generate("ROMEO:", GREEDY)[0].finish_reason == "length"
    client.health()
    client.stats()
    assert (trap / "graphgen.scheduler").exists(), "the trap was set"
    assert (trap / "graphgen.server.frontend").exists()
    assert not (trap / "pickled").exists()


def test_the_frontends_memory_is_limited(tmp_path: Path) -> None:
    code = """
        from graphgen.base.memory import limit_memory
        limit_memory(64 << 20)
        kept = [bytes(1 << 20) for _ in range(32)]
        try:
            while True:
                kept.append(b"x" * (1 << 20))
        except MemoryError:
            print(len(kept))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert 50 <= int(done.stdout) <= 64
    assert data_bytes() > 0


def test_a_server_drains(server: ServerProcess) -> None:
    """The last test of the server that all the others use."""
    with Client(server.address) as client:
        stream = client.stream("ROMEO:", SamplingParams(max_tokens=200, ignore_eos=True))
        first = next(stream)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(ServerError, match="about to end") as refused:
            client.generate("JULIET:")
        assert (refused.value.code, refused.value.retryable) == ("draining", True)
        rest = list(stream)
        assert len(first.token_ids) + sum(len(piece.token_ids) for piece in rest) == 200
        assert server.process.wait(10) == 0
