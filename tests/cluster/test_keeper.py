"""The loop of a cluster, with machines and a frontend that do at once what they are told; and how others find it."""

import contextlib
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Literal

import pytest

from graphgen.base.signals import SAME_S
from graphgen.cluster import keeper as keeper_module
from graphgen.cluster import up
from graphgen.cluster.answering import Answering
from graphgen.cluster.keeper import Keeper
from graphgen.cluster.options import ClusterOptions
from graphgen.cluster.record import SOCKET, ClusterStatus, Question, Record, ask, folder_of, is_up, names_up
from graphgen.cluster.roster import Seen
from graphgen.cluster.scaling import Scaling, ScalingLimits
from graphgen.ipc.errors import ConfigError, EngineDeadError
from tests.cluster.fakes import FakeFrontend, FakeLauncher, NoSignals, SlowLauncher
from tests.cluster.waiting import wait_until


class Rig:
    """A keeper on a thread of its own."""

    def __init__(self, num_engines: int = 2, launcher: FakeLauncher | None = None) -> None:
        self.name = f"t{uuid.uuid4().hex[:12]}"
        self.launcher, self.frontend, self.signals = launcher or FakeLauncher(), FakeFrontend(), NoSignals()
        self.said: list[str] = []
        self.status_when_said: ClusterStatus | None = None
        """When it was said that the cluster serves."""
        self._results: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
        self._num_engines = num_engines
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with (
            contextlib.closing(Record.claim(self.name)) as record,
            contextlib.closing(
                Answering(record.folder / SOCKET, up.first_status(ClusterOptions(name=self.name)))
            ) as answering,
        ):
            limits = ScalingLimits(least=1, most=4, down_after_s=1e6)
            scaling = Scaling(limits, self._num_engines)
            keeper = Keeper(self.name, scaling, self.launcher, self.frontend, answering, "ray:1", 5.0, 30.0, self._say)
            try:
                self._results.put(keeper.run(self.signals))
            except BaseException as error:
                self._results.put(error)

    def _say(self, line: str) -> None:
        self.said.append(line)
        if "serves with" in line:
            self.status_when_said = self.status()

    def start(self) -> "Rig":
        self._thread.start()
        return self

    def join(self) -> int | BaseException:
        self._thread.join(30.0)
        return self._results.get_nowait()

    def status(self) -> ClusterStatus:
        return ask(self.name, Question("status"))

    def wait_serving(self) -> "Rig":
        wait_until(lambda: is_up(self.name) and self.status().phase == "serving", "it serves", 20.0)
        return self


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Rig], Rig]]:
    """Whatever a test did, nothing goes on."""
    monkeypatch.setattr(keeper_module, "LOOK_S", 0.01)
    rigs: list[Rig] = []

    def start(rig: Rig) -> Rig:
        rigs.append(rig)
        return rig.start()

    yield start
    for rig in rigs:
        rig.signals.num_wishes = 2
        rig._thread.join(30.0)


def test_the_frontend_starts_when_all_engines_serve(start: Callable[[Rig], Rig]) -> None:
    rig = start(Rig(2)).wait_serving()
    assert len(rig.frontend.engines) == 2
    wait_until(lambda: rig.status_when_said is not None, "it says so", 20.0)
    assert rig.status_when_said is not None
    assert (rig.status_when_said.phase, rig.status_when_said.data) == ("serving", "tcp://here:1")
    found = rig.status()
    assert (found.name, found.data, found.ray) == (rig.name, "tcp://here:1", "ray:1")
    assert (found.num_wanted, found.num_held) == (2, 5)
    assert [(one.status.state, one.status.node, one.status.pids) for one in found.engines] == [
        ("serving", "here", (1, 2))
    ] * 2
    assert (found.engines[0].num_running, found.engines[0].num_waiting, found.engines[0].kv_usage) == (3, 4, 0.25)


def test_a_lost_engine_is_replaced_and_counted(start: Callable[[Rig], Rig]) -> None:
    rig = start(Rig(2)).wait_serving()
    before = list(rig.frontend.engines)
    rig.launcher.seen[1] = Seen("lost", reason="its machine burns")
    wait_until(lambda: [one.status.restarts for one in rig.status().engines] == [0, 1], "it is lost", 20.0)
    wait_until(lambda: [one.status.state for one in rig.status().engines] == ["serving"] * 2, "it is back", 20.0)
    wait_until(lambda: len(rig.frontend.engines) == 2, "requests go to it", 20.0)
    assert rig.frontend.engines[0] == before[0]
    assert rig.frontend.engines[1] != before[1]
    assert any("engine 1 is lost, and is started again: its machine burns" in line for line in rig.said)


