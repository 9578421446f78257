"""The worker process: plans in, results out.

Three threads. The main thread receives a plan, packs it and launches it; because a launch returns at once, it is
back at the socket while the device computes. The collector waits for each step's tokens and sends its result. The
watchdog ends the process when its parent is gone.
"""

import gc
import logging
import queue
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
import zmq

from graphgen.capture.stream import Mark
from graphgen.ipc.channel import Channel
from graphgen.ipc.messages import (
    Failed,
    Phase,
    Probe,
    Progress,
    SchedulerToWorker,
    Shutdown,
    StepPlan,
    StepResult,
    WorkerToScheduler,
)
from graphgen.launch.config import LaunchConfig
from graphgen.launch.tokenizer_file import read_tokenizer_part
from graphgen.worker.background import Background
from graphgen.worker.runner import LaunchedStep, ModelRunner
from graphgen.worker.step_timing import with_step_times

WorkerChannel = Channel[WorkerToScheduler, SchedulerToWorker]

logger = logging.getLogger("graphgen.worker")


def run(folder: Path, name: str, imports: Phase, device_context: Background) -> None:
    """Runs until Shutdown, a failure, or the end of the parent. device_context: the CUDA context in the making.

    name: of this rank, and of its channel in `folder`. imports: what of this start is over.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    channel: WorkerChannel = Channel(context, folder, name, "lower", SchedulerToWorker)
    try:
        channel.send(Progress("device", 0, 0))  # the first word: this process is not one that hangs
        begun_s = time.monotonic()
        config = LaunchConfig.read(folder)
        config_wait = Phase("config", time.monotonic() - begun_s)
        with torch.inference_mode():
            phases = [imports, config_wait, device_context.wait()]
            runner = ModelRunner(config, channel.send, phases, partial(read_tokenizer_part, folder.parent))
            gc.enable()
            channel.send(with_step_times(runner.describe(), runner, config, channel.send))
            _serve(runner, channel)
    except BaseException as error:
        logger.exception("the worker failed")
        channel.send(Failed("worker", type(error).__name__, str(error) or repr(error)))
        channel.close(linger_s=1.0)
        sys.exit(1)
    channel.close()
    context.term()


class LaunchedProbe(NamedTuple):
    """A probe and the point of the device's stream that answers it."""

    probe: Probe
    reached: Mark


Launched: TypeAlias = "queue.SimpleQueue[LaunchedStep | LaunchedProbe | None]"


def _serve(runner: ModelRunner, channel: WorkerChannel) -> None:
    launched: Launched = queue.SimpleQueue()
    collector = threading.Thread(target=_collect, args=(runner, launched, channel), name="collector", daemon=True)
    collector.start()
    while True:
        match channel.receive():
            case StepPlan() as plan:
                launched.put(runner.launch(plan, received_s=time.monotonic()))
            case Probe() as probe:
                launched.put(LaunchedProbe(probe, runner.mark()))
            case Shutdown():
                break
    launched.put(None)
    collector.join(timeout=1.0)
    runner.close()


def _collect(runner: ModelRunner, launched: Launched, channel: WorkerChannel) -> None:
    """Sends the result of each step once its tokens are on the host; a failed step ends the process.

    A probe is answered in its turn, when the device has come past everything launched before it.
    """
    try:
        while (step := launched.get()) is not None:
            if isinstance(step, LaunchedProbe):
                step.reached.wait()
                channel.send(step.probe)
            else:
                channel.send(_result(step, runner))
    except zmq.ZMQError:
        pass  # the main thread has failed, has said so, and has closed the channel
    except BaseException as error:
        logger.exception("the worker failed")
        channel.send(Failed("worker", type(error).__name__, f"a step failed: {error or repr(error)}"))


def _result(step: LaunchedStep, runner: ModelRunner) -> StepResult:
    step.fetched.wait()
    drawn, failed_draws = step.outputs.read()
    verdicts = runner.grammars.judge(step.draws, step.outputs.token_ids)
    return StepResult(
        step_id=step.step_id,
        drawn=drawn,
        received_s=step.received_s,
        launched_s=step.launched_s,
        started_s=step.started.wait(),
        finished_s=step.finished.wait(),
        counters=runner.counters,
        failed_draws=failed_draws,
        logprobs=step.outputs.logprobs(),
        prompt_logprobs=b"" if step.prompt_logprobs is None else step.prompt_logprobs(),
        refused_draws=verdicts.refused,
        failed_grammars=verdicts.failed,
    )
