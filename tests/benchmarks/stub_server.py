"""A server of OpenAI's streamed completions that computes nothing: a peer of a comparison.

    python -m tests.benchmarks.stub_server PORT [--uncounted] [--refuses] [--ends]

Each event has one token, or two where --uncounted is not given and usage says so.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping

GAP_S = 0.001


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    path = (await reader.readline()).split()[1]
    head = [line async for line in _head(reader)]
    sizes = [int(line.split(b":")[1]) for line in head if line.lower().startswith(b"content-length")]
    body = json.loads(await reader.readexactly(sizes[0])) if sizes else {}
    if path == b"/v1/models":
        _write(writer, "200 OK", json.dumps({"data": [{"id": "stub"}]}).encode())
    elif "--refuses" in sys.argv or body["model"] != "stub":
        _write(writer, "400 Bad Request", b'{"error": "no such thing"}')
    else:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        await _stream(writer, body)
    await writer.drain()
    writer.close()


async def _head(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while (line := await reader.readline()).strip():
        yield line


def _write(writer: asyncio.StreamWriter, status: str, data: bytes) -> None:
    writer.write(f"HTTP/1.1 {status}\r\ncontent-length: {len(data)}\r\nconnection: close\r\n\r\n".encode() + data)


async def _stream(writer: asyncio.StreamWriter, body: Mapping[str, int]) -> None:
    counted, done = "--uncounted" not in sys.argv, 0
    while done < body["max_tokens"]:
        done = min(done + 1 + counted, body["max_tokens"])
        usage = {"usage": {"completion_tokens": done}} if counted else {}
        writer.write(b"data: " + json.dumps({"choices": [{"text": "x"}], **usage}).encode() + b"\n\n")
        await writer.drain()
        await asyncio.sleep(GAP_S)
    writer.write(b"data: [DONE]\n\n")


async def main() -> None:
    if "--ends" in sys.argv:
        raise SystemExit("this server has no device")
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
