"""A worker that computes nothing: a step takes what the table says, and every row draws a token at random, so that
requests are to ignore what ends an output.

It stands in the place of `graphgen.worker`, with its messages. Run as a module by `benchmarks.paced.scheduler`:

    python -m benchmarks.paced.worker FOLDER PARENT_PID NAME OWNER_PID
"""

import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zmq
from msgspec import Struct

from benchmarks.simulated_machine import MAX_CHUNKS
from benchmarks.virtual_engine import step_ms
from graphgen.ipc.channel import Channel
from graphgen.ipc.worker_messages import (
    DrawnRows,
    Probe,
    SchedulerToWorker,
    Shutdown,
    StepPlan,
    StepResult,
    WorkerCounters,
    WorkerReady,
    WorkerToScheduler,
)
from graphgen.launch.launch_config import LaunchConfig
from graphgen.launch.processes import end_with_parent
from graphgen.launch.step_times_store import StepTimesFile
from graphgen.scheduler.cost_model import CostModel

STEP_TIMES_VARIABLE = "GRAPHGEN_PACED_STEP_TIMES"
"""Where the path of the table is found."""


class PacedStep(Struct, frozen=True):
    """One that was received, and when it runs."""

    plan: StepPlan
    received_s: float
    started_s: float
    finished_s: float


class PacedDevice:
    """Steps one after another, each as long as the table says."""

    def __init__(self, table: StepTimesFile, vocab_size: int) -> None:
        self._device = CostModel(table.table)
        self._vocab_size = vocab_size
        self._random = np.random.default_rng(os.getpid())
        self._steps: deque[PacedStep | Probe] = deque()
        self._free_s = 0.0
        self._num_done = 0

    def take(self, message: StepPlan | Probe, now_s: float) -> None:
        if isinstance(message, StepPlan):
            started_s = max(now_s, self._free_s)
            self._free_s = started_s + step_ms(self._device, message) / 1000.0
            self._steps.append(PacedStep(message, now_s, started_s, self._free_s))
        else:
            self._steps.append(message)

    @property
    def next_s(self) -> float | None:
        """When there is something to say; None: nothing before something is received."""
        if not self._steps:
            return None
        first = self._steps[0]
        return first.finished_s if isinstance(first, PacedStep) else 0.0

    def ended(self, now_s: float) -> Iterator[StepResult | Probe]:
        """What has come to its end, in order."""
        while self._steps:
            first = self._steps[0]
            if isinstance(first, PacedStep) and first.finished_s > now_s:
                return
            self._steps.popleft()
            yield self._result(first) if isinstance(first, PacedStep) else first

    def _result(self, step: PacedStep) -> StepResult:
        self._num_done += 1
        tokens = self._random.integers(0, self._vocab_size, step.plan.num_drawing_rows, dtype="<i4")
        return StepResult(
            step_id=step.plan.step_id,
            drawn=DrawnRows(token_ids=tokens.tobytes()),
            received_s=step.received_s,
            launched_s=step.received_s,
            started_s=step.started_s,
            finished_s=step.finished_s,
            counters=WorkerCounters(graph_replays=self._num_done),
        )


def ready(table: StepTimesFile, launch: LaunchConfig) -> WorkerReady:
    times = table.table.times
    assert launch.num_pages is not None, "paced_settings says how many"
    return WorkerReady(
        device=f"paced as an {table.key.device}",
        attention="none",
        graphs=True,
        compiled=False,
        buckets=tuple(time.bucket for time in times if time.bucket.num_rows <= launch.token_budget),
        max_chunks=MAX_CHUNKS,
        num_pages=launch.num_pages,
        page_size=launch.page_size,
        phases=(),
        step_times=table.table,
    )


def _wait_s(device: PacedDevice) -> float | None:
    """Until the device has something to say, in the whole milliseconds that ZeroMQ counts; the rest has passed."""
    if device.next_s is None:
        return None
    wait_s = max(0.0, device.next_s - time.monotonic())
    if wait_s < 0.001:
        time.sleep(wait_s)
        return 0.0
    return wait_s


def main(folder: Path, parent_pid: int, name: str, owner_pid: int) -> None:
    """folder: of this epoch, within the engine's."""
    end_with_parent(parent_pid, folder.parent, owner_pid)
    sys.stdin.buffer.readline()  # its turn
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    channel: Channel[WorkerToScheduler, SchedulerToWorker] = Channel(context, folder, name, "lower", SchedulerToWorker)
    table = StepTimesFile.read(Path(os.environ[STEP_TIMES_VARIABLE]))
    launch = LaunchConfig.read(folder)
    device = PacedDevice(table, launch.spec.vocab_size)
    channel.send(ready(table, launch))
    is_open = True
    while is_open:
        match channel.receive(_wait_s(device)):
            case StepPlan() | Probe() as message:
                device.take(message, time.monotonic())
            case Shutdown():
                is_open = False
        for ended in device.ended(time.monotonic()):
            channel.send(ended)
    channel.close()
    context.term()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
