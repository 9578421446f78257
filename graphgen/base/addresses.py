"""Addresses of servers: where the control socket lies, where further frontends are, and how a socket is bound without
harm to another.

Owns the paths of ipc sockets: libzmq removes whatever lies at one before it binds, be it a file of the user's or the
socket of a server that lives. Never looks at messages. Used by the frontend, the supervisor, the mock server and by
clients.
"""

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import zmq

from graphgen.ipc.errors import ConfigError

MAX_PATH_BYTES = 107
"""Linux limits a socket's path to so many bytes."""
MAX_PORT_DIGITS = 5
_CONNECTED = re.compile(r"[0-9A-Za-z:\[][0-9A-Za-z:\[\].%_;-]*")
"""What libzmq connects to: it takes no other characters."""
PORTS_EACH = 2
"""Of a frontend: data and control."""
LOCK_WAIT_S = 5.0
"""For another that binds in the same folder; it takes a millisecond."""


class SocketFile(NamedTuple):
    """What a bound ipc socket has in the file system."""

    path: Path
    device: int
    inode: int

    def remove(self) -> None:
        """Unless another has taken its place."""
        with contextlib.suppress(OSError):
            found = self.path.lstat()
            # A file system gives the number of a removed file to the next one, so the kind counts as well.
            if (found.st_dev, found.st_ino) == (self.device, self.inode) and stat.S_ISSOCK(found.st_mode):
                self.path.unlink()


def check_address(address: str) -> None:
    """Raises ConfigError for what is no address of a server, as one without its scheme: libzmq says just «invalid»."""
    try:
        address.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{address!r} is no text in UTF-8: write tcp://HOST:PORT or ipc://PATH in it") from None
    scheme, separator, rest = address.partition("://")
    if not separator:
        is_path = "/" in address or not _has_port(address)
        raise ConfigError(
            f"{address!r} is no address, its scheme is missing: write {'ipc' if is_path else 'tcp'}://{address}"
            " (tcp://HOST:PORT or ipc://PATH)"
        )
    if scheme not in ("tcp", "ipc"):
        raise ConfigError(f"{address} has the scheme {scheme!r}, supported are tcp and ipc: use tcp://HOST:PORT")
    if scheme == "tcp" and not _has_port(rest):
        raise ConfigError(f"{address} has no port from 0 to 65535: write tcp://HOST:PORT")


def check_connectable(address: str) -> None:
    """Raises ConfigError for what a client cannot connect to: what `check_address` refuses, a wildcard, which is right
    for a bind alone, and a host or a path of which libzmq says just «invalid»."""
    check_address(address)
    scheme, _, rest = address.partition("://")
    if scheme == "ipc":
        if rest in ("", "*", "@"):
            raise ConfigError(f"{address} has no path to connect to: write ipc://PATH, as the server was given it")
        _check_path_len(address, rest, "connected to")
        return
    host, _, port = rest.rpartition(";")[2].rpartition(":")
    if "*" in (host, port) or not int(port):
        raise ConfigError(
            f"{address} is an address to bind, and none to connect to: name host and port of the server,"
            " tcp://HOST:PORT"
        )
    if not host or _CONNECTED.fullmatch(rest) is None:
        raise ConfigError(
            f"{address} cannot be connected to, {rest.rpartition(':')[0]!r} is no host: write tcp://HOST:PORT with a"
            " name of letters, digits, . and - or a numeric address"
        )


def _has_port(host_and_port: str) -> bool:
    """libzmq's * and 0 are a port that the system chooses; what a client connects from may stand before a ;."""
    host, _, port = host_and_port.rpartition(":")
    is_number = port.isascii() and port.isdigit() and len(port) <= MAX_PORT_DIGITS
    return bool(host) and (port == "*" or (is_number and int(port) < 2**16))


def bind(listener: "zmq.Socket[bytes]", address: str) -> SocketFile | None:
    """Binds the socket; for the path of an ipc address, the file to remove before it is closed.

    Raises ConfigError for a path that is not free or cannot be one, zmq.ZMQError for what libzmq refuses.
    """
    path = _path_of(address)
    if path is None:
        listener.bind(address)
        return None
    try:
        with _locked(path.parent, address):
            own, file = _listen(path, address, int(listener.get(zmq.BACKLOG)))
            # libzmq closes it in the end. The path of a socket that it is given it neither makes nor removes.
            listener.set(zmq.USE_FD, own.detach())
            listener.bind(address)
            listener.set(zmq.USE_FD, -1)  # for another address of the same listener
    except OSError as error:
        raise ConfigError(f"{address} cannot be bound ({error.strerror}): choose another path") from None
    return file


def remove_dead(address: str) -> None:
    """Removes what a process that was killed has left at an ipc address; leaves all else alone."""
    with contextlib.suppress(ConfigError, OSError):
        path = _path_of(address)
        if path is not None:
            with _locked(path.parent, address):
                _remove_dead(path, address)


