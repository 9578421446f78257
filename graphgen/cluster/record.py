"""How another shell finds a cluster that is up: a folder of its name, and a socket in it at which its process answers.

Owns the folder, which only its user can enter, with the lock that says whether somebody is up there, the asking end of
the socket, and what passes there; `graphgen.cluster.answering` has the other end. `graphgen cluster status` and `down`
ask; they need no Ray, and work when Ray does not answer.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal

from msgspec import Struct

from graphgen.base.addresses import MAX_PATH_BYTES
from graphgen.cluster.roster import EngineStatus
from graphgen.ipc.errors import ConfigError, EngineDeadError
from graphgen.server.asking import ask_at

SOCKET, LOCK = "answering", "lock"
ANSWER_S = 10.0
_RAY_PATH_BYTES = len("/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
"""Of the longest path that is put into the folder."""

Phase = Literal["starting", "serving", "ending"]


class Question(Struct, frozen=True):
    """down: end, after the answer; a second time: at once."""

    action: Literal["status", "down"]


class EngineLine(Struct, frozen=True):
    """One engine as `status` shows it."""

    status: EngineStatus
    num_running: int
    num_waiting: int
    kv_usage: float


class ClusterStatus(Struct, frozen=True):
    """How a cluster is."""

    name: str
    pid: int
    phase: Phase
    up_s: float
    ray: str  # where its Ray is
    data: str  # of the frontend; "" while it does not serve
    control: str
    num_wanted: int
    least: int
    most: int
    num_held: int  # requests that wait in the frontend
    engines: tuple[EngineLine, ...]
    frontend_restarts: int = 0
    cold_start_s: float = 0.0
    doing: str = ""  # what its keeper is doing; "" while it waits for the next look
    doing_s: float = 0.0  # for so long
    age_s: float = 0.0  # of what is said of engines and requests: since the last look at them


class Record:
    """Of a cluster that this process keeps, from `claim` to `close`."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self._lock = lock

    @classmethod
    def claim(cls, name: str) -> "Record":
        """Raises ConfigError when a cluster of this name is up."""
        folder = folder_of(name)
        if len(os.fsencode(folder)) + _RAY_PATH_BYTES > MAX_PATH_BYTES:
            raise ConfigError(
                f"the path {folder} has {len(os.fsencode(folder))} bytes, for Ray's sockets in it"
                f" {MAX_PATH_BYTES - _RAY_PATH_BYTES} are the most: choose a shorter --name, or set TMPDIR to a shorter"
                " folder"
            )
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        if folder.parent.stat().st_uid != os.getuid() or folder.parent.stat().st_mode & 0o077:
            raise ConfigError(f"others may enter {folder.parent}: remove it, or set TMPDIR to a folder of your own")
        folder.mkdir(mode=0o700, exist_ok=True)
        lock = lock_of(folder)
        if lock is None:
            raise ConfigError(
                f"a cluster {name!r} is up already: end it with `graphgen cluster down --name {name}`, or give this one"
                " another --name"
            )
        for left in folder.iterdir():  # of one that was killed
            if left.name != LOCK:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        return cls(folder, lock)

    def close(self) -> None:
        """The name is free from here on."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def folder_of(name: str) -> Path:
    """Beneath the folder for temporary files."""
    return Path(tempfile.gettempdir()) / f"gg-clusters-{os.getuid()}" / name


def names_up() -> list[str]:
    """Of the clusters of this user on this machine."""
    parent = folder_of("any").parent
    return sorted(one.name for one in parent.glob("*") if is_up(one.name)) if parent.is_dir() else []


def is_up(name: str) -> bool:
    """Whether a process keeps it."""
    folder = folder_of(name)
    if not (folder / LOCK).exists():
        return False
    lock = lock_of(folder)
    if lock is not None:
        os.close(lock)
    return lock is None


def ask(name: str, question: Question) -> ClusterStatus:
    """Raises ConfigError where no such cluster is up, EngineDeadError where its process does not answer."""
    if not is_up(name):
        known = names_up()
        hint = f"up are: {', '.join(known)}" if known else "start one with `graphgen cluster up`"
        raise ConfigError(f"no cluster {name!r} of this user is up on this machine: {hint}")
    status = ask_at(folder_of(name) / SOCKET, question, ClusterStatus, ANSWER_S)
    if status is None:
        raise EngineDeadError(
            f"the cluster {name!r} is up and has not answered for {ANSWER_S:g} s, which it does whatever it waits for:"
            " see whether its `graphgen cluster up` was stopped, or its machine is too busy"
        )
    return status


def lock_of(folder: Path, name: str = LOCK) -> int | None:
    """The lock of a folder, which is free again when this process ends; None while another has it."""
    descriptor = os.open(folder / name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    os.close(descriptor)
    return None