def test_a_start_that_fails_ends_the_cluster_with_its_reason(start: Callable[[Rig], Rig]) -> None:
    rig = Rig(2)
    rig.launcher.broken = "no such model"
    start(rig)
    error = rig.join()
    assert isinstance(error, EngineDeadError)
    assert "does not start: engine 0: no such model" in str(error)
    assert rig.launcher.is_closed
    assert rig.frontend.is_closed
    assert not is_up(rig.name)


def test_down_ends_everything_in_order(start: Callable[[Rig], Rig]) -> None:
    rig = start(Rig(2)).wait_serving()
    rig.frontend.drains = True
    ask(rig.name, Question("down"))
    wait_until(lambda: rig.frontend.num_asked_to_end == 1, "it drains", 20.0)
    assert rig.status().phase == "ending", "it answers meanwhile"
    assert len(rig.launcher.seen) == 2, "engines serve what is open"
    ask(rig.name, Question("down"))
    assert rig.join() == 0
    assert rig.frontend.num_asked_to_end == 2, "a second time nothing more is waited for"
    assert not rig.launcher.seen
    assert not is_up(rig.name)
    assert not folder_of(rig.name).exists()


@pytest.mark.parametrize(
    ("call", "doing", "states"),
    [
        ("look", "asking Ray how the engines are", ["serving", "serving"]),
        ("end", "stopping engine 1", ["serving", "waiting"]),
        ("start", "asking Ray for a place for engine 1", ["serving", "placing"]),
    ],
)
def test_whoever_asks_is_answered_while_ray_is_slow(
    start: Callable[[Rig], Rig], call: Literal["start", "end", "look"], doing: str, states: list[str]
) -> None:
    launcher = SlowLauncher()
    rig = start(Rig(2, launcher)).wait_serving()
    launcher.wait_in(call)
    launcher.seen[1] = Seen("lost", reason="its machine burns")
    try:
        wait_until(lambda: launcher.is_waiting, "it waits for Ray", 20.0)
        begun_s = time.monotonic()
        found = rig.status()
        assert (found.phase, found.doing) == ("serving", doing)
        assert [one.status.state for one in found.engines] == states
        later = rig.status()
        assert later.doing_s > found.doing_s > 0.0
        assert later.age_s > found.age_s > 0.0, "it says how old this is"
        assert ask(rig.name, Question("down")).phase == "ending"
        assert time.monotonic() - begun_s < 5.0, "at once"
    finally:
        launcher.go_on()
    assert rig.join() == 0, "the order was not lost"


def test_whoever_asks_is_answered_while_the_frontend_is_slow(start: Callable[[Rig], Rig]) -> None:
    rig = start(Rig(2)).wait_serving()
    with rig.frontend.busy:
        wait_until(lambda: rig.status().doing_s > 0.1, "the keeper waits", 20.0)
        assert rig.status().doing == "asking the frontend how it is"
        assert ask(rig.name, Question("down")).phase == "ending"
    assert rig.join() == 0


def test_two_orders_at_once_are_passed_on_as_two(start: Callable[[Rig], Rig]) -> None:
    """As `graphgen cluster down --now` gives them. The frontend takes signals in quick succession for one."""
    rig = start(Rig(1)).wait_serving()
    rig.frontend.drains = True
    for _ in range(3):
        ask(rig.name, Question("down"))
    assert rig.join() == 0
    first_s, second_s = rig.frontend.asked_to_end_s
    assert second_s - first_s > SAME_S


def test_a_signal_during_the_start_ends_it(start: Callable[[Rig], Rig]) -> None:
    rig = Rig(2)
    rig.signals.num_wishes = 1
    assert start(rig).join() == 0
    assert rig.launcher.is_closed
    assert rig.frontend.place is None


def test_a_name_is_taken_while_its_cluster_is_up(start: Callable[[Rig], Rig]) -> None:
    rig = start(Rig(1)).wait_serving()
    assert rig.name in names_up()
    with pytest.raises(ConfigError, match=f"a cluster '{rig.name}' is up already: end it with `graphgen cluster down"):
        Record.claim(rig.name)
    ask(rig.name, Question("down"))
    rig.join()
    with contextlib.closing(Record.claim(rig.name)):
        pass
    with pytest.raises(ConfigError, match=f"no cluster '{rig.name}' of this user is up"):
        ask(rig.name, Question("status"))


def test_what_a_killed_cluster_left_is_cleared(start: Callable[[Rig], Rig]) -> None:
    name = f"t{uuid.uuid4().hex[:12]}"
    left = folder_of(name) / "ray" / "session"
    left.mkdir(parents=True)
    folder_of(name).parent.chmod(0o700)
    with contextlib.closing(Record.claim(name)) as record:
        assert not left.exists()
        assert record.folder.parent.stat().st_mode & 0o077 == 0, "others cannot enter"
