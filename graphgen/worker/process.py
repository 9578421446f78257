"""The worker process: plans in, results out.

Three threads. The main thread receives a plan, packs it and launches it; because a launch returns at once, it is
back at the socket while the device computes. The collector waits for each step's tokens and sends its result. The
watchdog ends the process when its parent is gone.
"""

import gc
import logging
import os
import queue
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec
import torch
import zmq

from graphgen.capture.stream import Mark
from graphgen.ipc.channel import Channel
from graphgen.ipc.worker_messages import (
    Capture,
    Captured,
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
from graphgen.launch.launch_config import LaunchConfig
from graphgen.launch.processes import rank_of
from graphgen.launch.tokenizer_file import read_tokenizer_part
from graphgen.models.collectives.group import RankGroup, is_loss_of_peer
from graphgen.models.spec import Shard
from graphgen.worker.ahead import KernelsAhead
from graphgen.worker.background import Background
from graphgen.worker.late_captures import LateCaptures
from graphgen.worker.runner import LaunchedStep, ModelRunner
from graphgen.worker.step_timing import with_step_times

WorkerChannel = Channel[WorkerToScheduler, SchedulerToWorker]

logger = logging.getLogger("graphgen.worker")

RENDEZVOUS_FILE = "ranks"
"""In the folder of an epoch, where its ranks meet."""
PEER_PATIENCE_S = 1.0
"""For the word of a rank that failed first, and for its end to be seen: the others fail of it."""


def run(folder: Path, name: str, imports: Phase, device_context: Background, kernels: KernelsAhead | None) -> None:
    """Runs until Shutdown, a failure, or the end of the parent. device_context: the CUDA context in the making.
    kernels: Triton's, being compiled; None: there can be none, or all are there.

    name: of this rank, and of its channel in `folder`. imports: what of this start is over.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    channel: WorkerChannel = Channel(context, folder, name, "lower", SchedulerToWorker)
    ranks: RankGroup | None = None
    try:
        channel.send(Progress("device", 0, 0))  # the first word: this process is not one that hangs
        begun_s = time.monotonic()
        config = LaunchConfig.read(folder)
        config = msgspec.structs.replace(config, device=config.device_of(rank_of(name)))
        config_wait = Phase("config", time.monotonic() - begun_s)
        with torch.inference_mode():
            phases = [imports, config_wait, device_context.wait()]
            if config.num_ranks > 1:
                begun_s = time.monotonic()
                ranks = _meet(config, rank_of(name), folder)
                phases.append(Phase("ranks", time.monotonic() - begun_s))
            read_tokenizer = partial(read_tokenizer_part, folder.parent)
            runner = ModelRunner(config, channel.send, phases, read_tokenizer, ranks, kernels)
            gc.enable()
            ready = with_step_times(runner.describe(), runner, config, channel.send, ranks)
            channel.send(ready)
            captures = LateCaptures(runner, config, ready, ranks)
            _serve(runner, captures, channel, "worker" if ranks is None else name, answers=rank_of(name) == 0)
    except BaseException as error:
        _say_failed(channel, error, "worker" if ranks is None else name)
        channel.close(linger_s=1.0)
        _end(ranks, 1)
    channel.close()
    context.term()
    _end(ranks, 0)


def _meet(config: LaunchConfig, rank: int, folder: Path) -> RankGroup:
    device = torch.device(config.device)
    return RankGroup(Shard(rank, config.num_ranks), folder / RENDEZVOUS_FILE, device, config.start_timeout_s)


def _say_failed(channel: WorkerChannel, error: BaseException, where: str, what: str = "") -> None:
    """where: which worker this is. what: of what is said."""
    logger.exception("the worker failed")
    if is_loss_of_peer(error):
        time.sleep(PEER_PATIENCE_S)
    channel.send(Failed(where, type(error).__name__, f"{what}{str(error) or repr(error)}"))


def _end(ranks: RankGroup | None, code: int) -> None:
    """Of this process. A group whose collectives were captured is not taken down, since that may wait for ever."""
    if ranks is not None:
        logging.shutdown()
        os._exit(code)
    if code:
        sys.exit(code)


class LaunchedProbe(NamedTuple):
    """A probe and the point of the device's stream that answers it."""

    probe: Probe
    reached: Mark


Launched: TypeAlias = "queue.SimpleQueue[LaunchedStep | LaunchedProbe | Captured | None]"


def _serve(runner: ModelRunner, captures: LateCaptures, channel: WorkerChannel, where: str, answers: bool) -> None:
    """where: which worker this is. answers: of several ranks the first one tells what the steps gave."""
    launched: Launched = queue.SimpleQueue()
    arguments = (runner, launched, channel, where, answers)
    collector = threading.Thread(target=_collect, args=arguments, name="collector", daemon=True)
    collector.start()
    while True:
        match channel.receive():
            case StepPlan() as plan:
                launched.put(runner.launch(plan, received_s=time.monotonic()))
            case Capture() as asked:
                captured = captures.capture(asked.bucket)
                if answers:  # on the collector's thread, as every answer
                    launched.put(captured)
            case Probe() as probe:
                launched.put(LaunchedProbe(probe, runner.mark()))
            case Shutdown():
                break
    launched.put(None)
    collector.join(timeout=1.0)
    runner.close()


def _collect(runner: ModelRunner, launched: Launched, channel: WorkerChannel, where: str, answers: bool) -> None:
    """Sends the result of each step once its tokens are on the host; a failed step ends the process.

    A probe is answered in its turn, when the device has come past everything launched before it.
    """
    try:
        while (step := launched.get()) is not None:
            if isinstance(step, Captured):
                channel.send(step)
            elif not answers:
                (step.reached if isinstance(step, LaunchedProbe) else step.fetched).wait()
            elif isinstance(step, LaunchedProbe):
                step.reached.wait()
                channel.send(step.probe)
            else:
                channel.send(_result(step, runner))
    except zmq.ZMQError:
        pass  # the main thread has failed, has said so, and has closed the channel
    except BaseException as error:
        _say_failed(channel, error, where, "a step failed: ")


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
