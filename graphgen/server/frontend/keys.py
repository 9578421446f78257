"""CURVE keys: the server's own, and those of the clients that may connect.

Owns the layout of the key folder (mode 0700):

    server.key_secret   the server's pair; `server.key` beside it is the public half, for clients
    clients/NAME.key    public keys that are let in; NAME.key_secret, made here on request, is for the client to take.
                        `max-priority = "3"` in its metadata caps the priority of the key's requests

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

    def make(self, name: str | None, max_priority: int = MAX_PRIORITY) -> tuple[Path, str]:
        """A new pair, the server's without a name: (its secret file, its public key). A client's is let in by that;
        requests of it that ask for more than `max_priority` get this.

        Raises ConfigError when it is there already.
        """
        _check_priority(name, max_priority)
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
        if max_priority < MAX_PRIORITY and name is not None:
            self.allow(name, public_key, max_priority)
        return secret, public_key

    def allow(self, name: str, public_key: str, max_priority: int = MAX_PRIORITY) -> Path:
        """Lets a client's public key in, under a name that helps to find it again. Its requests have at most
        `max_priority`."""
        _check_priority(name, max_priority)
        if not _is_key(public_key):
            raise ConfigError(
                f"{public_key!r} is no public key: give the {KEY_LEN} characters of the file's public-key"
            )
        self.clients.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.clients / f"{_checked_name(name)}.key"
        half = path.with_suffix(".new")  # a server that looks at this moment finds the whole file or none
        cap = f'    {MAX_PRIORITY_NAME.decode()} = "{max_priority}"\n' if max_priority < MAX_PRIORITY else ""
        half.write_text(f'metadata\n{cap}curve\n    public-key = "{public_key}"\n')
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
    with path.open("rb") as lines:
        pairs = (line.partition(b"=") for line in lines)
        found = [value.strip(b" \t\r\n'\"") for name, _, value in pairs if name.strip() == MAX_PRIORITY_NAME]
    if not found:
        return MAX_PRIORITY
    if len(found[0]) == 1 and found[0].isdigit():
        return int(found[0])
    said = found[0].decode(errors="replace")
    logger.warning("%s: max-priority %r counts as 0: give one of 0 to %d", path, said, MAX_PRIORITY)
    return 0


def _check_priority(name: str | None, max_priority: int) -> None:
    if not 0 <= max_priority <= MAX_PRIORITY:
        raise ConfigError(f"max_priority is {max_priority}, priorities are 0 to {MAX_PRIORITY}: give one of these")
    if name is None and max_priority < MAX_PRIORITY:
        raise ConfigError("the server's own key makes no requests: name a client's to cap its priority")


def _is_key(text: str) -> bool:
    try:
        return len(text) == KEY_LEN and len(z85.decode(text)) == 32
    except (ValueError, KeyError):
        return False


def _checked_name(name: str) -> str:
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"{name!r} is no name for a key: use letters, digits, - and _")
    return name
