"""When a worker may use its device: at once, or, of a standby, when the worker before it is gone.

Owns the pipe on standard input over which the scheduler says so, and what a standby does until then: it imports what
its start will need. It makes no CUDA context and takes no memory of the device, whose pages were counted without it,
and no fault of the worker that serves can reach it. Waiting takes no CPU. Imports no torch. Called by `__main__`.
"""

import contextlib
import os
import select
import threading
from collections.abc import Iterator
from pathlib import Path

from graphgen.ipc.worker_messages import Phase
from graphgen.launch.launch_config import LaunchConfig
from graphgen.launch.processes import process_age_s
from graphgen.worker.background import prepare_first_use

SACRIFICE = "1000"
"""Of oom_score_adj: this process before all others."""


class Turn:
    """Comes once, with a byte on a pipe. A pipe that is closed without one leaves it to the parent watch to end this
    process: the scheduler is gone."""

    def __init__(self, pipe: int) -> None:
        self._came = threading.Event()
        self.age_s = 0.0
        """Of this process when its turn came; 0 of one that was started for it."""
        threading.Thread(target=self._listen, args=(pipe,), name="turn", daemon=True).start()

    def _listen(self, pipe: int) -> None:
        came_at_once = bool(select.select([pipe], [], [], 0.0)[0])
        if os.read(pipe, 1):
            self.age_s = 0.0 if came_at_once else process_age_s()
            self._came.set()

    @property
    def has_come(self) -> bool:
        return self._came.is_set()

    def wait(self) -> None:
        self._came.wait()


def stand_by(folder: Path, name: str, turn: Turn) -> Phase:
    """Returns when the turn has come: the imports until now, as a phase of the start that begins with the turn."""
    imported_s = process_age_s()
    if not turn.has_come:
        with _in_reserve(f"standby-{name.rpartition('-')[2]}"):
            config = LaunchConfig.read(folder)
            # In threads: a turn that comes meanwhile is not kept waiting, and the runner asks for the same.
            prepare_first_use(config.compile, config.device != "cpu", kernel_package=None)
            turn.wait()
    seconds = max(0.0, imported_s - turn.age_s)
    return Phase("imports", seconds, hidden_s=imported_s - seconds)


@contextlib.contextmanager
def _in_reserve(name: str) -> Iterator[None]:
    """Meanwhile `ps` and `top` show this process by that name, and when memory runs out the kernel ends it first."""
    before: dict[Path, str] = {}
    for path, text in ((Path("/proc/self/comm"), name), (Path("/proc/self/oom_score_adj"), SACRIFICE)):
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            before[path] = path.read_text()
            path.write_text(text)
    yield
    for path, text in before.items():
        with contextlib.suppress(OSError):
            path.write_text(text)
