"""What do the messages of a step cost? Encoding, decoding, and the way to another process and back.

Used by `benchmarks.scheduler --round-trip`. Run as a module it is the other process: it answers each StepPlan with a
StepResult of as many tokens as the plan has decode rows, at once, as a worker with no work to do would.

    python -m benchmarks.round_trip FOLDER PARENT_PID
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq

from benchmarks.report import Row, percentile
from graphgen.ipc.channel import Channel
from graphgen.ipc.codec import Codec, pack_int32
from graphgen.ipc.worker_messages import (
    Bucket,
    DrawnRows,
    SchedulerToWorker,
    Shutdown,
    StepPlan,
    StepResult,
    WorkerCounters,
    WorkerToScheduler,
)
from graphgen.launch.processes import end_with_parent

ROOT = Path(__file__).resolve().parent.parent
ANSWER_TIMEOUT_S = 30.0


def make_plan(num_rows: int) -> StepPlan:
    """A step of decode rows, one of which needs a page."""
    slots = pack_int32(range(num_rows))
    positions = pack_int32([1024] * num_rows)
    return StepPlan(
        step_id=1 << 20,
        bucket=Bucket(0, num_rows),
        decode_slots=slots,
        decode_positions=positions,
        new_pages=pack_int32([0, 0, 16, 4711]),
        planned_s=time.monotonic(),
    )


def answer(plan: StepPlan) -> StepResult:
    """One token for each row."""
    now_s = time.monotonic()
    return StepResult(
        step_id=plan.step_id,
        drawn=DrawnRows(token_ids=pack_int32([100_000] * plan.num_drawing_rows)),
        received_s=now_s,
        launched_s=now_s,
        started_s=now_s,
        finished_s=now_s,
        counters=WorkerCounters(plan.step_id, 0, 1),
    )


def codec_rows(sizes: Sequence[int], repeats: int) -> list[Row]:
    """Median us to encode and to decode each message."""
    upper: Codec[SchedulerToWorker, WorkerToScheduler] = Codec(WorkerToScheduler)
    lower: Codec[WorkerToScheduler, SchedulerToWorker] = Codec(SchedulerToWorker)
    rows: list[Row] = []
    for num_rows in sizes:
        plan = make_plan(num_rows)
        result = answer(plan)
        sent, returned = upper.encode(plan), lower.encode(result)
        rows.append(
            {
                "decode rows": num_rows,
                "plan bytes": len(sent),
                "encode plan us": _median_us(functools.partial(upper.encode, plan), repeats),
                "decode plan us": _median_us(functools.partial(lower.decode, sent), repeats),
                "result bytes": len(returned),
                "encode result us": _median_us(functools.partial(lower.encode, result), repeats),
                "decode result us": _median_us(functools.partial(upper.decode, returned), repeats),
            }
        )
    return rows


def channel_rows(sizes: Sequence[int], repeats: int) -> list[Row]:
    """us from `send(plan)` to the decoded result, with the other process waiting for each plan."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="graphgen-") as name:
        folder = Path(name)
        channel: Channel[SchedulerToWorker, WorkerToScheduler] = Channel(
            context, folder, "echo", "upper", WorkerToScheduler
        )
        command = [sys.executable, "-m", "benchmarks.round_trip", name, str(os.getpid())]
        peer = subprocess.Popen(command, cwd=ROOT)
        try:
            for num_rows in sizes:
                plan = make_plan(num_rows)
                _trip_us(channel, plan)  # the first one also waits for the peer's imports
                times = [_trip_us(channel, plan) for _ in range(repeats)]
                rows.append(
                    {
                        "decode rows": num_rows,
                        **{f"trip p{percent} us": percentile(times, percent) for percent in (50, 99)},
                        "trip max us": max(times),
                    }
                )
        finally:
            channel.send(Shutdown())
            channel.close(linger_s=1.0)
            context.term()
            try:
                peer.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                peer.kill()
                peer.wait()
    return rows


def _median_us(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begun_ns = time.perf_counter_ns()
        work()
        times.append((time.perf_counter_ns() - begun_ns) / 1000.0)
    return percentile(times, 50)


def _trip_us(channel: Channel[SchedulerToWorker, WorkerToScheduler], plan: StepPlan) -> float:
    begun_ns = time.perf_counter_ns()
    channel.send(plan)
    result = channel.receive(ANSWER_TIMEOUT_S)
    took_us = (time.perf_counter_ns() - begun_ns) / 1000.0
    if not isinstance(result, StepResult):
        raise SystemExit(f"the other process sent {result!r} within {ANSWER_TIMEOUT_S} s: see what it printed above")
    return took_us


def main(folder: Path, parent_pid: int) -> None:
    """Answers plans until Shutdown or the end of the parent."""
    end_with_parent(parent_pid, folder)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    channel: Channel[WorkerToScheduler, SchedulerToWorker] = Channel(
        context, folder, "echo", "lower", SchedulerToWorker
    )
    while isinstance(message := channel.receive(), StepPlan):
        channel.send(answer(message))
    channel.close(linger_s=1.0)
    context.term()


if __name__ == "__main__":
    if len(sys.argv) != 3 or not sys.argv[2].isdigit():
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]))
