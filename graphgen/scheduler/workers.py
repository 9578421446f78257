"""The worker group of an engine, and the ones that replace it.

Owns the channels to the ranks, one folder of sockets for each epoch, and the way from a dead group to the next one:
kill what is left, wait until it is gone, let the group that stands by begin or start another. Knows no request:
`graphgen.scheduler.loop` is told what arrives and that a group is lost, and tells the policy.
"""

import enum
import logging
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import zmq
from msgspec import Struct

from graphgen.ipc.channel import Channel
from graphgen.ipc.worker_messages import Failed, SchedulerToWorker, Shutdown, WorkerReady, WorkerToScheduler
from graphgen.launch.launch_config import LaunchConfig
from graphgen.launch.starts import MAX_STARTS, WITHIN_S, StartLimit
from graphgen.scheduler.standby import Standby
from graphgen.scheduler.worker_processes import WorkerProcesses

END_S = 30.0
"""A killed process is gone after milliseconds, on a GPU after the driver has cleaned up. One that a driver holds for
longer than this will not end."""
LAST_RESULTS_S = 0.005
"""Results that a dead worker had sent arrive within this."""
ENDING_LOOK_S = 0.05
"""How often to look whether a killed group is gone; its end is also a reason to wake."""
STANDBY_AFTER_S = 1.0
"""What waits for a group to serve comes before the one that stands by is started, which takes milliseconds."""
FIRST_WORD_S = 10.0
"""A group that stood by and says nothing for so long after its turn has come hangs: another one is started."""
IMPORTS_S = 30.0
"""One that is younger than this may still be importing."""

logger = logging.getLogger("graphgen.scheduler")

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
        """first: the group's processes, which have begun before."""
        self._engine_folder = engine_folder
        self._owner_pid = owner_pid
        self._context = context
        self._starts = StartLimit()
        self._config: LaunchConfig | None = None
        self._ended_s = 0.0
        self._standby = Standby(partial(self._start_next, behind_another=True))
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
        self._silent = set(range(len(self.channels)))
        """Ranks that have not said anything yet."""
        self._first_word_by_s = self._serves_by_s = math.inf

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
                self._silent.discard(rank)
                if isinstance(message, WorkerReady):
                    self._ready[rank] = message
                elif rank == 0 or isinstance(message, Failed):
                    yield message

    def take_ready(self) -> WorkerReady | None:
        """Once all ranks are ready: what rank 0 said; the group serves from then on."""
        if self.state is not State.STARTING or len(self._ready) < len(self.channels):
            return None
        self.state = State.SERVING
        if self._config is not None and self._config.standby:
            self._standby.want(time.monotonic() + STANDBY_AFTER_S)
        return self._ready[0]

    def find_loss(self) -> Loss | None:
        """Whether a rank has ended that should not have, or does not come to serve."""
        if self.state is State.ENDING or self._has_only_stood_by:
            return None
        if (found := self.processes.find_exit()) is not None:
            return Loss(str(found).partition(";")[0], found.tail)
        if self.state is State.STARTING and time.monotonic() >= self._serves_by_s:
            limit_s = 0.0 if self._config is None else self._config.start_timeout_s
            reason = f"the worker that replaced another did not serve within {limit_s:g} s (start_timeout_s)"
            return Loss(reason, self.last_words())
        return None

    def last_words(self, where: str = "") -> str:
        """The last lines that a rank wrote, or all of them where it is none of theirs."""
        names, tail = self.processes.names, self.processes.log_tail
        if where in names or len(names) == 1:
            return tail(where if where in names else names[0])
        return "\n".join(f"[{name}]\n{tail(name)}" for name in names)

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
        self._end_group()

    def _end_group(self) -> None:
        self.state = State.ENDING
        self._ended_s = time.monotonic()
        self.processes.kill()

    @property
    def _has_only_stood_by(self) -> bool:
        """Whether the group stood by and has said nothing since its turn came: its end is no worker's yet."""
        return self.state is State.STARTING and bool(self._silent) and self._first_word_by_s < math.inf

    @property
    def look_s(self) -> float | None:
        """When to call `find_loss` and `advance` though nothing has arrived, as time.monotonic(); None: no need."""
        match self.state:
            case State.SERVING:
                return self._standby.due_s
            case State.STARTING:
                due_s = min(self._serves_by_s, self._first_word_by_s) if self._silent else self._serves_by_s
                return None if math.isinf(due_s) else due_s
            case State.ENDING:
                return time.monotonic() + ENDING_LOOK_S

    def advance(self) -> bool:
        """Starts the next group when the last one is gone; whether there is a new one, to be registered.

        Raises WorkerFailedError when a process cannot be ended, which only a reset of its device cures.
        """
        if self.state is State.SERVING:
            self._standby.tend(time.monotonic())
        if self._has_only_stood_by and (self.processes.find_exit() or time.monotonic() >= self._first_word_by_s):
            logger.warning("the process that stood by did not say a word when its turn came: another one is started")
            self._end_group()
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
        stood_by = self._standby.take()
        self._attach(stood_by or self._start_next())
        assert self._config is not None, "a group is replaced after its launch"
        self.launch(self._config)
        self.processes.begin()
        self._serves_by_s = time.monotonic() + self._config.start_timeout_s
        if stood_by is not None:
            self._first_word_by_s = max(time.monotonic() + FIRST_WORD_S, stood_by.started_s + IMPORTS_S)
        return True

    def _start_next(self, behind_another: bool = False) -> WorkerProcesses:
        """The processes of the epoch after this one, which have their configuration and stand by. behind_another: this
        one serves."""
        place = self._engine_folder, self._owner_pid, self.epoch + 1, len(self.channels)
        processes = WorkerProcesses(*place, behind_another=behind_another)
        assert self._config is not None, "a group is replaced after its launch"
        self._config.write(processes.folder)
        return processes

    def end(self, grace_s: float) -> None:
        """Asks the group to end, kills what does not and what stands by, and waits for them."""
        self.send(Shutdown())
        self._standby.end()
        self.processes.wait(grace_s)
        self.processes.kill()
        self.processes.wait(END_S)
        self._close()

    def _close(self) -> None:
        for channel in self.channels:
            channel.close()
        self.processes.forget()
