"""Messages to frames and back: the four-byte header and the msgpack map of GGP/1.

Owns what makes a message malformed and which error answers it. Never touches a socket. Called by the frontend and by
the Python client for every message.
"""

from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar, cast

import msgspec
from msgspec import Struct

from graphgen.ipc.ggp.codes import CODES, Code
from graphgen.ipc.ggp.messages import (
    CLIENT_KINDS,
    MAJOR,
    NAMES,
    SERVER_KINDS,
    ClientMessage,
    Error,
    Generate,
    LogId,
    NumSamples,
    RequestId,
    ServerMessage,
    Tenant,
)

MAGIC = b"GG"
HEADER_LEN = 4
MADE_ID_LEN = 5
CHOSEN_ID = "the connection has a routing id of its own choosing: leave ZMQ_ROUTING_ID unset, the server makes the ids"
NUM_FRAMES = 2

_NO_MAP = "Expected `object`, got"
"""How msgspec begins when a value is no map."""
_IN_A_KEY = "key` in `"
"""How it begins the path of a key that is no str."""
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What bytes that are no msgpack raise. The last two pass through msgspec as they are: bad UTF-8, and nesting beyond
the interpreter's stack."""

Buffer = bytes | memoryview
Send = TypeVar("Send")
Receive = TypeVar("Receive")


class FrameError(Exception):
    """A message that cannot be taken, with the error that answers it."""

    def __init__(self, error: Error) -> None:
        super().__init__(f"{error.code}: {error.message}")
        self.error = error


class Framing(Generic[Send, Receive]):
    """One end's encoder and decoders. May be shared by threads."""

    def __init__(self, sends: Mapping[bytes, type[Struct]], receives: Mapping[bytes, type[Struct]]) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._headers = {kind: MAGIC + bytes([MAJOR]) + letter for letter, kind in sends.items()}
        self._kinds = dict(receives)
        self._decoders = {kind: msgspec.msgpack.Decoder(kind) for kind in receives.values()}
        self._brief_decoder = msgspec.msgpack.Decoder(_BriefWithSamples)
        self._id_decoder = msgspec.msgpack.Decoder(_IdOnly)

    def encode(self, message: Send) -> tuple[bytes, bytes]:
        """Header and map."""
        return self._headers[type(message)], self._encoder.encode(message)  # type: ignore[index]  # Send is a union of them

    def kind_of(self, frames: Sequence[Buffer]) -> type[Struct]:
        """The type that a message's header announces. Raises FrameError for what cannot be a message."""
        if len(frames) != NUM_FRAMES:
            raise FrameError(make_error("bad_frame", f"the message has not {NUM_FRAMES} frames: send header and map"))
        header = bytes(frames[0][: HEADER_LEN + 1])
        if len(header) != HEADER_LEN or header[:2] != MAGIC:
            raise FrameError(
                make_error("bad_frame", f"the first frame is no header: send the 4 bytes GG, {MAJOR:#04x}, kind")
            )
        if header[2] != MAJOR:
            raise FrameError(unsupported_version(f"the header says version {header[2]}"))
        if header[3:] not in self._kinds:
            raise FrameError(make_error("bad_frame", f"kind {header[3]:#04x} is unknown here: see the list of kinds"))
        return self._kinds[header[3:]]

    def decode(self, frames: Sequence[Buffer]) -> Receive:
        """Raises FrameError for everything that is no message, whatever its bytes are."""
        kind, body = self.kind_of(frames), frames[1]
        name, decoder = NAMES[kind], self._decoders[kind]
        try:
            return cast(Receive, decoder.decode(body))
        except msgspec.ValidationError as error:
            if _is_no_map(error):
                raise _no_map(error, name) from None
            # An error with an id ends that request: one for a cancel or an accepted must carry none.
            request_id = self.find_brief(body).id if kind is Generate else None
            raise FrameError(make_error("bad_request", _in_our_words(error), request_id, name)) from None
        except _UNREADABLE as error:
            raise _no_map(error, name) from None

    def find_brief(self, body: Buffer) -> "Brief":
        """What must be known of a `generate` before it is decoded; reads over everything else without building it.
        Raises FrameError, bad_frame, for what is no map."""
        try:
            found = self._brief_decoder.decode(body)
            return Brief(found.id, found.sampling.n, found.tenant, found.log_id)
        except msgspec.ValidationError as error:
            if _is_no_map(error):
                raise _no_map(error, NAMES[Generate]) from None
            return Brief(self._find_id(body), 1, "", "")
        except _UNREADABLE as error:
            raise _no_map(error, NAMES[Generate]) from None

    def _find_id(self, body: Buffer) -> int | None:
        """Where something else is wrong as well."""
        try:
            return self._id_decoder.decode(body).id
        except msgspec.ValidationError:
            return None


class Brief(NamedTuple):
    """Of a `generate`: its id, None if it has none that can be taken; how many samples it wants, 1 if that cannot be
    told; on whose behalf; what logs call it."""

    id: int | None
    num_samples: int
    tenant: str
    log_id: str


class _IdOnly(Struct):
    id: RequestId | None = None


class _SamplesOnly(Struct, frozen=True):
    n: NumSamples = 1


class _BriefWithSamples(Struct):
    id: RequestId | None = None
    tenant: Tenant = ""
    log_id: LogId = ""
    sampling: _SamplesOnly = _SamplesOnly()


def server_framing() -> Framing[ServerMessage, ClientMessage]:
    return Framing(SERVER_KINDS, CLIENT_KINDS)


def client_framing() -> Framing[ClientMessage, ServerMessage]:
    return Framing(CLIENT_KINDS, SERVER_KINDS)


def make_error(
    code: Code, message: str, request_id: int | None = None, about: str = "", retry_after_ms: int | None = None
) -> Error:
    """An error that says of itself what the table of codes says of it."""
    return Error(
        code=code,
        message=message,
        retryable=CODES[code].retryable,
        retry_after_ms=retry_after_ms,
        id=request_id,
        about=about,
    )


def is_made_by_socket(routing_id: bytes) -> bool:
    """Whether a peer left its routing id to the ROUTER, whose own are a zero byte and a number of four.

    An id that a peer chose may have been another's before: what is still sent to that one goes to the new one.
    """
    return len(routing_id) == MADE_ID_LEN and routing_id[0] == 0


def unsupported_version(what: str, about: str = "") -> Error:
    """The answer to every version but ours; its layout stays that of version 1 for ever."""
    return Error(
        code="unsupported_version",
        message=f"{what}, this server speaks {MAJOR}: use a client of that version",
        about=about,
        versions=(MAJOR, MAJOR),
    )


def _is_no_map(error: msgspec.ValidationError) -> bool:
    """The value as a whole, not one within it."""
    return str(error).startswith(_NO_MAP) and " at " not in str(error)


def _no_map(error: Exception, about: str) -> FrameError:
    return FrameError(make_error("bad_frame", f"the second frame is no map: {error}", about=about))


def _in_our_words(error: msgspec.ValidationError) -> str:
    """`sampling.top_p: expected float <= 1.0` of msgspec's sentence with its path at the end."""
    what, _, path = str(error).partition(" - at ")
    what = what.replace("`", "")
    path = path.strip("`")
    if path.startswith(_IN_A_KEY):
        path, what = path.removeprefix(_IN_A_KEY), f"a key is no str: {what}"
    where = path.removeprefix("$").removeprefix(".")
    return f"{where}: {what[:1].lower()}{what[1:]}" if where else f"{what[:1].lower()}{what[1:]}"
