"""What is seen of an engine's start: bars on a terminal, one log line a phase elsewhere.

Owns the terminal while bars are shown. Used by `requests.core` and by the supervisor of a server.
"""

import logging
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from graphgen.ipc.worker_messages import Progress

if TYPE_CHECKING:  # rich is imported only when a bar is shown
    from rich.progress import TaskID

logger = logging.getLogger("graphgen")

FIRST_PHASE = "processes"
"""Before the worker says anything: the children start and import torch."""


class StartProgress:
    """The phases of a start, one after another.

    shows_bars: None decides by whether standard error is a terminal. Phases are logged where no bars are shown; bars
    are gone when the start is over.
    """

    def __init__(self, shows_bars: bool | None) -> None:
        self._begun_s = time.monotonic()
        self._phase: str | None = None
        self._task: TaskID | None = None
        self._bars = None
        self.shows_bars = _is_terminal() if shows_bars is None else shows_bars
        if self.shows_bars:
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            columns = TextColumn("starting: {task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
            self._bars = Bars(*columns, console=Console(stderr=True), transient=True)

    def show(self, progress: Progress) -> None:
        """Called on the link's thread with what the processes report. A total of 0: how far it is cannot be told."""
        if progress.phase != self._phase:
            self._begin(progress.phase)
        if self._bars is not None and self._task is not None and progress.total:
            self._bars.update(self._task, completed=progress.done, total=progress.total)

    def _begin(self, phase: str) -> None:
        self._phase = phase
        if self._bars is None:
            logger.info("starting: %s, after %.1f s", phase, time.monotonic() - self._begun_s)
            return
        if self._task is not None:
            self._bars.update(self._task, total=1, completed=1)  # stops its clock
        self._task = self._bars.add_task(phase, total=None)

    def __enter__(self) -> "StartProgress":
        if self._bars is not None:
            self._bars.start()
        self._begin(FIRST_PHASE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
