"""A server as a child process: started, found where it listens, ended.

Owns the child's folder: its order, its output, its temporary files, and where it says that it listens. Knows no Ray.
Used by the actor of an engine, and for the frontend by `graphgen.cluster.frontend`. The child ends soon after its
parent has ended, however that ended, and its folder goes with it; where both are killed, the next child removes it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
from msgspec import Struct

from graphgen.cluster.record import LOCK, lock_of
from graphgen.ipc.errors import GraphgenError
from graphgen.launch.config import EngineConfig
from graphgen.launch.processes import end_with_parent, import_path, kill_group, log_tail
from graphgen.server.options import ServeOptions
from graphgen.server.serving import serve_until_signal
from graphgen.server.supervisor import ServerPlace

MODULE = "graphgen.cluster.child"
ORDER, PLACE, LOG = "order.msgpack", "place.msgpack", "server.log"
ERROR_EXIT = 2
PREFIX = "gg-"
"""Of a child's folder."""


class Order(Struct, frozen=True):
    """What the child is to serve, and how."""

    config: EngineConfig
    options: ServeOptions


class ServerChild:
    """A server of its own session. The constructor makes its folder, `start` starts it."""

    def __init__(self, name: str) -> None:
        self._name = name
        _remove_left()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = lock_of(self.folder, "new")
        os.rename(self.folder / "new", self.folder / LOCK)  # nobody finds it free
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, config: EngineConfig, options: ServeOptions, shows: bool = False) -> None:
        """shows: what it says goes to the output of this process, else into a file of its folder."""
        (self.folder / PLACE).unlink(missing_ok=True)
        (self.folder / ORDER).write_bytes(msgspec.msgpack.encode(Order(config, options)))
        environment = {**os.environ, "PYTHONPATH": import_path(), "PYTHONUNBUFFERED": "1", "TMPDIR": str(self.folder)}
        with contextlib.ExitStack() as stack:
            output = None if shows else stack.enter_context((self.folder / LOG).open("wb"))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE, str(self.folder), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=environment,
            )

    @property
    def pid(self) -> int | None:
        """None before its start."""
        return None if self._process is None else self._process.pid

    def place(self) -> ServerPlace | None:
        """Where it listens; None while it does not yet."""
        try:
            return msgspec.msgpack.decode((self.folder / PLACE).read_bytes(), type=ServerPlace)
        except FileNotFoundError:
            return None

    @property
    def exit_code(self) -> int | None:
        """None while it lives, and before its start."""
        return None if self._process is None else self._process.poll()

    def find_end(self) -> str | None:
        """Why it has ended, with its last words; None while it lives."""
        code = self.exit_code
        if code is None:
            return None
        if code < 0:
            return f"the server of {self._name} was killed by signal {-code}"
        said = log_tail(self.folder / LOG)
        last_words = f"; its last lines were:\n{said}" if said else ""
        return f"the server of {self._name} ended with exit code {code}{last_words}"

    def ask_to_end(self) -> None:
        """Its open requests have what it was told as its grace; a second call gives them nothing more."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def stop(self, grace_s: float) -> None:
        """Waits so long for its end, kills what is left, and removes the folder. Idempotent."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
            kill_group(self._process.pid)
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _remove_left() -> None:
    """Folders of children that were killed with their parents, as Ray does when a driver has gone: they hold keys."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError):  # another user's, or just removed
            if (descriptor := lock_of(lock.parent)) is not None:
                shutil.rmtree(lock.parent, ignore_errors=True)
                os.close(descriptor)


def main() -> int:
    folder, parent_pid = Path(sys.argv[1]), int(sys.argv[2])
    end_with_parent(parent_pid, folder)
    order = msgspec.msgpack.decode((folder / ORDER).read_bytes(), type=Order)

    def tell_ready(place: ServerPlace) -> None:
        half = folder / f"{PLACE}.new"
        half.write_bytes(msgspec.msgpack.encode(place))
        half.replace(folder / PLACE)

    try:
        return serve_until_signal(order.config, order.options, tell_ready)
    except GraphgenError as error:
        sys.stderr.write(f"graphgen: {error}\n")
        return ERROR_EXIT


if __name__ == "__main__":
    sys.exit(main())
