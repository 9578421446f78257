"""What stands at the two ends of a link: the processes that it talks to, and who follows its requests.

Owns no state. `graphgen.requests.link` uses both; `graphgen.router.places` has such an observer.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from graphgen.ipc.engine_messages import EngineStats
from graphgen.ipc.errors import OverloadedError
from graphgen.ipc.reports import EngineReport
from graphgen.launch.processes import Exit
from graphgen.requests.open_request import OpenRequest


class Processes(Protocol):
    """What the link must know of an engine's processes: EngineProcesses, or a stand-in for those of another."""

    @property
    def folder(self) -> Path: ...

    @property
    def sender(self) -> int:
        """Who this end is to the engine, see `graphgen.ipc.senders`."""

    @property
    def pids(self) -> dict[str, int]: ...

    def find_exit(self) -> Exit | None: ...

    def log_tail(self, name: str, num_lines: int = ...) -> str: ...

    def stop(self, grace_s: float) -> None: ...


class RequestLink(Protocol):
    """What a request is sent by: the link to an engine, or those to several."""

    def check_process(self) -> None: ...

    def submit(self, requests: Iterable[OpenRequest]) -> None: ...

    def cancel(self, request_ids: Iterable[int]) -> None: ...

    def stats(self, timeout_s: float) -> EngineStats: ...


class Observer(Protocol):
    """Who follows the requests of a link. Called on its receiving thread."""

    def began(self, request: OpenRequest, cached_tokens: int) -> None:
        """Its first token at this engine has come. cached_tokens: of its prompt, found in the engine's cache."""

    def refused(self, request: OpenRequest, error: OverloadedError) -> bool:
        """The engine has no room for it. Returns whether it goes elsewhere: then its sink hears nothing of it."""

    def ended(self, request: OpenRequest) -> None:
        """The engine has nothing more to say of it."""

    def left(self, requests: Sequence[OpenRequest]) -> None:
        """The engine lives and does not go on with these, through no fault of theirs: they go on elsewhere."""

    def leaving(self) -> None:
        """The engine takes no new requests from here on; it is about to end."""

    def reported(self, report: EngineReport) -> None:
        """How much the engine has to do, and how fast it does it."""


class Nobody:
    """Observes nothing."""

    def began(self, request: OpenRequest, cached_tokens: int) -> None:
        pass

    def refused(self, request: OpenRequest, error: OverloadedError) -> bool:
        return False

    def ended(self, request: OpenRequest) -> None:
        pass

    def left(self, requests: Sequence[OpenRequest]) -> None:
        pass

    def leaving(self) -> None:
        pass

    def reported(self, report: EngineReport) -> None:
        pass
