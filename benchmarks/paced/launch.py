"""How such engines are made in this program. Called by `benchmarks.replicas`."""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

from benchmarks.paced.worker import STEP_TIMES_VARIABLE
from benchmarks.simulated_machine import MAX_MODEL_LEN, NUM_PAGES
from graphgen.api import core
from graphgen.launch.config import EngineSettings
from graphgen.launch.processes import EngineProcesses
from graphgen.launch.step_times_store import StepTimesFile


def paced_settings(table: StepTimesFile) -> EngineSettings:
    """Of an engine like that of the table, with as many pages as 8B weights leave on an H200. A worker chooses nothing
    else."""
    most_rows = max(time.bucket.num_rows for time in table.table.times)
    return EngineSettings(
        device="cpu",
        load_format="dummy",
        compile=False,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=256,
        num_pages=NUM_PAGES,
        page_size=table.key.page_size,
        token_budget=min(1024, most_rows),
    )


@contextlib.contextmanager
def paced_engines(step_times: Path) -> Iterator[None]:
    """EngineCores that are made meanwhile have such workers. An engine that ends is not started again as one."""
    make = partial(EngineProcesses, ("benchmarks.paced.scheduler",))
    where = {STEP_TIMES_VARIABLE: str(step_times.resolve())}
    with mock.patch.object(core, "EngineProcesses", make), mock.patch.dict(os.environ, where):
        yield
