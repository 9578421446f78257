"""Child processes of an engine: how they start, how they are watched, how they end, from both ends.

Owns the engine's folder (mode 0700: sockets, launch file, output of the children) and the Popen handles of the
scheduler and the frontend; the scheduler starts its workers by the same functions. Never sends a message.
EngineProcesses are made by `graphgen.requests.core` and, of a server, by `graphgen.server.supervisor`. Every child
calls `end_with_parent` first thing.

A user's program may end in ways that run no code of ours (kill -9), so each child watches its parent.
"""

import contextlib
import logging
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import msgspec

from graphgen.base.caches import cache_environment
from graphgen.ipc.errors import ConfigError

logger = logging.getLogger("graphgen")

SCHEDULER_MODULE = "graphgen.scheduler"
LEFT_WORKERS_S = 30.0
"""How long workers whose scheduler has ended may take to be gone: until then they hold the device's memory."""
PARENT_POLL_S = 0.25
"""How often a child looks whether its parent is alive."""

_MAX_FOLDER_BYTES = 107 - len("/epoch-9999/worker-99.down")
"""Linux limits a socket's path to 107 bytes."""
LOG_BYTES = 4 << 20
"""Of a child's output; half as much of what came before is kept beside it."""
_LOG_TAIL_BYTES = 8192
_ERROR_LINES = 15


class Exit(msgspec.Struct, frozen=True):
    """A child that ended by itself."""

    name: str
    code: int  # negative: the signal that killed it
    tail: str  # the last lines it wrote

    def __str__(self) -> str:
        how = f"was killed by {_signal_name(-self.code)}" if self.code < 0 else f"ended with exit code {self.code}"
        said = f"; its last lines were:\n{self.tail}" if self.tail else " and wrote nothing"
        return f"the {self.name} process {how}{said}"


