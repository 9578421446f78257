"""API keys of HTTP clients: files that hold a digest of each, so that who reads them cannot use them.

Owns the folder `http` beside the CURVE keys: NAME.key has `sha256 = "..."` and perhaps `max-priority = "3"`,
`requests-per-minute = "60"`. A running
gateway looks for changes in it: a key that is made or removed needs no restart.
"""

import hashlib
import hmac
import logging
import re
import secrets
import time
from pathlib import Path
from typing import NamedTuple

from graphgen.ipc.errors import ConfigError
from graphgen.ipc.ggp.limits import MAX_PRIORITY

logger = logging.getLogger("graphgen.gateway")

FOLDER = "http"
LOOK_S = 0.5
"""Between two looks at the folder."""
_LINE = re.compile(r'^\s*([a-z0-9-]+)\s*=\s*"([^"]*)"\s*$', re.MULTILINE)


class Holder(NamedTuple):
    """Whose key it is, and the most that its requests get."""

    name: str
    max_priority: int
    requests_per_minute: int | None = None
    """None: no limit."""


def make_key(folder: Path, name: str, max_priority: int = MAX_PRIORITY, requests_per_minute: int | None = None) -> str:
    """A new key, which is kept nowhere: its file has its digest. Raises ConfigError when there is one of that name."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigError(f"{name!r} is no name for a key: use letters, digits, - and _")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{name}.key"
    key = f"gg-{secrets.token_urlsafe(32)}"
    try:
        with path.open("x") as file:
            path.chmod(0o600)
            file.write(f'sha256 = "{_digest(key)}"\nmax-priority = "{max_priority}"\n')
            if requests_per_minute is not None:
                file.write(f'requests-per-minute = "{requests_per_minute}"\n')
    except FileExistsError:
        raise ConfigError(f"{path} is there already: remove it to make another, and tell who uses it") from None
    return key


def has_keys(folder: Path) -> bool:
    return any(folder.glob("*.key"))


class ApiKeys:
    """The keys in a folder, as they were at the last look."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._looked_s = -LOOK_S
        self._holders: dict[str, Holder] = {}  # by digest

    def find(self, key: str) -> Holder | None:
        """Whose key it is. Takes as long for a wrong one as for a right one."""
        self._look()
        digest, found = _digest(key), None
        for known, holder in self._holders.items():
            if hmac.compare_digest(known, digest):
                found = holder
        return found

    def _look(self) -> None:
        now_s = time.monotonic()
        if now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        holders = {}
        for path in self._folder.glob("*.key"):
            try:
                digest, holder = _read(path)
            except (OSError, ValueError) as error:
                logger.warning("%s lets nobody in: %s", path, error)
            else:
                holders[digest] = holder
        self._holders = holders


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _read(path: Path) -> tuple[str, Holder]:
    """Digest and whose it is. Raises ValueError for a file without a digest; what is no priority counts as 0,
    what is no rate as one request a minute."""
    values = dict(_LINE.findall(path.read_text()))
    digest, priority = values.get("sha256", ""), values.get("max-priority", str(MAX_PRIORITY))
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError("it has no line sha256")
    rate = values.get("requests-per-minute")
    if rate is not None:
        rate = rate if re.fullmatch("[1-9][0-9]*", rate) else "1"
    return digest, Holder(
        path.stem,
        int(priority) if re.fullmatch(f"[0-{MAX_PRIORITY}]", priority) else 0,
        None if rate is None else int(rate),
    )
