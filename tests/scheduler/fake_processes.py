"""Worker processes without processes: for tests of what the scheduler does with a group's messages and its end."""

import shutil
import time
from pathlib import Path

from graphgen.launch.processes import Exit
from graphgen.scheduler.worker_processes import WorkerProcesses


class FakeProcesses(WorkerProcesses):
    """A group of one that ends when a test says so. The test has the other end of its channel."""

    def __init__(self, engine_folder: Path, epoch: int = 0, behind_another: bool = False) -> None:
        self.epoch = epoch
        self.behind_another = behind_another
        self.started_s = time.monotonic()
        self.folder = engine_folder / f"epoch-{epoch}"
        self.folder.mkdir()
        self.names = ("worker-0",)
        self.pidfds = []
        self.exit: Exit | None = None
        self.num_stacks_shown = 0
        self.is_killed = False
        self.has_begun = False
        self.is_forgotten = False

    def begin(self) -> None:
        self.has_begun = True

    def find_exit(self) -> Exit | None:
        return self.exit

    def log_tail(self, name: str) -> str:
        return "its last words"

    def show_stacks(self) -> None:
        self.num_stacks_shown += 1

    def kill(self) -> None:
        self.is_killed = True

    @property
    def have_ended(self) -> bool:
        return self.is_killed or self.exit is not None

    def forget(self) -> None:
        self.is_forgotten = True
        shutil.rmtree(self.folder)
