"""What the supervisor decides, over a real channel to a frontend and processes that a test is: no engine runs."""

import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import pytest
import zmq

from graphgen import ConfigError, EngineConfig, EngineDeadError
from graphgen.ipc.channel import Channel
from graphgen.ipc.engine_messages import Notice
from graphgen.ipc.server_messages import (
    Drain,
    Drained,
    EngineLost,
    EngineServes,
    FrontendToSupervisor,
    Listening,
    SupervisorToFrontend,
)
from graphgen.ipc.worker_messages import Failed
from graphgen.launch.processes import Exit
from graphgen.launch.starts import MAX_STARTS
from graphgen.server import frontends, supervisor
from graphgen.server.frontend.settings import FrontendSettings, settings_file
from graphgen.server.options import ServeOptions
from graphgen.server.supervisor import Supervisor
from tests.fakes import READY, FakeProcesses
from tests.serving import free_address

WHERE = Listening("tcp://127.0.0.1:41001", "tcp://127.0.0.1:41002")


class Wishes:
    """The signals that a test sends."""

    def __init__(self) -> None:
        self.num_wishes = 0
        self.ignored = False

    def ignore(self) -> None:
        self.ignored = True


class Processes(FakeProcesses):
    """`dead`: what has ended, by name. `starts`: the settings of each frontend that was started."""

    def __init__(self) -> None:
        self.dead: dict[str, Exit] = {}
        self.starts: list[FrontendSettings] = []
        self.killed: list[str] = []
        self.num_refused = 0
        self.num_engines = 1
        self.found = threading.Event()  # that something is dead
        super().__init__()

    def start(self, module: str, descriptors: Sequence[int] = (), number: int | None = None) -> None:
        if self.num_refused:
            self.num_refused -= 1
            raise OSError("no descriptors")
        assert module == frontends.MODULE
        assert number is not None, "frontends are told apart"
        self.dead.pop(f"frontend-{number}", None)
        self.starts.append(FrontendSettings.read(settings_file(self.folder, number)))

    def finish(self, names: Sequence[str], number: int, grace_s: float) -> None:
        if number == signal.SIGKILL:
            self.killed += names

    def restart_scheduler(self) -> None:
        self.num_engines += 1
        del self.dead["scheduler"]

    def find_exit(self, names: Collection[str] | None = None) -> Exit | None:
        found = next((one for name, one in self.dead.items() if names is None or name in names), None)
        if found is not None:
            self.found.set()
        return found


