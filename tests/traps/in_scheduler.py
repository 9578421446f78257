"""What a test may change in a scheduler's process: how long a step may take before its worker counts as hung."""

import os
from typing import Any

from tests.traps import HUNG_VARIABLE
from tests.traps.imports import when_imported


def install() -> None:
    """Called in the first moment of the process."""
    if HUNG_VARIABLE in os.environ:
        when_imported("graphgen.scheduler.step_watch", _shorten)


def _shorten(step_watch: Any) -> None:  # a module
    step_watch.LATE_S = step_watch.HUNG_S = float(os.environ[HUNG_VARIABLE]) / 2
