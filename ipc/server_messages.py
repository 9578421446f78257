"""The messages between a server's supervisor, the process that starts all others, and its frontends.

Owns the Structs and nothing else, as `graphgen.ipc.worker_messages` does, and by the same rules.

    supervisor -> frontend   Drain | EngineLost | DrainEngine | ExpectEngine | AddEngine | RemoveEngine
    frontend -> supervisor   Progress | Ready | EngineServes | EngineAway | EngineDrained | Notice | Listening
                             | RequestEnded | Drained | Failed
"""

from msgspec import Struct

from graphgen.ipc.engine_messages import Notice, Ready
from graphgen.ipc.worker_messages import Failed, Progress


class Drain(Struct, frozen=True, array_like=True, tag="drain", gc=False):
    """Take no new requests, finish the open ones within the time, then end. 0: end at once, with an error for each."""

    grace_s: float


class EngineLost(Struct, frozen=True, array_like=True, tag="engine_lost", gc=False):
    """An engine ended. With several, its requests go on at another; of the only one every open request ends with an
    error. When it was the last one and is not started again, the frontend ends too."""

    message: str
    restarts: bool = False  # another is being started in its place
    engine: int = 0  # its number
    is_last: bool = True  # no other is left


class DrainEngine(Struct, frozen=True, array_like=True, tag="drain_engine", gc=False):
    """One of several engines gets no new requests; what is open there after the time goes on at others. Answered by
    EngineDrained."""

    engine: int
    grace_s: float


class ExpectEngine(Struct, frozen=True, array_like=True, tag="expect_engine", gc=False):
    """An engine that had drained, or was given up, is being started again."""

    engine: int


class AddEngine(Struct, frozen=True, array_like=True, tag="add_engine", gc=False):
    """A server elsewhere is one of the engines from here on, also one that had drained. Answered by EngineServes, or by
    EngineAway."""

    engine: int
    address: str


class RemoveEngine(Struct, frozen=True, array_like=True, tag="remove_engine", gc=False):
    """A server elsewhere, at which nothing is open, is none of the engines any more."""

    engine: int


class EngineAway(Struct, frozen=True, array_like=True, tag="engine_away", gc=False):
    """A server elsewhere cannot be reached now. What it had goes on at others, and it is tried again."""

    engine: int
    reason: str
    is_refused: bool = False  # it can be reached, and is none of these engines


class EngineDrained(Struct, frozen=True, array_like=True, tag="engine_drained", gc=False):
    """Nothing is open at the engine, which may be ended; or it could not drain."""

    engine: int
    error: str = ""


class Listening(Struct, frozen=True, array_like=True, tag="listening", gc=False):
    """The public sockets are bound and requests are served."""

    data: str
    control: str


class RequestEnded(Struct, frozen=True, array_like=True, tag="request_ended", gc=False):
    """What an operator may know of a request that has ended: no word of it, and no name that acts for its session."""

    request_id: int  # the client's
    key: str  # the CURVE key of its connection; "" without keys
    address: str  # where the connection comes from; "" where that is not known
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int  # of all samples
    finish: tuple[str, ...]  # of each sample, or the code of the error that ended it
    first_token_ms: float  # from its arrival; 0 without a token
    total_ms: float
    log_id: str = ""  # what its client called it


class EngineServes(Struct, frozen=True, array_like=True, tag="engine_serves", gc=False):
    """An engine serves that was started in the place of one that ended."""

    engine: int


class Drained(Struct, frozen=True, array_like=True, tag="drained", gc=False):
    """The frontend ends. Of the requests that were open, so many got an error for their end."""

    num_lost: int


SupervisorToFrontend = Drain | EngineLost | DrainEngine | ExpectEngine | AddEngine | RemoveEngine

FrontendToSupervisor = (
    Progress | Ready | EngineServes | EngineAway | EngineDrained | Notice | Listening | RequestEnded | Drained | Failed
)
