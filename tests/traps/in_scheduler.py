"""What a test may change in a scheduler's process: how long a step may take before its worker counts as hung, and which
module runs as its worker."""

import os
from typing import Any

from tests.traps import HUNG_VARIABLE, WORKER_VARIABLE
from tests.traps.imports import when_imported


def install() -> None:
    """Called in the first moment of the process."""
    if HUNG_VARIABLE in os.environ:
        when_imported("graphgen.scheduler.step_watch", _shorten)
    if WORKER_VARIABLE in os.environ:
        when_imported("graphgen.scheduler.worker_processes", _replace_worker)


def _shorten(step_watch: Any) -> None:  # a module
    step_watch.LATE_S = step_watch.HUNG_S = float(os.environ[HUNG_VARIABLE]) / 2


def _replace_worker(worker_processes: Any) -> None:  # a module
    worker_processes.WORKER_MODULE = os.environ[WORKER_VARIABLE]
