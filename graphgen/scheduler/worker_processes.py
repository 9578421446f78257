"""The processes of a worker group: how they are started, seen to end, and ended.

Owns their handles, their folder and the files that tell others their process ids. Knows no message, and imports no
ZeroMQ: `graphgen.scheduler.__main__` starts the first group before it imports anything slow.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

from graphgen.launch.processes import Exit, kill_group, log_tail, pid_file, start_child

WORKER_MODULE = "graphgen.worker"


class WorkerProcesses:
    """One process for each rank. They share a folder of this epoch, which nothing of an earlier one can reach."""

    def __init__(self, engine_folder: Path, owner_pid: int, epoch: int, num_ranks: int) -> None:
        """owner_pid: the process whose engine this is."""
        self.epoch = epoch
        self.folder = engine_folder / f"epoch-{epoch}"
        self.folder.mkdir(mode=0o700)
        self.names = tuple(f"worker-{rank}" for rank in range(num_ranks))
        self._engine_folder = engine_folder
        self._children: list[subprocess.Popen[bytes]] = []
        self.pidfds: list[int] = []
        """Readable when the process has ended."""
        for name in self.names:
            arguments = (str(self.folder), str(os.getpid()), name, str(owner_pid))
            child = start_child(WORKER_MODULE, arguments, engine_folder / f"{name}.log")
            self._children.append(child)
            self.pidfds.append(os.pidfd_open(child.pid))
            partial = pid_file(engine_folder, f"{name}.partial")
            partial.write_text(str(child.pid))
            partial.rename(pid_file(engine_folder, name))

    def find_exit(self) -> Exit | None:
        """A rank that has ended; one that failed before one that just ended."""
        exits = [
            Exit(name, child.returncode, self.log_tail(name))
            for name, child in zip(self.names, self._children, strict=True)
            if child.poll() is not None
        ]
        return max(exits, key=lambda found: found.code != 0, default=None)

    def log_tail(self, name: str) -> str:
        """The last lines that a rank wrote."""
        return log_tail(self._engine_folder / f"{name}.log")

    def show_stacks(self) -> None:
        """Every rank writes the stacks of its threads to its output, if it still can."""
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """Ends all ranks and what they started. Returns at once; `have_ended` tells when they are gone."""
        for child in self._children:
            kill_group(child.pid)

    @property
    def have_ended(self) -> bool:
        """Whether nothing is left of any rank. The driver frees the device's memory before a process is gone."""
        return all([child.poll() is not None for child in self._children])

    def forget(self) -> None:
        """After their end: closes what is open, and removes their files."""
        for pidfd in self.pidfds:
            os.close(pidfd)
        self.pidfds.clear()
        for name in self.names:
            pid_file(self._engine_folder, name).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
