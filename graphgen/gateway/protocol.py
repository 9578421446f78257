"""HTTP on a connection, within limits: what is no body has an end, in bytes and in time.

uvicorn's own protocol on httptools waits for ever for a head, and takes one of any length, and trailers behind a body
too. How long a body may be and may take is `graphgen.gateway.http`'s.
"""

import asyncio

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from graphgen.gateway.http import BODY_WRITER

MAX_HEAD_BYTES = 64 << 10
"""Of a head, of the trailers of a body, and of anything else that brings neither a request nor a part of its body."""
HEAD_S = 15.0
"""From the connection, or the first byte of a later request, to the end of the request's head."""
MOST_PIPELINED = 32
"""Requests that wait on one connection for the answer to an earlier one. A packet can hold ten thousand, and all other
clients wait while it is read."""
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class ChunkWriter:
    """Writes chunks of one answer. A BodyWriter, see `graphgen.gateway.http`."""

    def __init__(self, transport: asyncio.Transport, flow: FlowControl, cycle: RequestResponseCycle) -> None:
        self._transport = transport
        self._flow = flow
        self._cycle = cycle

    @property
    def is_ready(self) -> bool:
        cycle = self._cycle
        is_open = cycle.response_started and not cycle.response_complete and not cycle.disconnected
        return bool(is_open and cycle.chunked_encoding and not self._flow.write_paused)

    def write(self, part: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(part), part))


class LimitedProtocol(HttpToolsProtocol):
    """Closes connections whose head is too long or too slow, or that send ever more requests without
    waiting for an answer. Trailers are left out: nothing here reads them, and they
    are no headers."""

    _other_bytes = 0
    """That came since the last head ended or the last of a body came."""
    _has_come = False
    """Whether the newest data had any of that."""
    _is_in_head = True
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as its base
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        self._has_come = False
        super().data_received(data)
        self._other_bytes = 0 if self._has_come else self._other_bytes + len(data)
        if self._other_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        if not self._is_in_head:
            self._await_head()
        if len(self.pipeline) >= MOST_PIPELINED:
            raise ValueError(f"more than {MOST_PIPELINED} pipelined requests")  # uvicorn answers 400 and closes
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head, self._has_come = False, True
        self._stop_timer()
        super().on_headers_complete()
        self.scope[BODY_WRITER] = ChunkWriter(self.transport, self.flow, self.cycle)  # type: ignore[literal-required]  # a key of this project

    def on_body(self, body: bytes) -> None:
        self._has_come = True
        super().on_body(body)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._is_in_head = True
        self._stop_timer()
        self._timer = self.loop.call_later(HEAD_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
