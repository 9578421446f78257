"""What an operator asks of a server's engines, and what is answered: the socket, the decision, and the command."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
import zmq
from typer.testing import CliRunner

from graphgen import ConfigError, EngineConfig, EngineDeadError
from graphgen.commands.replicas import replicas_app
from graphgen.server import operator
from graphgen.server.operator import SOCKET, EngineState, OperatorSocket, Told, Wish, ask, find_server
from graphgen.server.options import ServeOptions
from graphgen.server.supervisor import Supervisor


class FakeSupervisor:
    """Answers in a thread: each wish has the next of `states` as its outcome."""

    def __init__(self, folder: Path, states: Sequence[EngineState], error: str = "") -> None:
        self.folder = folder
        self.wishes: list[Wish] = []
        self._states = list(states)
        self._error = error
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = OperatorSocket(self._context, folder)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.wait(0.005):
            self._socket.serve(self._answer)

    def _answer(self, wish: Wish) -> Told:
        self.wishes.append(wish)
        state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        return Told(("serving", state), self._error)

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._socket.close()
        self._context.term()


@pytest.fixture
def draining(tmp_path: Path) -> Iterator[FakeSupervisor]:
    supervisor = FakeSupervisor(tmp_path, ["draining", "draining", "drained"])
    yield supervisor
    supervisor.close()


def test_the_command_asks_and_waits_until_it_is_done(draining: FakeSupervisor) -> None:
    result = CliRunner().invoke(replicas_app, ["drain", "1", "--grace-s", "2.5", "--server", str(draining.folder)])
    assert result.exit_code == 0
    assert result.output == "engine 1  drained\n"
    assert draining.wishes[0] == Wish("drain", 1, 2.5)
    assert draining.wishes[1:] == [Wish("show")] * 2


def test_the_states_are_shown(draining: FakeSupervisor) -> None:
    result = CliRunner().invoke(replicas_app, ["show", "--server", str(draining.folder)])
    assert result.output == "engine 0  serving\nengine 1  draining\n"


def test_what_cannot_be_is_told_and_the_command_fails(tmp_path: Path) -> None:
    supervisor = FakeSupervisor(tmp_path, ["serving"], "engine 1 is the only one that serves")
    try:
        result = CliRunner().invoke(replicas_app, ["drain", "1", "--server", str(tmp_path)])
    finally:
        supervisor.close()
    assert result.exit_code == 1
    assert "only one that serves" in result.output


@pytest.mark.parametrize("engine", [str(10**20), "1000001"])
def test_a_number_that_no_engine_has_is_refused_before_anybody_is_asked(engine: str, draining: FakeSupervisor) -> None:
    result = CliRunner().invoke(replicas_app, ["drain", engine, "--server", str(draining.folder)])
    assert isinstance(result.exception, ConfigError)
    assert f"there is no engine {engine}: `graphgen replicas show`" in str(result.exception)
    assert draining.wishes == []


@pytest.mark.parametrize("engine", [str(10**20), "9" * 5000, "²", "tcp://a:1"])
def test_what_is_no_number_of_an_engine_is_an_address(engine: str, tmp_path: Path) -> None:
    supervisor = FakeSupervisor(tmp_path, ["serving"], "there is no such engine")
    try:
        result = CliRunner().invoke(replicas_app, ["remove", engine, "--server", str(tmp_path)])
    finally:
        supervisor.close()
    assert (result.exit_code, supervisor.wishes[0].address) == (1, engine)


@pytest.mark.parametrize("grace_s", ["inf", "86400.1"])
def test_a_grace_without_end_is_refused(grace_s: str, draining: FakeSupervisor) -> None:
    result = CliRunner().invoke(replicas_app, ["drain", "1", "--grace-s", grace_s, "--server", str(draining.folder)])
    assert f"grace_s is {grace_s}, the limit is 86400: lower it" in str(result.exception)
    assert draining.wishes == []


def test_what_is_no_wish_is_answered_and_harms_nothing(draining: FakeSupervisor) -> None:
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.connect(f"ipc://{draining.folder / SOCKET}")
        socket.send(b"\xc1")
        assert "no wish" in msgspec.msgpack.decode(socket.recv(), type=Told).error
    assert ask(draining.folder, Wish("show")).engines == ("serving", "draining")


def test_a_server_that_is_not_there_or_does_not_answer_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "ANSWER_S", 0.1)
    with pytest.raises(EngineDeadError, match="no server answers in"):
        ask(tmp_path, Wish("show"))
    with pytest.raises(ConfigError, match="no folder of a server"):
        find_server(str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ConfigError, match="no server of this user runs here"):
        find_server(None)
    for name in ("graphgen-a", "graphgen-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / SOCKET).touch()
        if name == "graphgen-a":
            assert find_server(None) == tmp_path / name
    with pytest.raises(ConfigError, match="several servers run here"):
        find_server(None)


@pytest.mark.parametrize(
    ("states", "wish", "reason"),
    [
        (["serving", "serving"], Wish("drain", 1), ""),
        (["serving", "serving"], Wish("drain", 2), "there is no engine 2: they are 0 to 1"),
        (["serving", "serving"], Wish("drain", -1), "there is no engine -1"),
        (["starting", "serving"], Wish("drain", 1), "engine 1 is the only one that serves"),
        (["serving", "starting"], Wish("drain", 1), "engine 1 is starting"),
        (["serving", "draining"], Wish("resume", 1), "engine 1 is draining: it needs no resume"),
        (["serving", "drained"], Wish("resume", 1), ""),
        (["serving", "ended"], Wish("resume", 1), ""),
        (["ended", "ended"], Wish("show", 9), ""),
    ],
)
def test_what_the_supervisor_does_not_do_it_says_why(states: list[EngineState], wish: Wish, reason: str) -> None:
    options = ServeOptions(data="tcp://127.0.0.1:*", control="tcp://127.0.0.1:*")
    supervisor = Supervisor(EngineConfig(device="cpu", replicas=2), options, print)
    supervisor._states = states
    found = supervisor._why_not(wish, 2)
    assert found.startswith(reason)
    assert bool(found) is bool(reason)
