"""The way of pieces into events: which are written at once, and that none is lost or passed by another."""

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from graphgen.calls.outputs import Sink
from graphgen.calls.sampling_params import SamplingParams
from graphgen.calls.streams import Mailbox
from graphgen.gateway.errors import ApiError
from graphgen.gateway.http import BODY_WRITER
from graphgen.gateway.output_parsers.formats import PLAIN
from graphgen.gateway.outputs import Batch, Pieces, Turn, send_outputs
from graphgen.gateway.protocol import ChunkWriter
from graphgen.gateway.service import Service
from graphgen.gateway.settings import ModelFacts
from graphgen.remote.requests import NO_PARSING
from tests.gateway.asgi import GatewayCore, piece
from tests.gateway.over_http import serving_http

BAD = "no event can be made of this"


class Texts:
    """An EventWriter of plain texts."""

    def news(self, batch: Batch) -> bytes:
        texts = [one.text for _, one in batch]
        if BAD in texts:
            raise ValueError(BAD)
        return "+".join(texts).encode()

    async def end(self) -> bytes:
        return b"end"

    def failed(self, error: ApiError) -> bytes:
        return b"failed"


class Stream:
    """One answer: what was sent by its task, and what was written at once, in one order."""

    def __init__(self) -> None:
        self.said: list[tuple[str, bytes]] = []
        self.is_ready = False
        self.sink: Sink | None = None

    def write(self, part: bytes) -> None:
        self.said.append(("at once", part))

    async def send(self, message: Any) -> None:
        self.is_ready = message["type"] == "http.response.start" or self.is_ready
        if message.get("body"):
            self.said.append(("task", message["body"]))

    async def run(self, turn: Turn) -> None:
        def answer(sinks: Sequence[Sink], _: int) -> None:
            self.sink = sinks[0]

        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError("never set")

        core: Any = GatewayCore(answer)  # a stand-in for RemoteCore
        async with Pieces(core, turn, ["prompt"], SamplingParams(), "", "", receive, NO_PARSING) as pieces:
            await send_outputs({BODY_WRITER: self}, self.send, pieces, Texts())

    async def take(self, *texts: str, finish: str | None = None) -> None:
        """In one step of the engine, so that the loop has them together."""
        assert self.sink is not None
        for text in texts:
            self.sink(piece(text, finish))
        for _ in range(5):
            await asyncio.sleep(0)


def with_streams(num_streams: int, test: Callable[[Sequence[Stream]], Awaitable[None]]) -> None:
    async def run() -> None:
        turn = Turn(Mailbox(asyncio.get_running_loop()))
        streams = [Stream() for _ in range(num_streams)]
        tasks = [asyncio.create_task(stream.run(turn)) for stream in streams]
        await asyncio.sleep(0)
        await test(streams)
        await asyncio.wait_for(asyncio.gather(*tasks), 10)

    asyncio.run(run())


def test_the_middle_of_a_stream_is_written_without_its_task() -> None:
    async def test(streams: Sequence[Stream]) -> None:
        (stream,) = streams
        await stream.take("first")
        await stream.take("second")
        await stream.take("third", "fourth")
        await stream.take("last", finish="length")
        assert stream.said == [
            *(("task", b"first"), ("at once", b"second"), ("at once", b"third+fourth")),
            *(("task", b"last"), ("task", b"end")),
        ]

    with_streams(1, test)


def test_what_cannot_be_written_at_once_is_sent_in_its_order() -> None:
    async def test(streams: Sequence[Stream]) -> None:
        (stream,) = streams
        await stream.take("first")
        stream.is_ready = False
        await stream.take("second")
        stream.is_ready = True
        await stream.take("third")
        await stream.take("last", finish="stop")
        assert [part for _, part in stream.said] == [b"first", b"second", b"third", b"last", b"end"]
        assert [by for by, _ in stream.said[:3]] == ["task", "task", "at once"]

    with_streams(1, test)


def test_a_stream_that_fails_while_it_is_written_ends_alone() -> None:
    async def test(streams: Sequence[Stream]) -> None:
        bad, good = streams
        for stream in streams:
            await stream.take("first")
        assert bad.sink is not None
        bad.sink(piece(BAD))
        await good.take("second")  # in the same turn of the loop
        await good.take("last", finish="stop")
        assert [part for _, part in bad.said] == [b"first", b"failed"]
        assert [part for _, part in good.said] == [b"first", b"second", b"last", b"end"]

    with_streams(2, test)


def test_a_client_that_reads_late_gets_every_text_in_its_order() -> None:
    """More than the kernel takes for it, so that the gateway has to wait."""
    texts = [f"{number:05}" + "x" * 4000 for number in range(5000)]

    def answer(sinks: Sequence[Sink], _: int) -> None:
        def give() -> None:
            for text in texts:
                sinks[0](piece(text))
            sinks[0](piece("", "length"))

        threading.Thread(target=give).start()

    core: Any = GatewayCore(answer)  # a stand-in for RemoteCore
    body = json.dumps({"prompt": "Hi", "max_tokens": 9, "stream": True}).encode()
    with (
        serving_http(Service(core, ["fake"], ModelFacts(PLAIN, {}))) as port,
        socket.create_connection(("127.0.0.1", port), timeout=30) as connection,
    ):
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n")
        connection.sendall(b"content-length: %d\r\n\r\n%b" % (len(body), body))
        said = connection.makefile("rb").read()
    events = [line.removeprefix(b"data: ") for line in said.splitlines() if line.startswith(b"data: {")]
    assert "".join(json.loads(line)["choices"][0]["text"] for line in events) == "".join(texts)


@pytest.mark.parametrize(
    "change",
    [
        {"response_started": False},
        {"response_complete": True},
        {"disconnected": True},
        {"chunked_encoding": False},
        {"write_paused": True},
    ],
)
def test_an_answer_is_written_at_once_only_while_its_client_takes_it(change: dict[str, bool]) -> None:
    open_now: Any = SimpleNamespace(
        response_started=True, response_complete=False, disconnected=False, chunked_encoding=True, write_paused=False
    )
    transport: Any = None
    writer = ChunkWriter(transport, flow=open_now, cycle=open_now)
    assert writer.is_ready
    vars(open_now).update(change)
    assert not writer.is_ready