class Rig:
    """A supervisor in a thread, and the frontends' ends of its channels."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, num_frontends: int = 1, grace_s: float = 7.0, **config: float
    ) -> None:
        self.processes = Processes()
        self.wishes = Wishes()
        self.said: list[str] = []
        self.outcome: object = None
        monkeypatch.setattr(supervisor, "EngineProcesses", lambda *_, **__: self.processes)
        monkeypatch.setattr(supervisor, "EndSignals", lambda: self.wishes)
        monkeypatch.setattr(supervisor, "LOST_GRACE_S", 1.0)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.frontends: list[Channel[FrontendToSupervisor, SupervisorToFrontend]] = [
            Channel(self._context, self.processes.folder, f"frontend-{number}", "lower", SupervisorToFrontend)
            for number in range(num_frontends)
        ]
        self.frontend = self.frontends[0]
        options = ServeOptions(data="tcp://127.0.0.1:*", control="tcp://127.0.0.1:*", grace_s=grace_s)
        if num_frontends > 1:
            options = ServeOptions(data=free_address(2 * num_frontends), frontends=num_frontends, grace_s=grace_s)
        self.options = options
        engine = EngineConfig(device="cpu", **config)  # type: ignore[arg-type]  # settings of a test
        self._supervisor = Supervisor(engine, options, self.said.append)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self.wait_until(lambda: len(self.processes.starts) == num_frontends, 30.0)

    def _run(self) -> None:
        try:
            self.outcome = self._supervisor.run()
        except Exception as error:
            self.outcome = error

    def listen(self) -> None:
        for frontend in self.frontends:
            frontend.send(READY)
            frontend.send(WHERE)
        self.wait_until(lambda: "ready" in self.said)

    def lose_engine(self, code: int = -9) -> EngineLost:
        """What the frontend is told when the scheduler ends."""
        self.processes.dead["scheduler"] = Exit("scheduler", code, "")
        lost = self.frontend.receive(5)
        assert isinstance(lost, EngineLost)
        assert "scheduler" in lost.message
        return lost

    def lose_engine_for_good(self) -> None:
        """The last death that another start is worth; it is the next one that ends the server."""
        for _ in range(MAX_STARTS):
            assert self.lose_engine().restarts
            self.wait_until(lambda: not self.processes.dead)

    def wait_until(self, holds: Callable[[], bool], timeout_s: float = 5.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline_s, (self.said, self.outcome)
            time.sleep(0.01)

    def hold(self, go_on: threading.Event) -> None:
        """The supervisor stands still until the event is set."""
        stopped = threading.Event()

        def say(text: str) -> None:
            self.said.append(text)
            stopped.set()
            go_on.wait(5)

        self._supervisor._say = say
        self.frontend.send(Notice("the last one for now"))
        assert stopped.wait(5)

    def ended(self) -> object:
        """What `run` returned or raised."""
        self.thread.join(5)
        assert not self.thread.is_alive()
        return self.outcome

    def close(self) -> None:
        for frontend in self.frontends:
            frontend.send(Drained(0))
        self.thread.join(5)
        for frontend in self.frontends:
            frontend.close()
        self._context.term()
        self.processes.stop(0.0)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    rig = Rig(monkeypatch)
    yield rig
    rig.close()


def test_more_engines_than_there_can_be_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "EndSignals", Wishes)
    options = ServeOptions(data="tcp://127.0.0.1:*", control="tcp://127.0.0.1:*")
    with pytest.raises(ConfigError, match=f"replicas is {10**20}"):
        Supervisor(EngineConfig(device="cpu", replicas=10**20), options, print).run()


def test_ready_is_said_when_the_frontend_listens_and_not_before(rig: Rig) -> None:
    rig.frontend.send(READY)
    time.sleep(0.2)
    assert rig.said == []
    rig.listen()
    assert f"listening on {WHERE.data} (data)\nlistening on {WHERE.control} (control)" in rig.said


@pytest.mark.parametrize(("num_lost", "code"), [(0, 0), (3, 1)])
def test_the_exit_code_says_whether_a_request_was_lost(rig: Rig, num_lost: int, code: int) -> None:
    rig.listen()
    rig.frontend.send(Drained(num_lost))
    assert rig.ended() == code
    assert rig.processes.stopped
    assert rig.wishes.ignored, "a signal on the way out changes nothing"


def test_a_first_signal_drains_and_a_second_one_ends(rig: Rig) -> None:
    rig.listen()
    rig.wishes.num_wishes = 1
    assert rig.frontend.receive(5) == Drain(7.0)
    assert rig.frontend.receive(0.3) is None, "one wish is told once"
    rig.wishes.num_wishes = 2
    assert rig.frontend.receive(5) == Drain(0.0)


def test_a_frontend_that_does_not_answer_is_killed_soon_after_a_second_signal(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FORCED_END_S", 0.5)
    rig.listen()
    rig.wishes.num_wishes = 1
    assert rig.frontend.receive(5) == Drain(7.0)
    time.sleep(1.0)
    assert rig.processes.killed == [], "its requests have their grace"
    rig.wishes.num_wishes = 2
    assert rig.ended() == 1
    assert rig.processes.killed == ["frontend-0"]
    assert rig.processes.stopped


def test_a_frontend_that_does_not_answer_is_killed_after_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that has drained is left alone."""
    monkeypatch.setattr(supervisor, "FORCED_END_S", 0.5)
    rig = Rig(monkeypatch, num_frontends=2, grace_s=0.5)
    rig.listen()
    rig.wishes.num_wishes = 1
    rig.frontends[1].send(Drained(0))
    assert rig.ended() == 1
    assert rig.processes.killed == ["frontend-0"]
    rig.close()


