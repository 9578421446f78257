"""What an engine still does when it is ready: a second later it starts the process that stands by.

That imports for seconds, beside whatever is measured. Called by `benchmarks.restart`, which kills workers in front of
it, and by `benchmarks.serving` before its first row.
"""

import time
from collections.abc import Mapping
from typing import Protocol

from benchmarks.cpu_time import cpu_seconds

STANDBY_S = 120.0
IDLE_S = 0.5


class HasProcesses(Protocol):
    """An engine, of any kind."""

    @property
    def pids(self) -> Mapping[str, int]: ...


def wait_for_standby(engine: HasProcesses) -> int:
    """The process that stands by, once it has imported everything. Raises TimeoutError."""
    deadline_s = time.monotonic() + STANDBY_S
    while time.monotonic() < deadline_s:
        pid = engine.pids.get("standby-0")
        before_s = 0.0 if pid is None else cpu_seconds(pid)
        time.sleep(IDLE_S)
        if pid is not None and before_s > 0.2 and cpu_seconds(pid) - before_s < 0.02:
            return pid
    raise TimeoutError(f"no process stood by within {STANDBY_S:g} s")
