"""Peers that speak just enough of ZMTP to do harm: no library would let a test send these bytes."""

import contextlib
import socket
import struct
import time

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
MORE, LAST = 1, 0


def tcp_parts(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host, int(port)


def connect_raw(address: str, source: str = "127.0.0.1", timeout_s: float = 5.0) -> socket.socket:
    """A TCP connection from one of the machine's own addresses, all of 127/8; perhaps one that the server has closed by
    now. Raises TimeoutError."""
    raw = socket.socket()
    raw.settimeout(timeout_s)
    raw.bind((source, 0))
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it was closed before anyone looked
            raw.connect(tcp_parts(address))
    except OSError:
        raw.close()
        raise
    return raw


def shake_hands(raw: socket.socket) -> None:
    """As a DEALER without a routing id."""
    ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER\x08Identity" + struct.pack(">I", 0)
    raw.sendall(GREETING + b"\x04" + bytes([len(ready)]) + ready)
    answer = b""
    while b"READY" not in answer:  # a message before it would be against the rules
        part = raw.recv(1 << 16)
        if not part:
            raise ConnectionResetError("closed by the server")
        answer += part


def frame(body: bytes, more: int = LAST) -> bytes:
    if len(body) < 256:
        return bytes([more, len(body)]) + body
    return bytes([more | 2]) + struct.pack(">Q", len(body)) + body


def is_closed(raw: socket.socket, timeout_s: float = 2.0) -> bool:
    """Whether the server closes the connection within the time."""
    deadline_s = time.monotonic() + timeout_s
    raw.settimeout(0.05)
    while time.monotonic() < deadline_s:
        try:
            if not raw.recv(1 << 16):
                return True
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


def send_without_end(address: str, frame_bytes: int, source: str = "127.0.0.1", most_bytes: int = 4 << 30) -> int:
    """Sends frames of one message, each saying that another follows, until the connection is closed: their bytes."""
    part = frame(bytes(frame_bytes), MORE) * max(1, (1 << 18) // (frame_bytes + 9))
    num_bytes = 0
    with connect_raw(address, source) as raw, contextlib.suppress(ConnectionError):
        shake_hands(raw)
        raw.settimeout(10)
        while num_bytes < most_bytes:
            raw.sendall(part)
            num_bytes += len(part)
    return num_bytes
