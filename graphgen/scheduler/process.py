"""The scheduler process, from its start to its end.

Owns the channels, and what happens before the first request: the first worker group starts, its sizes become the
policy's limits, and a policy that is thrown away warms it up. What stops that start is told to the Engine, which then
ends; worker groups that are lost later are the loop's (`graphgen.scheduler.loop`). Called by
`graphgen.scheduler.__main__`.
"""

import logging
import sys
import time
from functools import partial
from pathlib import Path

import msgspec
import zmq

from graphgen.base.descriptors import raise_descriptor_limit
from graphgen.base.logs import log_to_stderr
from graphgen.ipc.channel import Channel
from graphgen.ipc.engine_messages import EngineToScheduler, Ready
from graphgen.ipc.senders import engine_channel
from graphgen.ipc.worker_messages import Failed, Phase, Progress, Shutdown, StepResult, WorkerReady
from graphgen.launch.launch_config import LaunchConfig
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.loop import SchedulerLoop
from graphgen.scheduler.policy import Scheduler
from graphgen.scheduler.senders import EngineChannel, Senders
from graphgen.scheduler.step_log import StepLog
from graphgen.scheduler.warm_up import warm_up
from graphgen.scheduler.worker_processes import WorkerProcesses
from graphgen.scheduler.workers import LAST_RESULTS_S, Loss, WorkerFailedError, Workers

logger = logging.getLogger("graphgen.scheduler")

WORKER_GRACE_S = 1.0
"""For a worker to end in order."""


def main(folder: Path, parent_pid: int, first: WorkerProcesses, num_senders: int) -> None:
    """Runs until Shutdown, the failure of all workers, or the end of the parent. first: the first worker group.

    num_senders: who send requests, see `graphgen.ipc.senders`.
    """
    raise_descriptor_limit()
    log_to_stderr("scheduler")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    channels: list[EngineChannel] = [
        Channel(context, folder, engine_channel(sender), "lower", EngineToScheduler) for sender in range(num_senders)
    ]
    senders = Senders(channels)
    workers = Workers(folder, parent_pid, context, first)
    try:
        config = LaunchConfig.read(folder)
        workers.launch(config)
        ready = _wait_for_workers(senders, workers)
        if ready is not None:
            limits = _limits(config, ready, num_senders)
            begun_s = time.monotonic()
            before_requests = warm_up(limits, workers.send, partial(_next_result, workers))
            ready = msgspec.structs.replace(ready, phases=(*ready.phases, Phase("warm-up", time.monotonic() - begun_s)))
            serves = Ready(ready, config.num_slots, config.token_budget)
            with StepLog.open(config.step_log) as step_log:
                policy = Scheduler(limits, CostModel(ready.step_times))
                SchedulerLoop(policy, senders, workers, step_log, serves, before_requests).run()
        failed = None
    except WorkerFailedError as error:
        failed = error.failed  # as the worker said it: the Engine makes the exception of it that its user knows
    except BaseException as error:
        logger.exception("the scheduler failed")
        failed = Failed("scheduler", type(error).__name__, str(error) or repr(error))
    if failed is not None:
        senders.tell(failed)
    workers.end(WORKER_GRACE_S if failed is None else 0.0)
    senders.close(linger_s=1.0)
    context.term()
    sys.exit(0 if failed is None else 1)


def _limits(config: LaunchConfig, ready: WorkerReady, num_senders: int) -> SchedulerLimits:
    return SchedulerLimits(
        buckets=ready.captured,
        num_pages=ready.num_pages,
        page_size=ready.page_size,
        windows=tuple(group.window for group in ready.page_groups),
        num_slots=config.num_slots,
        max_chunks=ready.max_chunks,
        max_chunk_pages=ready.max_chunk_pages,
        token_budget=config.token_budget,
        objective=config.objective,
        max_model_len=config.max_model_len,
        prefix_cache=config.prefix_cache,
        max_waiting=config.max_waiting,
        max_waiting_tokens=config.max_waiting_tokens,
        max_long_prompts=config.max_long_prompts,
        pads=ready.graphs,
        num_senders=num_senders,
    )


def _next_result(workers: Workers) -> StepResult:
    """Waits for it. Whoever wants to stop the start meanwhile ends this process."""
    while True:
        loss = workers.find_loss()
        for message in workers.receive(LAST_RESULTS_S):
            match message:
                case StepResult():
                    return message
                case Failed():
                    raise WorkerFailedError(message)
        if loss is not None:
            raise _cannot_start(loss)


def _cannot_start(loss: Loss) -> WorkerFailedError:
    said = f"{loss.reason}; its last lines were:\n{loss.last_words}"
    return WorkerFailedError(Failed("worker", "EngineDeadError", said))


def _wait_for_workers(senders: Senders, workers: Workers) -> WorkerReady | None:
    """Passes the first group's progress on until it is ready; None when the Engine wants to stop before that."""
    poller = zmq.Poller()
    senders.register(poller)
    workers.register(poller)
    while True:
        poller.poll()
        loss = workers.find_loss()
        for message in workers.receive(0.0 if loss is None else LAST_RESULTS_S):
            match message:
                case Progress():
                    senders.tell(message)
                case Failed():
                    raise WorkerFailedError(message)
        if loss is not None:
            raise _cannot_start(loss)
        if (ready := workers.take_ready()) is not None:
            return ready
        # Nobody submits anything before Ready.
        if any(isinstance(message, Shutdown) for _, message in senders.drain()):
            return None
