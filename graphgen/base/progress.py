"""The progress bar of an engine's start. Owns the terminal while it is shown; used by `requests.core` alone."""

from types import TracebackType
from typing import TYPE_CHECKING

from graphgen.ipc.messages import Progress

if TYPE_CHECKING:  # rich is imported only when a bar is shown
    from rich.progress import TaskID


class StartProgress:
    """One bar per phase, on standard error. Shows nothing when it is not `enabled`."""

    def __init__(self, enabled: bool) -> None:
        self._tasks: dict[str, TaskID] = {}
        self._bars = None
        if enabled:
            from rich.console import Console
            from rich.progress import Progress as Bars

            self._bars = Bars(console=Console(stderr=True), transient=True)

    def show(self, progress: Progress) -> None:
        """Called on the client's thread with what the processes report."""
        if self._bars is None:
            return
        if progress.phase not in self._tasks:
            self._tasks[progress.phase] = self._bars.add_task(progress.phase, total=progress.total)
        self._bars.update(self._tasks[progress.phase], completed=progress.done, total=progress.total)

    def __enter__(self) -> "StartProgress":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
