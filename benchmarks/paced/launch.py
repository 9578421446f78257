"""Engines whose workers wait instead of computing: how they are set up and started. Called by `benchmarks.replicas`."""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

from benchmarks.paced.worker import STEP_TIMES_VARIABLE
from benchmarks.simulated_machine import MAX_MODEL_LEN, NUM_PAGES
from graphgen.api import core
from graphgen.ipc.engine_messages import ObjectiveName
from graphgen.launch import processes
from graphgen.launch.config import EngineSettings
from graphgen.launch.processes import EngineProcesses
from graphgen.launch.resolve import default_token_budget
from graphgen.launch.step_times_store import StepTimesFile

SCHEDULER_MODULE = "benchmarks.paced.scheduler"


def paced_settings(table: StepTimesFile, objective: ObjectiveName) -> EngineSettings:
    """What the worker of an engine on the device of the table would find out, and an engine would choose there."""
    most_rows = max(time.bucket.num_rows for time in table.table.times)
    return EngineSettings(
        device="cpu",
        load_format="dummy",
        compile=False,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=256,
        num_pages=NUM_PAGES,
        page_size=table.key.page_size,
        token_budget=min(default_token_budget(objective, on_cuda=True), most_rows),
    )


@contextlib.contextmanager
def paced_engines(step_times: Path) -> Iterator[None]:
    """EngineCores that are made meanwhile have such workers, and their engines are started again with such."""
    make = partial(EngineProcesses, (SCHEDULER_MODULE,))
    where = {STEP_TIMES_VARIABLE: str(step_times.resolve())}
    with (
        mock.patch.object(processes, "SCHEDULER_MODULE", SCHEDULER_MODULE),
        mock.patch.object(core, "EngineProcesses", make),
        mock.patch.dict(os.environ, where),
    ):
        yield
