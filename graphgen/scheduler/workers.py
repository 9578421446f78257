"""The worker group of an engine, and the ones that replace it.

Owns the channels to the ranks, one folder of sockets for each epoch, and the way from a dead group to the next one:
kill what is left, wait until it is gone, start again. Knows no request: `graphgen.scheduler.loop` is told what
arrives and that a group is lost, and tells the policy.
"""

import enum
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import zmq
from msgspec import Struct

from graphgen.ipc.channel import Channel
from graphgen.ipc.messages import (
    Failed,
    SchedulerToWorker,
    Shutdown,
    WorkerReady,
    WorkerToScheduler,
)
from graphgen.launch.config import LaunchConfig
from graphgen.launch.starts import MAX_STARTS, WITHIN_S, StartLimit
from graphgen.scheduler.worker_processes import WorkerProcesses

END_S = 30.0
"""A killed process is gone after milliseconds, on a GPU after the driver has cleaned up. One that a driver holds for
longer than this will not end."""
LAST_RESULTS_S = 0.005
"""Results that a dead worker had sent arrive within this."""

WorkerChannel = Channel[SchedulerToWorker, WorkerToScheduler]


class WorkerFailedError(Exception):
    """No worker group can serve."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(f"{failed.error}: {failed.message}")
        self.failed = failed


class Loss(Struct, frozen=True):
    """Why a group is lost."""

    reason: str  # for an operator, in one line
    last_words: str  # what it said or wrote last
    failed: Failed | None = None  # as it said it itself, if it did


class State(enum.Enum):
    """Of the group."""

    STARTING = enum.auto()
    SERVING = enum.auto()
    ENDING = enum.auto()  # killed, and not gone yet


class Workers:
    """The group of this moment. Every rank gets every plan; rank 0 answers."""

    def __init__(
        self, engine_folder: Path, owner_pid: int, context: "zmq.Context[zmq.Socket[bytes]]", first: WorkerProcesses
    ) -> None:
        """first: the group's processes, which were started before."""
        self._engine_folder = engine_folder
        self._owner_pid = owner_pid
        self._context = context
        self._starts = StartLimit()
        self._config: LaunchConfig | None = None
        self._ended_s = 0.0
        self.num_restarts = 0
        self._attach(first)

    def _attach(self, processes: WorkerProcesses) -> None:
        """The group of these processes is the one that is starting."""
        self.processes = processes
        self.channels: list[WorkerChannel] = [
            Channel(self._context, processes.folder, name, "upper", WorkerToScheduler) for name in processes.names
        ]
        self.state = State.STARTING
        self._ready: dict[int, WorkerReady] = {}

    @property
    def epoch(self) -> int:
        return self.processes.epoch

    def register(self, poller: zmq.Poller) -> None:
        """Whatever tells that something of the group has happened."""
        for channel in self.channels:
            poller.register(channel.receiver, zmq.POLLIN)
        for pidfd in self.processes.pidfds:
            poller.register(pidfd, zmq.POLLIN)

    def launch(self, config: LaunchConfig) -> None:
        """Lets the group start with this configuration; its successors get the same."""
        self._config = config
        config.write(self.processes.folder)

    def send(self, message: SchedulerToWorker) -> None:
        """To every rank."""
        for channel in self.channels:
            channel.send(message)

    def receive(self, patience_s: float = 0.0) -> Iterator[WorkerToScheduler]:
        """What has arrived of rank 0, and from the others what concerns the group. Raises msgspec.DecodeError.

        Ready messages are kept, see `take_ready`. patience_s: how long to wait for something more each time.
        """
        for rank, channel in enumerate(self.channels):
            while True:
                message = channel.receive(patience_s)
                if message is None:
                    break
                if isinstance(message, WorkerReady):
                    self._ready[rank] = message
                elif rank == 0 or isinstance(message, Failed):
                    yield message

    def take_ready(self) -> WorkerReady | None:
        """Once all ranks are ready: what rank 0 said; the group serves from then on."""
        if self.state is not State.STARTING or len(self._ready) < len(self.channels):
            return None
        self.state = State.SERVING
        return self._ready[0]

    def find_loss(self) -> Loss | None:
        """Whether a rank has ended that should not have."""
        found = None if self.state is State.ENDING else self.processes.find_exit()
        return None if found is None else Loss(str(found).partition(";")[0], found.tail)

    def step_succeeded(self) -> None:
        """The group computes: earlier deaths say nothing about its successors' chances."""
        self._starts.succeeded()

    def replace(self, loss: Loss, first: WorkerReady) -> None:
        """Ends what is left of the group; `advance` starts the next one when it is gone.

        first: what the engine's first group said: the next one must have as many pages, and finds as much memory free.
        Raises WorkerFailedError when there were too many starts.
        """
        assert self._config is not None, "a group is replaced after its launch"
        if not self._starts.take(time.monotonic()):
            message = (
                f"the worker ended {MAX_STARTS + 1} times within {WITHIN_S / 60:g} minutes without computing a step,"
                f" the last time: {loss.reason}. It wrote last:\n{loss.last_words}"
            )
            raise WorkerFailedError(loss.failed or Failed("scheduler", "EngineDeadError", message))
        self._config = msgspec.structs.replace(self._config, num_pages=first.num_pages, needed_bytes=first.device_bytes)
        self.num_restarts += 1
        self.state = State.ENDING
        self._ended_s = time.monotonic()
        self.processes.kill()

    def advance(self) -> bool:
        """Starts the next group when the last one is gone; whether there is a new one, to be registered.

        Raises WorkerFailedError when a process cannot be ended, which only a reset of its device cures.
        """
        if self.state is not State.ENDING:
            return False
        if not self.processes.have_ended:
            if time.monotonic() - self._ended_s > END_S:
                message = (
                    f"the worker process {self.processes.names} is not gone {END_S:g} s after it was killed: its"
                    " device's driver holds it; reset the device or the machine"
                )
                raise WorkerFailedError(Failed("scheduler", "EngineDeadError", message))
            return False
        self._close()
        self._attach(WorkerProcesses(self._engine_folder, self._owner_pid, self.epoch + 1, len(self.channels)))
        assert self._config is not None, "a group is replaced after its launch"
        self.launch(self._config)
        return True

    def end(self, grace_s: float) -> None:
        """Asks the group to end, kills what does not, and waits for it."""
        self.send(Shutdown())
        deadline_s = time.monotonic() + grace_s
        while not self.processes.have_ended and time.monotonic() < deadline_s:
            time.sleep(0.005)
        self.processes.kill()
        deadline_s = time.monotonic() + END_S
        while not self.processes.have_ended and time.monotonic() < deadline_s:
            time.sleep(0.005)
        self._close()

    def _close(self) -> None:
        for channel in self.channels:
            channel.close()
        self.processes.forget()
