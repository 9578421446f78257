"""Who may connect: the keys that are let in, and the answers to ZeroMQ's question for each connection (ZAP, RFC 27).

Owns a thread that answers from memory and looks for changes in the key folder meanwhile. No handshake reads a file, so
that a flood of strangers costs a look-up each, and neither a missing file descriptor nor a damaged file ends the
thread: without it nobody could connect any more.
"""

import logging
import threading
import time
from pathlib import Path
from typing import NamedTuple, Protocol

import zmq
from zmq.utils import z85

from graphgen.base.inbox import Inbox
from graphgen.ipc.ggp.limits import MAX_PRIORITY
from graphgen.server.frontend.keys import Keys, read_max_priority, read_public_key, read_routes
from graphgen.server.frontend.sockets import Context

logger = logging.getLogger("graphgen.server.frontend")

WATCH_S = 0.5
"""Between two looks at the key folder while nobody asks."""
STRANGER_S = 0.1
"""Between two looks while unknown keys ask. They are answered after the next one: a key may just have been let in, and
a client that is refused does not try again by itself."""
SETTLED_NS = 2_000_000_000
"""A file that was changed more recently is read again: its next change might bear the same time."""
ENDPOINT = "inproc://zeromq.zap.01"
ZAP_VERSION = b"1.0"
KEY_BYTES = 32
NUM_FRAMES = 9
"""Sender, delimiter, version, request id, domain, address, routing id, mechanism, and one credential: the key."""


class Access(Protocol):
    """What a key may do. A connection without CURVE has the key ""."""

    def admits(self, key: str) -> bool:
        """Whether a public key is let in; also asked for connections that have been let in, whose key may be gone."""

    def max_priority(self, key: str) -> int:
        """The highest priority that a request of it gets."""

    def may_route(self, key: str) -> bool:
        """Whether its connections may route requests of others to this server, and name their tenants."""


class Everyone:
    """The Access of a server without keys."""

    def admits(self, key: str) -> bool:
        return True

    def max_priority(self, key: str) -> int:
        return MAX_PRIORITY

    def may_route(self, key: str) -> bool:
        return True


class _File(NamedTuple):
    """A key file as it was when it was read."""

    stamp: tuple[int, int, int]
    key: str | None
    max_priority: int
    routes: bool


class _Question(NamedTuple):
    """Whether a connection may be made."""

    envelope: list[bytes]  # what an answer begins with
    key: str


class KeyRing:
    """The public keys in a folder, and what caps their files state, as they were at the last `refresh`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, _File] = {}
        self._keys: dict[str, int] = {}  # with the highest priority of each
        self._routes: frozenset[str] = frozenset()
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def max_priority(self, key: str) -> int:
        """0 of a key that is gone."""
        return self._keys.get(key, 0)

    def may_route(self, key: str) -> bool:
        """False of a key that is gone."""
        return key in self._routes

    def refresh(self) -> None:
        """Reads the files that are new or changed. What cannot be looked at stays as it was."""
        now_ns = time.time_ns()
        files: dict[Path, _File] = {}
        for path in self._folder.glob("*.key"):
            known = self._files.get(path)
            try:
                found = path.stat()
                stamp = (found.st_mtime_ns, found.st_ino, found.st_size)
                settled = now_ns - found.st_mtime_ns > SETTLED_NS
                if settled and known and known.stamp == stamp:
                    files[path] = known
                else:
                    files[path] = _File(stamp, read_public_key(path), read_max_priority(path), read_routes(path))
            except FileNotFoundError:  # removed in this moment
                continue
            except OSError as error:  # too many open files, or a file system that is away: no reason to shut anyone out
                logger.warning("%s cannot be read (%s): it counts as unchanged", path, error)
                if known is not None:
                    files[path] = known
        self._files = files
        keys: dict[str, int] = {}
        for file in files.values():
            if file.key is not None:  # a key in several files has the lowest of their caps
                keys[file.key] = min(file.max_priority, keys.get(file.key, MAX_PRIORITY))
        self._keys = keys
        self._routes = frozenset(file.key for file in files.values() if file.routes and file.key is not None)


class Authenticator:
    """Answers for all sockets of a context which keys may connect, until `stop`. An Access; any thread may ask it."""

    def __init__(self, context: Context, keys: Keys) -> None:
        self._ring = KeyRing(keys.clients)
        self._watched_s = time.monotonic()
        self._unknown: list[_Question] = []
        self._stopping = False
        self._inbox = Inbox()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.bind(ENDPOINT)
        self._thread = threading.Thread(target=self._run, name="graphgen-authentication", daemon=True)
        self._thread.start()

    def admits(self, key: str) -> bool:
        return key in self._ring

    def max_priority(self, key: str) -> int:
        return self._ring.max_priority(key)

    def may_route(self, key: str) -> bool:
        return self._ring.may_route(key)

    def stop(self) -> None:
        self._stopping = True
        self._inbox.wake()
        self._thread.join()
        self._socket.close()
        self._inbox.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._inbox.fileno(), zmq.POLLIN)
        while not self._stopping:
            try:
                if self._socket in dict(poller.poll(int(self._period_s * 1000))):
                    self._take(self._socket.recv_multipart())
                if time.monotonic() - self._watched_s >= self._period_s:
                    self._watch()
            except Exception:  # out of memory, for instance: libzmq asks again with the next connection
                logger.exception("a connection could not be authenticated")
                time.sleep(0.01)

    @property
    def _period_s(self) -> float:
        return STRANGER_S if self._unknown else WATCH_S

    def _take(self, frames: list[bytes]) -> None:
        """One question. What is none is not answered: its connection ends by itself after the time for a handshake."""
        if (
            len(frames) != NUM_FRAMES
            or frames[2] != ZAP_VERSION
            or frames[7] != b"CURVE"
            or len(frames[8]) != KEY_BYTES
        ):
            return
        question = _Question(frames[:4], z85.encode(frames[8]).decode())
        if self.admits(question.key):
            self._answer(question)
        else:
            self._unknown.append(question)

    def _watch(self) -> None:
        self._watched_s = time.monotonic()
        self._ring.refresh()
        unknown, self._unknown = self._unknown, []
        for question in unknown:
            self._answer(question)

    def _answer(self, question: _Question) -> None:
        admitted = self.admits(question.key)
        status, text, user_id = (b"200", b"OK", question.key.encode()) if admitted else (b"400", b"Unknown key", b"")
        self._socket.send_multipart([*question.envelope, status, text, user_id, b""])
