"""HTTP on real connections: what clients may not do to the gateway."""

import socket
import time
from collections.abc import Iterator
from http import client
from typing import Any

import pytest

from graphgen.gateway import http, protocol
from graphgen.gateway.output_parsers.formats import PLAIN
from graphgen.gateway.service import Service
from graphgen.gateway.settings import ModelFacts
from tests.gateway.asgi import GatewayCore, says
from tests.gateway.over_http import serving_http

BODY = b'{"messages": [{"role": "user", "content": "Hi"}]}'
CHUNKED = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (
    len(BODY),
    BODY,
)
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of a server in a thread, which is impatient."""
    monkeypatch.setattr(protocol, "HEAD_S", 0.3)
    monkeypatch.setattr(http, "BODY_S", 0.3)
    service = Service(GatewayCore(says("a", "b")), ["fake"], ModelFacts(PLAIN, {}))  # type: ignore[arg-type]  # a stand-in for RemoteCore
    with serving_http(service) as port:
        yield port


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    said = b""
    while data := connection.recv(1 << 16):
        said += data
    return said


def post(body: bytes = BODY, headers: bytes = b"") -> bytes:
    return POST + b"content-length: %d\r\n" % len(body) + headers + b"\r\n" + body


def test_one_connection_carries_many_requests_and_lasts_longer_than_a_head_may(port: int) -> None:
    connection = client.HTTPConnection("127.0.0.1", port, timeout=5)
    for _ in range(3):
        connection.request("POST", "/v1/chat/completions", BODY)
        answer = connection.getresponse()
        assert (answer.status, b'"content":"ab"' in answer.read()) == (200, True)
        time.sleep(0.2)
    assert connection.sock is not None, "it was kept"
    connection.close()


@pytest.mark.parametrize("endless", [b"x: " + b"y" * 65_536, b"x: y\r\n" * 20_000])
def test_a_head_without_end_is_cut_off(port: int, endless: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(POST + endless)
        assert read_all(connection).startswith(b"HTTP/1.1 431")
    with connect(port) as connection:  # after a good request as well
        connection.sendall(post())
        said = b""
        while b"total_tokens" not in said:
            said += connection.recv(1 << 16)
        connection.sendall(POST + endless)
        assert read_all(connection).startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize("endless", [b"x: " + b"y" * 65_536, b"x: y\r\n" * 20_000], ids=["line", "lines"])
def test_trailers_without_end_are_cut_off(port: int, endless: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(CHUNKED + b"0\r\n")
        time.sleep(0.1)  # bytes of the packet that ends the body are not counted
        connection.sendall(endless)
        assert b"HTTP/1.1 431" in read_all(connection)


def test_a_trailer_is_no_header(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """A proxy that takes a header away from a request does not look for it behind the body."""
    seen: list[dict[bytes, bytes]] = []

    async def read(scope: http.Scope, *args: Any) -> Any:
        seen.append(dict(scope["headers"]))
        return await read_json(scope, *args)

    read_json = http.read_json
    monkeypatch.setattr("graphgen.gateway.service.read_json", read)
    with connect(port) as connection:
        connection.sendall(CHUNKED + b"0\r\nx-api-key: stolen\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert [b"x-api-key" in headers for headers in seen] == [False]
    assert seen[0][b"host"] == b"x"


def test_pipelined_requests_are_answered_in_turn_and_not_without_end(port: int) -> None:
    get = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n"
    with connect(port) as connection:
        connection.sendall((get + b"\r\n") * protocol.MOST_PIPELINED + get + b"connection: close\r\n\r\n")
        assert read_all(connection).count(b"HTTP/1.1 200") == protocol.MOST_PIPELINED + 1
    with connect(port) as connection:
        connection.sendall((get + b"\r\n") * 1000)
        answers = read_all(connection)
        assert b"HTTP/1.1 400" in answers
        assert answers.count(b"HTTP/1.1 200") <= protocol.MOST_PIPELINED


@pytest.mark.parametrize("begun", [b"", b"P", POST])
def test_a_head_that_does_not_come_is_not_waited_for(port: int, begun: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(begun)
        begun_s = time.monotonic()
        assert read_all(connection) == b""
        assert time.monotonic() - begun_s < 3


def test_a_body_that_does_not_come_is_told_and_not_waited_for(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(POST + b"content-length: 100\r\n\r\n{")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("nonsense", [b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", b"GET\r\n\r\n", b"\0" * 100])
def test_what_is_no_http_ends_its_connection_alone(port: int, nonsense: bytes) -> None:
    with connect(port) as good, connect(port) as bad:
        bad.sendall(nonsense)
        assert b" 200 " not in read_all(bad)
        good.sendall(post())
        assert good.recv(1 << 16).startswith(b"HTTP/1.1 200")
