"""What a frontend process is told by its supervisor: addresses, limits and times. A file in the engine's folder."""

from pathlib import Path

import msgspec
from msgspec import Struct

from graphgen.ipc.ggp import limits

MAX_UNSTARTED = 16
"""Of one client with one engine, see `FrontendSettings.max_unstarted`."""
CONTROL_FRAME_BYTES = 1 << 16
"""No message of the control socket is larger."""
_OTHER_BYTES = 1 << 17
"""What a `generate` has beside its text: roles, stop strings, the framing of 1024 messages."""
_TEXT_BYTES_PER_TOKEN = 16
"""More than any text has on average: a longer one than this in a full context does not fit."""
_MIN_TEXT_BYTES = 1 << 16


class FrontendSettings(Struct, frozen=True, kw_only=True):
    """Everything that is decided before the frontend starts."""

    model: str
    """What clients are told they talk to."""
    data: str
    control: str
    keys: str | None
    """Folder with the server's CURVE keys and the clients' public ones; None: no authentication."""
    num_frontends: int = 1
    """Of the server, which share the engines."""
    frontends: tuple[str, ...] = ()
    """Addresses of their data sockets, where these are several."""
    engines: tuple[str, ...] = ()
    """Folders of the engines, where these are several."""
    elsewhere: tuple[tuple[int, str], ...] | None = None
    """Of engines that are servers elsewhere: their numbers and addresses. None: the engines are on this machine."""
    engine_keys: str | None = None
    """Folder with the keys for those; None: without CURVE."""
    awaits_all: bool = True
    """Whether to wait for all engines before serving; else for one, as when others are known to be at rest."""
    private: str | None = None
    """A second address of the data socket, which only processes of this server can reach."""
    memory_limit_bytes: int
    """What the process may use beyond what it uses when it begins to serve."""
    max_sessions: int = 1024
    open_requests: int = 256
    """Of one client; a request counts as often as it has samples."""
    open_prompt_tokens: int = 1 << 20
    """Of one client, times samples."""
    total_prompt_tokens: int = 1 << 22
    """Of all clients together."""
    max_unstarted: int = MAX_UNSTARTED
    """Samples of one client that wait in a scheduler's queue, of several engines for each; its others wait here for the
    client's turn."""
    heartbeat_s: float = 1.0
    slow_consumer_s: float = 60.0
    log_requests: bool = False
    """Whether the supervisor is told of each request that ends."""
    threads: int = 2
    """That tokenize prompts."""

    def write(self, path: Path) -> None:
        path.write_bytes(msgspec.msgpack.encode(self))

    @classmethod
    def read(cls, path: Path) -> "FrontendSettings":
        return msgspec.msgpack.decode(path.read_bytes(), type=cls)


def frontend_name(number: int) -> str:
    """Of the process and of its channel to the supervisor. number: among those of its server."""
    return f"frontend-{number}"


def settings_file(folder: Path, number: int) -> Path:
    return folder / f"{frontend_name(number)}.msgpack"


def text_bytes_limit(max_model_len: int) -> int:
    """UTF-8 bytes of the longest text worth tokenizing for a context of so many tokens."""
    return max(_MIN_TEXT_BYTES, _TEXT_BYTES_PER_TOKEN * max_model_len)


def frame_bytes_limit(max_model_len: int) -> int:
    """Bytes of the largest frame that can hold a request: its text, or its ids as a list of five bytes each."""
    return min(limits.MAX_FRAME_BYTES, text_bytes_limit(max_model_len) + _OTHER_BYTES)