class EngineProcesses:
    """The scheduler of one engine, perhaps its frontend, and the folder that all of its processes share.

    The constructor starts them. They are in a session of their own, so that Ctrl-C in a terminal reaches the user's
    program alone, which then closes its engine in order. The workers are the scheduler's children: what is here of
    them is read from the files that it leaves in the folder.
    """

    def __init__(
        self, modules: tuple[str, ...] = (SCHEDULER_MODULE,), num_ranks: int = 1, num_senders: int = 1
    ) -> None:
        """num_ranks: workers that the scheduler starts. num_senders: who send it requests."""
        self.folder = _make_folder()
        self.sender = 0  # who this program is to its engine
        self._num_ranks = num_ranks
        self._num_senders = num_senders
        self._owner_pid = os.getpid()
        self._environment = _child_environment(self.folder)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._killed_s = math.inf
        try:
            for module in modules:
                self.start(module)
        except BaseException:
            self.stop(grace_s=0.0)
            raise

    def start(self, module: str, descriptors: Sequence[int] = (), number: int | None = None) -> None:
        """Starts another child, or one anew that has ended. descriptors: of open files that it inherits. number: which
        of several with this module it is; the child is told, and its name ends in it."""
        name = module.rpartition(".")[2]
        arguments = [str(self.folder), str(self._owner_pid)]
        if number is not None:
            name = f"{name}-{number}"
            arguments.append(str(number))
        if module == SCHEDULER_MODULE:
            arguments += [str(self._num_ranks), str(self._num_senders)]
        log_file = self.folder / f"{name}.log"
        self._children[name] = start_child(module, arguments, log_file, self._environment, descriptors=descriptors)

    def finish(self, names: Sequence[str], number: int, grace_s: float) -> None:
        """Tells children by a signal to end, and waits so long for all of them together."""
        children = [self._children[name] for name in names if name in self._children]
        for child in children:
            child.send_signal(number)
        deadline_s = time.monotonic() + grace_s
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline_s - time.monotonic()))

    def restart_scheduler(self) -> None:
        """Starts a scheduler in the place of one that has ended, in the same folder: whoever talks to it by name goes
        on. Its workers, which end with it, are waited for, and what they left is removed."""
        self.end_scheduler()
        self.start(SCHEDULER_MODULE)

    def end_scheduler(self) -> None:
        """Kills the scheduler, if it lives, and its workers, waits for them and removes what they left."""
        scheduler = self._children.get(SCHEDULER_MODULE.rpartition(".")[2])
        if scheduler is not None:
            kill_group(scheduler.pid)
            scheduler.wait()
        for name in self._end_workers(time.monotonic() + LEFT_WORKERS_S):
            pid_file(self.folder, name).unlink(missing_ok=True)
        for epoch in self.folder.glob("epoch-*"):
            shutil.rmtree(epoch, ignore_errors=True)

    def _end_workers(self, deadline_s: float) -> list[str]:
        """Kills those of a scheduler that could not end them itself, and waits for them; their names."""
        left = _worker_pids(self.folder)
        for pid in left.values():
            kill_group(pid)
        while alive := [name for name, pid in left.items() if _lives(pid)]:
            if time.monotonic() >= deadline_s:
                logger.warning("killed and not gone after %g s, held by the device's driver: %s", LEFT_WORKERS_S, alive)
                break
            time.sleep(0.01)
        return list(left)

    @property
    def pids(self) -> dict[str, int]:
        """By name, the workers' and standbys' included."""
        return {name: child.pid for name, child in self._children.items()} | _worker_pids(self.folder)

    def find_exit(self, names: Collection[str] | None = None) -> Exit | None:
        """A child that has ended, if any, of these; the one that failed first matters, so errors come before plain
        ends."""
        exits = [
            Exit(name, child.returncode, self.log_tail(name))
            for name, child in self._children.items()
            if (names is None or name in names) and child.poll() is not None
        ]
        return max(exits, key=lambda child_exit: child_exit.code != 0, default=None)

    def log_tail(self, name: str, num_lines: int = _ERROR_LINES) -> str:
        """The last lines that a child or a worker wrote to its output."""
        return log_tail(self.folder / f"{name}.log", num_lines)

    def stop(self, grace_s: float) -> None:
        """Waits `grace_s` for the children to end, ends those that did not, and removes the folder. Idempotent.

        Where a scheduler could not end its workers itself they are waited for, no longer than LEFT_WORKERS_S: the
        device's memory is free then.
        """
        self.wait(grace_s)
        self.kill()
        for child in self._children.values():
            child.wait()
        self._end_workers(self._killed_s + LEFT_WORKERS_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait(self, grace_s: float) -> None:
        """Until all children have ended, for no longer than that."""
        deadline_s = time.monotonic() + grace_s
        while any(child.poll() is None for child in self._children.values()) and time.monotonic() < deadline_s:
            time.sleep(0.01)

    def kill(self) -> None:
        """Kills the children and their workers. Returns at once: `stop` waits for them."""
        for pid in (*(child.pid for child in self._children.values()), *_worker_pids(self.folder).values()):
            kill_group(pid)
        self._killed_s = min(self._killed_s, time.monotonic())


def start_child(
    module: str,
    arguments: Sequence[str],
    log_file: Path,
    environment: Mapping[str, str] | None = None,
    reads: bool = False,
    descriptors: Sequence[int] = (),
) -> "subprocess.Popen[bytes]":
    """`python -m module arguments`, in a session and process group of its own, its output in a file.

    reads: its standard input is a pipe from here, and not empty. descriptors: of the open files that it inherits.
    """
    log_file.unlink(missing_ok=True)
    with log_file.open("ab") as log:  # appended to, so that the child may cut it
        return subprocess.Popen(
            # -P: a file of the user's named like a library must not be imported in its place.
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE if reads else subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=environment,
            pass_fds=descriptors,
        )


def kill_group(pid: int) -> None:
    """Kills a child and what it started itself: compilers live in its process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def log_tail(log_file: Path, num_lines: int = _ERROR_LINES) -> str:
    """The last lines of a child's output, what was cut off it included; "" when the folder is gone, as it is when
    whoever ended last has removed it."""
    said = b""
    for path in (log_file, log_file.with_name(f"{log_file.name}.1")):
        with contextlib.suppress(FileNotFoundError):
            said = _end_of(path, _LOG_TAIL_BYTES - len(said)) + said
    return "\n".join(said.decode(errors="replace").splitlines()[-num_lines:])


def rank_of(name: str) -> int:
    """Of a worker, by its name."""
    return int(name.rpartition("-")[2])


def pid_file(folder: Path, name: str) -> Path:
    """Where a scheduler says which process a worker is."""
    return folder / f"{name}.pid"


def _worker_pids(folder: Path) -> dict[str, int]:
    """Of the workers that there are, and those that stand by. None where the folder is gone, which another thread may
    remove at any moment."""
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        names = sorted(os.listdir(folder))
    found = {}
    for name in names:
        if re.fullmatch(r"(worker|standby)-\d+\.pid", name):
            with contextlib.suppress(OSError, ValueError):  # it is being replaced
                found[name.removesuffix(".pid")] = int((folder / name).read_text())
    return found


def end_with_parent(parent_pid: int, folder: Path, owner_pid: int | None = None) -> None:
    """Ends this process soon after its parent has ended, however that ended, and removes the engine's folder.

    owner_pid: the process whose engine it is, where that is not the parent. While it lives the folder is its own.

    Called by a child before its slow imports. It asks getppid, which cannot be fooled by a reused process id; the
    kernel's parent-death signal would not do, since that follows the thread which started the child.

    From then on the parent alone decides when the child ends: what service managers send to every process of a group
    does nothing here, so that a server which drains still has its engine.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # unlike SIG_IGN, not inherited by compilers that a worker starts

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(PARENT_POLL_S)
            with contextlib.suppress(OSError):
                shorten_log(folder)
        if owner_pid is None or not _lives(owner_pid):
            _remove_while_used(folder)
        # Compilers that a worker started would outlive it: its process group is its own, see EngineProcesses.
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="graphgen-parent-watch", daemon=True).start()


