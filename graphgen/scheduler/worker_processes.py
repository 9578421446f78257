"""The processes of a worker group: how they are started, get their turn, are seen to end, and are ended.

Owns their handles, their folder and the files that tell others their process ids. Knows no message, and imports no
ZeroMQ: `graphgen.scheduler.__main__` starts the first group before it imports anything slow.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from graphgen.launch.processes import Exit, kill_group, log_tail, pid_file, start_child

WORKER_MODULE = "graphgen.worker"
BEHIND_ANOTHER = "behind-another"
"""The last argument of a worker that is started while another one serves."""
START_FAILED_S = 1.0
"""For the ranks that were started before one that could not be."""


class WorkerProcesses:
    """One process for each rank. They share a folder of this epoch, which nothing of an earlier one can reach.

    They import what they need and stand by until `begin`, which for most comes at once.
    """

    def __init__(
        self, engine_folder: Path, owner_pid: int, epoch: int, num_ranks: int, behind_another: bool = False
    ) -> None:
        """owner_pid: the process whose engine this is. behind_another: a group serves while these are started."""
        self.epoch = epoch
        self.started_s = time.monotonic()
        self.folder = engine_folder / f"epoch-{epoch}"
        self.folder.mkdir(mode=0o700)
        self.names = tuple(f"worker-{rank}" for rank in range(num_ranks))
        self._called = tuple(f"standby-{rank}" for rank in range(num_ranks))  # until they begin
        self._engine_folder = engine_folder
        self._children: list[subprocess.Popen[bytes]] = []
        self.pidfds: list[int] = []
        """Readable when the process has ended."""
        try:
            for name, called in zip(self.names, self._called, strict=True):
                self._start(name, called, owner_pid, behind_another)
        except BaseException:
            self.kill()
            self.wait(START_FAILED_S)
            self.forget()
            raise

    def _start(self, name: str, called: str, owner_pid: int, behind_another: bool) -> None:
        arguments = [str(self.folder), str(os.getpid()), name, str(owner_pid)]
        arguments += [BEHIND_ANOTHER] if behind_another else []
        child = start_child(WORKER_MODULE, arguments, self._log_file(called), reads=True)
        self._children.append(child)
        self.pidfds.append(os.pidfd_open(child.pid))
        partial = pid_file(self._engine_folder, f"{called}.partial")
        partial.write_text(str(child.pid))
        partial.rename(pid_file(self._engine_folder, called))

    def begin(self) -> None:
        """From here on they are the engine's workers, and may use its device."""
        for called, name, child in zip(self._called, self.names, self._children, strict=True):
            self._log_file(called).replace(self._log_file(name))
            pid_file(self._engine_folder, called).replace(pid_file(self._engine_folder, name))
            assert child.stdin is not None, "it was started with a pipe"
            with contextlib.suppress(BrokenPipeError):  # it has just ended, which is seen elsewhere
                child.stdin.write(b"\n")
                child.stdin.flush()
            _close(child)
        self._called = self.names

    def find_exit(self) -> Exit | None:
        """A rank that has ended; one that failed before one that just ended."""
        exits = [
            Exit(called, child.returncode, self.log_tail(called))
            for called, child in zip(self._called, self._children, strict=True)
            if child.poll() is not None
        ]
        return max(exits, key=lambda found: found.code != 0, default=None)

    def log_tail(self, name: str) -> str:
        """The last lines that a rank wrote."""
        return log_tail(self._log_file(name))

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

    def wait(self, patience_s: float) -> None:
        """Until all have ended, for no longer than that."""
        deadline_s = time.monotonic() + patience_s
        while not self.have_ended and time.monotonic() < deadline_s:
            time.sleep(0.005)

    def forget(self) -> None:
        """After their end: closes what is open, and removes their files."""
        for pidfd in self.pidfds:
            os.close(pidfd)
        self.pidfds.clear()
        for called, child in zip(self._called, self._children, strict=True):
            _close(child)
            pid_file(self._engine_folder, called).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _log_file(self, called: str) -> Path:
        return self._engine_folder / f"{called}.log"


def _close(child: "subprocess.Popen[bytes]") -> None:
    """This end of the child's standard input."""
    if child.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
