"""The group that stands by: when there is one, when it begins, and that no harm to it is anybody's loss."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from graphgen import EngineConfig
from graphgen.ipc.worker_messages import Progress
from graphgen.launch.launch_config import LaunchConfig
from graphgen.launch.processes import Exit
from graphgen.launch.starts import MAX_STARTS
from graphgen.requests.core import launch_config
from graphgen.scheduler import workers
from graphgen.scheduler.standby import LOOK_S
from graphgen.scheduler.workers import STANDBY_AFTER_S, Loss, State, Workers
from tests.scheduler.fake_processes import FakeProcesses
from tests.scheduler.test_workers import FIRST, LOSS, Rank

CONFIG = launch_config(EngineConfig(device="cpu", standby=True, start_timeout_s=100.0))
DIED = Exit("standby-0", -9, "")


class Machine:
    """A clock, and processes that are none."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.started: list[FakeProcesses] = []
        self.has_processes = True

    def start(self, folder: Path, owner: int, epoch: int, ranks: int, behind_another: bool = False) -> FakeProcesses:
        if not self.has_processes:
            raise BlockingIOError("Resource temporarily unavailable")
        processes = FakeProcesses(folder, epoch, behind_another)
        processes.started_s = self.now_s
        self.started.append(processes)
        return processes


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(workers, "WorkerProcesses", machine.start)
    monkeypatch.setattr("graphgen.scheduler.workers.time.monotonic", lambda: machine.now_s)
    return machine


@pytest.fixture
def group(tmp_path: Path, machine: Machine) -> Iterator[Workers]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    group = Workers(tmp_path, 0, context, machine.start(tmp_path, 0, 0, 1))
    group.launch(CONFIG)
    yield group
    group.end(0.0)
    context.term()
    assert all(one.is_forgotten for one in machine.started), "what stands by ends with the engine"


def serve(group: Workers) -> None:
    rank = Rank(group)
    rank.channel.send(FIRST)
    while group.take_ready() is None:
        assert list(group.receive(0.001)) == []
    rank.close()


def wait(group: Workers, machine: Machine, seconds: float) -> None:
    """As the loop does while nothing arrives: looks whenever it was asked to."""
    end_s = machine.now_s + seconds
    while (look_s := group.look_s) is not None and look_s <= end_s and group.find_loss() is None:
        machine.now_s = max(machine.now_s, look_s)
        group.advance()
    machine.now_s = end_s


def stands_by(group: Workers, machine: Machine) -> FakeProcesses:
    """A group that serves, and the one behind it."""
    serve(group)
    wait(group, machine, STANDBY_AFTER_S)
    return machine.started[-1]


def test_one_is_started_when_the_group_serves_and_not_before(group: Workers, machine: Machine) -> None:
    wait(group, machine, 50.0)
    assert len(machine.started) == 1
    standby = stands_by(group, machine)
    assert (len(machine.started), standby.epoch, standby.has_begun) == (2, 1, False)
    assert LaunchConfig.read(standby.folder).compile == CONFIG.compile, "what it is to import"
    wait(group, machine, 1000.0)
    assert len(machine.started) == 2


def test_none_is_started_where_none_is_wanted(group: Workers, machine: Machine) -> None:
    group.launch(msgspec.structs.replace(CONFIG, standby=False))
    serve(group)
    assert group.look_s is None
    assert not group.advance()
    assert len(machine.started) == 1


def test_it_is_the_next_group(group: Workers, machine: Machine) -> None:
    standby = stands_by(group, machine)
    group.replace(LOSS, FIRST)
    assert not standby.has_begun, "the one before it is not gone"
    assert group.advance()
    assert group.processes is standby
    assert standby.has_begun
    launch = LaunchConfig.read(standby.folder)
    assert (launch.num_pages, launch.needed_bytes) == (77, 123_456)
    assert (group.epoch, group.num_restarts, len(machine.started)) == (1, 1, 2)
    assert stands_by(group, machine).epoch == 2


