"""Requests to a server that speaks OpenAI's API: token ids in, and the time of each token that comes out.

Owns the HTTP of one streamed completion. Which requests are sent when, `benchmarks.sending` says. Called by
`benchmarks.compare`.
"""

import asyncio
import json
import time
from urllib.parse import urlsplit

from benchmarks.sending import Reader
from benchmarks.workload import PlannedRequest
from graphgen import InvalidRequestError

_LINE_BYTES = 1 << 20
_EVENT = b"data: "
_DONE = b"data: [DONE]"


def http_reader(url: str, model: str) -> Reader:
    """Reads streams of completions, each over a connection of its own. model: as the server calls it.

    A token's time is that of the event which brought it. An event that brings several, as servers send where tokens
    came faster than they are read, gives all of them its time: `usage` says how many there are by then.
    """
    address = urlsplit(url)
    assert address.hostname is not None, "a server has an address"
    host, port = address.hostname, address.port or 80

    async def read(request: PlannedRequest) -> tuple[float, ...]:
        sent_s = time.monotonic()
        reader, writer = await asyncio.open_connection(host, port, limit=_LINE_BYTES)
        try:
            writer.write(_request(model, request, host))
            return await _token_times(reader, sent_s)
        finally:
            writer.close()

    return read


def _request(model: str, request: PlannedRequest, host: str) -> bytes:
    body = {
        "model": model,
        "prompt": request.prompt_token_ids,
        "max_tokens": request.output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + data


async def _token_times(reader: asyncio.StreamReader, sent_s: float) -> tuple[float, ...]:
    status = await reader.readline()
    if b" 200 " not in status:
        # What is wrong stands behind the head.
        said = (await reader.read(4096)).rpartition(b"\r\n\r\n")[2].decode(errors="replace").strip()
        raise InvalidRequestError(f"the server answered {status.decode(errors='replace').strip()}: {said}")
    times: list[float] = []
    while line := await reader.readline():
        if line.startswith(_DONE):
            return tuple(times)
        if line.startswith(_EVENT):
            found = _num_tokens(json.loads(line.removeprefix(_EVENT)), len(times))
            times += [time.monotonic() - sent_s] * (found - len(times))
    raise InvalidRequestError("the server closed a stream before its end")


def _num_tokens(event: dict[str, object], known: int) -> int:
    """How many tokens there are by this event; a server that counts none as it goes is taken to send one an event."""
    usage = event.get("usage")
    if isinstance(usage, dict) and isinstance(counted := usage.get("completion_tokens"), int):
        return counted
    if "error" in event:
        raise InvalidRequestError(f"the server says: {event['error']}")
    return known + (1 if event.get("choices") else 0)
