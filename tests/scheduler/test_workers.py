"""From a worker group that is lost to the next one: what it is started with, and when there is no next one."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from graphgen import EngineConfig
from graphgen.ipc.channel import Channel
from graphgen.ipc.worker_messages import SchedulerToWorker, Shutdown, WorkerToScheduler
from graphgen.launch.launch_config import LaunchConfig
from graphgen.launch.processes import Exit
from graphgen.launch.starts import MAX_STARTS
from graphgen.requests.core import launch_config
from graphgen.scheduler import workers
from graphgen.scheduler.workers import Loss, State, WorkerFailedError, Workers
from tests.fakes import READY
from tests.scheduler.fake_processes import FakeProcesses

LOSS = Loss("it died", "its last words")
FIRST = msgspec.structs.replace(READY.worker, num_pages=77, device_bytes=123_456)


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    def start(folder: Path, owner: int, epoch: int, ranks: int, behind_another: bool) -> FakeProcesses:
        return FakeProcesses(folder, epoch, behind_another)

    monkeypatch.setattr(workers, "WorkerProcesses", start)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    group = Workers(tmp_path, 0, context, FakeProcesses(tmp_path))
    group.launch(launch_config(EngineConfig(device="cpu")))
    yield group
    group.end(0.0)
    context.term()


class Rank:
    """The worker's end of the channel of an epoch."""

    def __init__(self, group: Workers) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        folder = group.processes.folder
        self.channel: Channel[WorkerToScheduler, SchedulerToWorker] = Channel(
            self._context, folder, "worker-0", "lower", SchedulerToWorker
        )

    def close(self) -> None:
        self.channel.close()
        self._context.term()


def serve(group: Workers) -> Rank:
    rank = Rank(group)
    rank.channel.send(FIRST)
    assert list(group.receive(1.0)) == [], "what says that a group is ready is kept"
    assert group.take_ready() == FIRST
    assert group.state is State.SERVING
    return rank


def test_a_group_serves_when_all_its_ranks_are_ready(group: Workers) -> None:
    assert group.take_ready() is None
    serve(group).close()
    assert group.take_ready() is None, "it is said once"


def test_the_next_group_has_a_folder_of_its_own_and_as_many_pages_and_waits_for_as_much_memory(group: Workers) -> None:
    serve(group).close()
    before = group.processes
    group.replace(LOSS, FIRST)
    assert isinstance(before, FakeProcesses)
    assert before.is_killed
    assert group.state is State.ENDING
    assert group.advance()
    assert (group.epoch, group.num_restarts, group.state) == (1, 1, State.STARTING)
    assert group.processes.folder != before.folder
    launch = LaunchConfig.read(group.processes.folder)
    assert (launch.num_pages, launch.needed_bytes) == (77, 123_456)


def test_nothing_that_was_sent_to_a_dead_group_reaches_its_successor(group: Workers) -> None:
    serve(group).close()
    group.send(Shutdown())
    group.replace(LOSS, FIRST)
    assert group.advance()
    rank = Rank(group)
    assert rank.channel.receive(0.3) is None
    rank.close()


def test_the_next_group_waits_until_the_last_one_is_gone(group: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = False
    monkeypatch.setattr(FakeProcesses, "have_ended", property(lambda self: gone))
    group.replace(LOSS, FIRST)
    assert not group.advance()
    assert group.find_loss() is None, "it is known to be lost"
    monkeypatch.setattr(workers, "END_S", 0.0)
    with pytest.raises(WorkerFailedError, match="driver holds it"):
        group.advance()
    gone = True
    assert group.advance()


def test_starts_that_lead_to_nothing_are_limited_and_a_step_forgives_them(group: Workers) -> None:
    for _ in range(2):
        for _ in range(MAX_STARTS):
            group.replace(LOSS, FIRST)
            assert group.advance()
        with pytest.raises(WorkerFailedError, match=rf"ended {MAX_STARTS + 1} times.*it died(.|\n)*its last words"):
            group.replace(LOSS, FIRST)
        group.step_succeeded()
        group.replace(LOSS, FIRST)
        assert group.advance()
        group.step_succeeded()


def test_an_end_is_a_loss_with_its_reason(group: Workers) -> None:
    serve(group).close()
    assert group.find_loss() is None
    assert isinstance(group.processes, FakeProcesses)
    group.processes.exit = Exit("worker-0", -9, "a trace")
    loss = group.find_loss()
    assert loss is not None
    assert ("killed by SIGKILL" in loss.reason, loss.last_words) == (True, "a trace")