def test_one_that_is_still_importing_begins_too(group: Workers, machine: Machine) -> None:
    standby = stands_by(group, machine)
    for _ in range(3):
        group.replace(LOSS, FIRST)
        assert group.advance()
    assert standby.is_killed, "it died as a worker"
    assert [processes.epoch for processes in machine.started] == [0, 1, 2, 3], "nothing stands by until a group serves"
    behind = [processes.behind_another for processes in machine.started]
    assert behind == [False, True, False, False], "the last two may be the first that get as far as kernels"


def test_one_that_dies_is_nobodys_loss_and_is_replaced(group: Workers, machine: Machine) -> None:
    standby = stands_by(group, machine)
    standby.exit = DIED
    wait(group, machine, LOOK_S)
    assert group.find_loss() is None
    assert (group.num_restarts, group.state) == (0, State.SERVING)
    assert standby.is_forgotten
    assert machine.started[-1] is not standby
    assert machine.started[-1].epoch == 1


def test_one_that_died_unseen_does_not_begin(group: Workers, machine: Machine) -> None:
    standby = stands_by(group, machine)
    standby.exit = DIED
    group.replace(LOSS, FIRST)
    assert group.advance()
    assert group.processes is not standby
    assert not standby.has_begun
    assert (group.num_restarts, group.find_loss()) == (1, None)


def test_one_that_dies_as_its_turn_comes_is_no_worker_s_death(group: Workers, machine: Machine) -> None:
    """Whatever ended the worker may have ended it too, and is seen a moment later."""
    for number in range(MAX_STARTS):
        standby = stands_by(group, machine)
        group.replace(LOSS, FIRST)
        assert group.advance()
        standby.exit = DIED
        assert group.find_loss() is None
        assert group.advance()
        assert group.processes is not standby
        assert (group.num_restarts, group.state) == (number + 1, State.STARTING)
        group.processes.exit = DIED  # type: ignore[attr-defined]  # a fake
        assert group.find_loss() is not None, "a new one that dies is a worker"
        group.processes.exit = None  # type: ignore[attr-defined]
        group.step_succeeded()


def test_ones_that_die_at_once_are_started_ever_more_seldom(group: Workers, machine: Machine) -> None:
    stands_by(group, machine)
    for _ in range(720):
        machine.started[-1].exit = DIED
        wait(group, machine, 10.0)
    assert 10 < len(machine.started) < 30, "in two hours"


def test_one_that_cannot_be_started_is_nobodys_loss(group: Workers, machine: Machine) -> None:
    serve(group)
    machine.has_processes = False
    wait(group, machine, 20.0)
    assert (len(machine.started), group.find_loss(), group.state) == (1, None, State.SERVING)
    machine.has_processes = True
    wait(group, machine, 60.0)
    assert len(machine.started) == 2


@pytest.mark.parametrize("age_s", [0.0, 500.0])
def test_one_that_hangs_when_its_turn_comes_is_replaced_and_not_counted(
    group: Workers, machine: Machine, age_s: float
) -> None:
    for number in range(MAX_STARTS):
        standby = stands_by(group, machine)
        wait(group, machine, age_s)
        group.replace(LOSS, FIRST)
        assert group.advance()
        assert group.processes is standby
        turn_s = machine.now_s
        while group.processes is standby:
            wait(group, machine, 1.0)
        assert machine.now_s - turn_s == pytest.approx(30.0 if age_s == 0.0 else 11.0, abs=1.5)
        assert standby.is_killed
        assert group.num_restarts == number + 1
        group.step_succeeded()
    assert group.processes.epoch == 2 * MAX_STARTS


def test_one_that_says_a_word_has_the_time_of_any_start(group: Workers, machine: Machine) -> None:
    standby = stands_by(group, machine)
    group.replace(LOSS, FIRST)
    assert group.advance()
    rank = Rank(group)
    rank.channel.send(Progress("device", 0, 0))
    assert next(group.receive(5.0)) == Progress("device", 0, 0)
    rank.close()
    wait(group, machine, 99.0)
    assert (group.processes, group.find_loss()) == (standby, None)
    wait(group, machine, 2.0)
    assert group.find_loss() == Loss(
        "the worker that replaced another did not serve within 100 s (start_timeout_s)", "its last words"
    )