def test_a_signal_during_the_start_ends_it(rig: Rig) -> None:
    rig.wishes.num_wishes = 1
    assert rig.ended() == 0


def test_a_start_that_fails_raises_its_reason_by_its_class(rig: Rig) -> None:
    rig.frontend.send(Failed("frontend", "ConfigError", "the address is taken"))
    outcome = rig.ended()
    assert isinstance(outcome, ConfigError)
    assert str(outcome) == "the address is taken"


def test_a_failure_of_another_kind_names_its_place(rig: Rig) -> None:
    rig.frontend.send(Failed("frontend", "ZeroDivisionError", "oh"))
    outcome = rig.ended()
    assert isinstance(outcome, EngineDeadError)
    assert "frontend failed with ZeroDivisionError: oh" in str(outcome)


def test_a_frontend_that_fails_later_is_replaced_at_the_same_address(rig: Rig) -> None:
    rig.listen()
    rig.frontend.send(Failed("frontend", "MemoryError", "full"))
    rig.processes.dead["frontend-0"] = Exit("frontend-0", 1, "")
    rig.wait_until(lambda: len(rig.processes.starts) == 2)
    assert [(one.data, one.control) for one in rig.processes.starts] == [
        ("tcp://127.0.0.1:*", "tcp://127.0.0.1:*"),
        (WHERE.data, WHERE.control),
    ], "clients find it where it was"
    rig.frontend.send(WHERE)
    rig.wait_until(lambda: rig.said[-1] == "the frontend serves again")
    assert rig.said.count("ready") == 1
    assert not rig.processes.stopped, "the engine stays"


def test_a_start_that_the_system_refuses_is_tried_again(rig: Rig) -> None:
    rig.listen()
    rig.processes.num_refused = 1
    rig.processes.dead["frontend-0"] = Exit("frontend-0", -9, "")
    rig.wait_until(lambda: len(rig.processes.starts) == 2, 15.0)
    assert rig.processes.num_refused == 0
    assert rig.outcome is None


def test_a_frontend_that_ends_while_it_starts_ends_the_start(rig: Rig) -> None:
    rig.processes.dead["frontend-0"] = Exit("frontend-0", 1, "no memory")
    outcome = rig.ended()
    assert isinstance(outcome, EngineDeadError)
    assert "no memory" in str(outcome)


def test_a_frontend_that_dies_while_it_drains_has_lost_requests(rig: Rig) -> None:
    rig.listen()
    rig.wishes.num_wishes = 1
    assert rig.frontend.receive(5) == Drain(7.0)
    rig.processes.dead["frontend-0"] = Exit("frontend-0", -9, "")
    assert rig.ended() == 1
    assert len(rig.processes.starts) == 1, "nobody needs another"


def test_what_a_frontend_said_before_it_ended_is_heard_before_its_end_is_judged(rig: Rig) -> None:
    """It has drained, and its last word waits behind others."""
    rig.listen()
    rig.wishes.num_wishes = 1
    assert rig.frontend.receive(5) == Drain(7.0)
    go_on = threading.Event()
    rig.hold(go_on)
    for _ in range(50):
        rig.frontend.send(Notice("a word on the way"))
    rig.frontend.send(Drained(0))
    time.sleep(0.5)
    rig.processes.dead["frontend-0"] = Exit("frontend-0", 0, "")
    go_on.set()
    assert rig.ended() == 0


def say_after_its_end(rig: Rig, code: int, word: FrontendToSupervisor) -> None:
    """On a loaded machine a message is read after its sender's end is seen."""
    rig.processes.dead["frontend-0"] = Exit("frontend-0", code, "")
    assert rig.processes.found.wait(5)
    time.sleep(0.2)
    rig.frontend.send(word)