def shorten_log(folder: Path, most_bytes: int = LOG_BYTES) -> None:
    """Moves the end of this process's output to `NAME.log.1` when there is too much of it, and begins it anew. Output
    that is no file in `folder` is left alone."""
    output = os.fstat(2)
    if not stat.S_ISREG(output.st_mode) or output.st_size <= most_bytes:
        return
    path = Path(os.readlink("/proc/self/fd/2"))
    if os.path.samefile(path.parent, folder):
        path.with_name(f"{path.name}.1").write_bytes(_end_of(path, most_bytes // 2))
        os.truncate(path, 0)


def _end_of(path: Path, num_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - num_bytes))
        return file.read(num_bytes)


_STATE, _NUM_THREADS, _STARTED_TICKS = 0, 17, 19
"""Places in what `_stat` returns."""


def _stat(process: int | str) -> list[str]:
    """The fields of /proc/PID/stat behind the name. Raises OSError where there is no such process."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def _lives(pid: int) -> bool:
    """Also where its first thread has ended and others are still ending: what is open, a device's memory for one, is
    given back with the last."""
    try:
        fields = _stat(pid)
    except OSError:
        return False
    return fields[_STATE] not in "ZX" or int(fields[_NUM_THREADS]) > 1


def _make_folder() -> Path:
    """A folder that only this user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="graphgen-"))
    if len(os.fsencode(folder)) > _MAX_FOLDER_BYTES:
        folder.rmdir()
        raise ConfigError(
            f"the path of the temporary folder {folder} has {len(os.fsencode(folder))} bytes, a socket in it allows"
            f" {_MAX_FOLDER_BYTES}: set TMPDIR to a shorter path"
        )
    return folder


def _remove_while_used(folder: Path) -> None:
    """Removes a folder in which this process or the other child may be binding a socket at this moment."""
    for _ in range(40):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():  # from here on a bind fails, and with it the process that tried
            return
        time.sleep(0.025)


def process_age_s() -> float:
    """Seconds since this process was started: what its imports took, when asked right after them."""
    started_ticks = int(_stat("self")[_STARTED_TICKS])
    up_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    return up_s - started_ticks / os.sysconf("SC_CLK_TCK")


def _child_environment(folder: Path) -> dict[str, str]:
    """The user's environment, with the folder that graphgen was imported from in front of the import path, and with
    the compilers' caches in one place; what cannot be kept lies in the engine's folder."""
    environment = {**os.environ, "PYTHONPATH": import_path(), "PYTHONUNBUFFERED": "1"}
    return cache_environment(environment, spare=folder / "caches")


def import_path() -> str:
    """PYTHONPATH of a child that is to import the same graphgen: that of this process, behind its folder."""
    root = Path(__file__).resolve().parents[2]
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(root), *([inherited] if inherited else [])])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
