"""CURVE keys: the server's own, and those of the clients that may connect.

Owns the layout of the key folder (mode 0700):

    server.key_secret   the server's pair; `server.key` beside it is the public half, for clients
    clients/NAME.key    public keys that are let in; NAME.key_secret, made here on request, is for the client to take.
                        `max-priority = "3"` in its metadata caps the priority of the key's requests, `routes = "true"`
                        lets a frontend with the key route requests of others here

A running server looks for changes in it, so that a key that is let in or removed needs no restart.
"""

import logging
import os
from pathlib import Path

import zmq.auth
from zmq.utils import z85

from graphgen.ipc.errors import ConfigError
from graphgen.ipc.ggp.limits import MAX_PRIORITY

logger = logging.getLogger("graphgen.server.frontend")

KEY_LEN = 40
"""Characters of a key in ZeroMQ's Z85 alphabet."""
SERVER = "server"
MAX_PRIORITY_NAME = b"max-priority"
ROUTES_NAME = b"routes"
"""In the metadata of a client's key file."""


def default_folder() -> Path:
    """`$GRAPHGEN_KEYS`, or `~/.config/graphgen/keys`."""
    named = os.environ.get("GRAPHGEN_KEYS")
    return Path(named).expanduser() if named else Path.home() / ".config" / "graphgen" / "keys"


class Keys:
    """A folder of keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clients = folder / "clients"

    @property
    def has_server_key(self) -> bool:
        return (self.folder / f"{SERVER}.key_secret").exists()

    def make(self, name: str | None, max_priority: int = MAX_PRIORITY, routes: bool = False) -> tuple[Path, str]:
        """A new pair, the server's without a name: (its secret file, its public key). A client's is let in by that;
        requests of it that ask for more than `max_priority` get this. routes: it may route requests of others.

        Raises ConfigError when it is there already.
        """
        _check_metadata(name, max_priority, routes)
        folder = self.folder if name is None else self.clients
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        stem = SERVER if name is None else _checked_name(name)
        secret = folder / f"{stem}.key_secret"
        if secret.exists() or (folder / f"{stem}.key").exists():
            raise ConfigError(f"{secret} is there already: remove it to make another, and tell those who use it")
        zmq.auth.create_certificates(folder, stem)
        secret.chmod(0o600)
        public_key = zmq.auth.load_certificate(secret)[0].decode()
        if name is not None and (max_priority < MAX_PRIORITY or routes):
            self.allow(name, public_key, max_priority, routes)
        return secret, public_key

    def allow(self, name: str, public_key: str, max_priority: int = MAX_PRIORITY, routes: bool = False) -> Path:
        """Lets a client's public key in, under a name that helps to find it again. Its requests have at most
        `max_priority`. routes: it may route requests of others."""
        _check_metadata(name, max_priority, routes)
        if not _is_key(public_key):
            raise ConfigError(
                f"{public_key!r} is no public key: give the {KEY_LEN} characters of the file's public-key"
            )
        self.clients.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.clients / f"{_checked_name(name)}.key"
        half = path.with_suffix(".new")  # a server that looks at this moment finds the whole file or none
        cap = f'    {MAX_PRIORITY_NAME.decode()} = "{max_priority}"\n' if max_priority < MAX_PRIORITY else ""
        granted = f'    {ROUTES_NAME.decode()} = "true"\n' if routes else ""
        half.write_text(f'metadata\n{cap}{granted}curve\n    public-key = "{public_key}"\n')
        return half.replace(path)

    def server_secret_key(self) -> bytes:
        """Raises ConfigError when there is none."""
        secret = self.folder / f"{SERVER}.key_secret"
        if not self.has_server_key:
            raise ConfigError(f"there are no server keys in {self.folder}: make them with `graphgen keys new`")
        key = zmq.auth.load_certificate(secret)[1]
        if key is None:
            raise ConfigError(f"{secret} holds no secret key: make new keys with `graphgen keys new`")
        return key


def read_public_key(path: Path) -> str | None:
    """Of a key file; None where it holds none, so that a damaged file lets nobody in and keeps nobody else out.

    Raises OSError where it cannot be read.
    """
    with path.open("rb"):  # what load_certificate says of a file that cannot be opened does not tell why
        try:
            key = zmq.auth.load_certificate(path)[0].decode()
        except ValueError:
            return None
    return key if _is_key(key) else None


def read_max_priority(path: Path) -> int:
    """The most that requests of a key file's key get, MAX_PRIORITY where the file does not say. What is no priority
    counts as 0, with a warning: it was meant as a cap, and its client is served meanwhile.

    Raises OSError where the file cannot be read.
    """
    found = _metadata(path, MAX_PRIORITY_NAME)
    if found is None:
        return MAX_PRIORITY
    if len(found) == 1 and found.isdigit():
        return int(found)
    said = found.decode(errors="replace")
    logger.warning("%s: max-priority %r counts as 0: give one of 0 to %d", path, said, MAX_PRIORITY)
    return 0


def read_routes(path: Path) -> bool:
    """Whether who has a key file's key may route requests of others. Raises OSError where the file cannot be read."""
    return _metadata(path, ROUTES_NAME) == b"true"


def _metadata(path: Path, name: bytes) -> bytes | None:
    with path.open("rb") as lines:
        pairs = (line.partition(b"=") for line in lines)
        return next((value.strip(b" \t\r\n'\"") for found, _, value in pairs if found.strip() == name), None)


def _check_metadata(name: str | None, max_priority: int, routes: bool) -> None:
    if not 0 <= max_priority <= MAX_PRIORITY:
        raise ConfigError(f"max_priority is {max_priority}, priorities are 0 to {MAX_PRIORITY}: give one of these")
    if name is None and max_priority < MAX_PRIORITY:
        raise ConfigError("the server's own key makes no requests: name a client's to cap its priority")
    if name is None and routes:
        raise ConfigError("the server's own key routes no requests: name a frontend's")


def _is_key(text: str) -> bool:
    try:
        return len(text) == KEY_LEN and len(z85.decode(text)) == 32
    except (ValueError, KeyError):
        return False


def _checked_name(name: str) -> str:
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"{name!r} is no name for a key: use letters, digits, - and _")
    return name