def test_a_last_word_may_come_after_the_end_of_who_said_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontends, "LAST_WORD_S", 5.0)
    rig.listen()
    rig.wishes.num_wishes = 1
    assert rig.frontend.receive(5) == Drain(7.0)
    say_after_its_end(rig, 0, Drained(0))
    assert rig.ended() == 0


def test_why_a_start_failed_may_come_after_the_end_of_who_said_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontends, "LAST_WORD_S", 5.0)
    say_after_its_end(rig, 1, Failed("frontend", "ConfigError", "the address is taken"))
    outcome = rig.ended()
    assert isinstance(outcome, ConfigError)
    assert str(outcome) == "the address is taken"


def test_the_last_word_of_a_frontend_is_waited_for_once_and_only_where_there_may_be_one(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_s = 2.0
    monkeypatch.setattr(frontends, "LAST_WORD_S", wait_s)
    monkeypatch.setattr("graphgen.server.kept.Backoff.ended", lambda *_: 0.0)
    rig.listen()

    def restart_s(code: int) -> float:
        begun_s, num_starts = time.monotonic(), len(rig.processes.starts)
        rig.processes.dead["frontend-0"] = Exit("frontend-0", code, "")
        rig.wait_until(lambda: len(rig.processes.starts) > num_starts)
        return time.monotonic() - begun_s

    assert restart_s(-9) < wait_s, "what was killed says nothing"
    assert wait_s <= restart_s(1) < 2 * wait_s
    rig.frontend.send(Failed("frontend", "MemoryError", "full"))
    rig.frontend.send(WHERE)  # heard when "serves again" is said
    rig.wait_until(lambda: rig.said[-1] == "the frontend serves again")
    assert restart_s(1) < wait_s, "it has said why"
    assert wait_s <= restart_s(1) < 2 * wait_s, "the next one has not"


def test_an_engine_that_ended_is_started_again_and_its_frontend_stays(rig: Rig) -> None:
    rig.listen()
    assert rig.lose_engine().restarts
    rig.wait_until(lambda: rig.processes.num_engines == 2)
    assert "the engine serves again" not in rig.said
    rig.frontend.send(EngineServes(0))
    rig.wait_until(lambda: "the engine serves again" in rig.said)
    assert len(rig.processes.starts) == 1
    assert rig.thread.is_alive()


def test_clients_are_told_of_a_dead_engine_before_the_server_ends(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOST_GRACE_S", 30.0)
    rig.listen()
    rig.lose_engine_for_good()
    assert not rig.lose_engine().restarts
    time.sleep(0.3)
    assert rig.thread.is_alive(), "the frontend is still telling them"
    rig.frontend.send(Notice("a word on the way"))
    time.sleep(0.2)
    assert not rig.processes.stopped
    rig.frontend.send(Drained(2))
    outcome = rig.ended()  # no longer than it takes
    assert isinstance(outcome, EngineDeadError)
    assert "killed by SIGKILL" in str(outcome)


def test_a_frontend_that_does_not_answer_does_not_keep_a_dead_engines_server(rig: Rig) -> None:
    rig.listen()
    rig.lose_engine_for_good()
    rig.processes.dead["scheduler"] = Exit("scheduler", 1, "")
    assert isinstance(rig.ended(), EngineDeadError)


def test_what_a_dying_engine_says_is_better_than_its_exit_code(rig: Rig) -> None:
    rig.processes.dead["scheduler"] = Exit("scheduler", 1, "")
    assert rig.processes.found.wait(5)
    rig.frontend.send(Failed("worker", "CheckpointError", "the weights are truncated"))
    outcome = rig.ended()
    assert type(outcome).__name__ == "CheckpointError"
    assert str(outcome) == "the weights are truncated"


def test_a_start_that_takes_too_long_is_given_up_with_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, start_timeout_s=0.5)
    outcome = rig.ended()
    assert isinstance(outcome, EngineDeadError)
    assert "not ready after 0.5 s: raise start_timeout_s" in str(outcome)
    rig.close()