def control_address(data: str) -> str:
    """The address beside the data socket's: the next port, or a file of the same name with -control."""
    scheme, _, rest = data.partition("://")
    if scheme == "ipc":
        return f"{data}-control"
    host, _, port = rest.rpartition(":")
    if not port.isdigit():
        return data  # tcp://host:*, which gives each socket a port of its own
    return f"{scheme}://{host}:{int(port) + 1 if int(port) else 0}"


def frontend_address(first: str, number: int) -> str:
    """Of frontend `number`, whose first one is at `first`: each has two ports, for data and control. Raises ConfigError
    for an address from which ports cannot be counted on."""
    host, _, port = first.rpartition(":")
    if not number:
        return first
    if not first.startswith("tcp://") or not port.isdigit() or not int(port):
        raise ConfigError(
            f"{first} has no port to count on from, and each frontend has ports of its own: give tcp://HOST:PORT"
        )
    own = int(port) + PORTS_EACH * number
    if own >= 2**16:
        raise ConfigError(
            f"frontend {number} would have port {own}, counted on from {first}; the last is {2**16 - 1}: give a lower"
            " one, or fewer frontends"
        )
    return f"{host}:{own}"


def check_free(addresses: Iterable[str]) -> None:
    """Raises ConfigError for the first port that cannot be bound now, by all of them at once. Ports that the system
    chooses and paths are left to whoever binds them."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        for address in addresses:
            port = address.rpartition(":")[2]
            if not address.startswith("tcp://") or not port.isdigit() or not int(port):
                continue
            probe = context.socket(zmq.ROUTER)
            probe.set(zmq.IPV6, "[" in address)
            try:
                probe.bind(address)
            except zmq.ZMQError as error:
                raise ConfigError(unbound(address, error)) from None
    finally:
        context.destroy(linger=0)


def unbound(address: str, error: zmq.ZMQError) -> str:
    """What is said of an address that cannot be bound."""
    return f"{address} cannot be bound ({error}): choose another with --bind or --control"


def _path_of(address: str) -> Path | None:
    """Of an ipc address that has one: abstract names (ipc://@name) and ipc://* have no file that could be another's.

    Raises ConfigError for a path that no socket can have.
    """
    scheme, _, rest = address.partition("://")
    if scheme != "ipc" or rest in ("", "*"):
        return None
    _check_path_len(address, rest, "bound")
    if rest.startswith("@"):
        return None
    path = Path(rest)
    if not path.parent.is_dir():
        raise ConfigError(
            f"{address} cannot be bound: there is no folder {path.parent}: make it, or choose another path"
        )
    return path


def _check_path_len(address: str, path: str, use: str) -> None:
    num_bytes = len(os.fsencode(path))
    if num_bytes > MAX_PATH_BYTES:
        raise ConfigError(
            f"{address} cannot be {use}: the path has {num_bytes} bytes, a socket's has at most {MAX_PATH_BYTES}:"
            " choose a shorter one"
        )


def _listen(path: Path, address: str, backlog: int) -> tuple[socket.socket, SocketFile]:
    """A socket that listens at the path, from which a dead one is removed. Called with the folder locked."""
    _remove_dead(path, address)
    own = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        own.setblocking(False)
        own.bind(str(path))  # fails where somebody who knows nothing of the lock was quicker
        own.listen(backlog)
        found = path.lstat()
    except BaseException:
        own.close()
        raise
    return own, SocketFile(path, found.st_dev, found.st_ino)


def _remove_dead(path: Path, address: str) -> None:
    """Raises ConfigError for everything but a socket at which nobody answers."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(
            f"{address} cannot be bound: {path} is a {_kind(mode)}, which is left alone: remove it or choose another"
            " path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        refused = probe.connect_ex(str(path))
    if refused != errno.ECONNREFUSED:  # EAGAIN: its queue is full; EACCES: it is somebody else's
        raise ConfigError(f"{address} cannot be bound: it is in use by another server: end that or choose another path")
    path.unlink(missing_ok=True)


def _kind(mode: int) -> str:
    tests = {"folder": stat.S_ISDIR, "link": stat.S_ISLNK, "pipe": stat.S_ISFIFO, "file": stat.S_ISREG}
    return next((name for name, test in tests.items() if test(mode)), "device")


@contextlib.contextmanager
def _locked(folder: Path, address: str) -> Iterator[None]:
    """Two servers that start at once do not both find the socket of a third dead, and remove each other's."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline_s = time.monotonic() + LOCK_WAIT_S
        while not _try_lock(descriptor):
            if time.monotonic() > deadline_s:
                raise ConfigError(
                    f"{address} cannot be bound: another program has locked {folder} for {LOCK_WAIT_S:g} s: choose"
                    " another folder"
                )
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: one does without
        return True
    return True
