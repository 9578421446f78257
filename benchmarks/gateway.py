"""What does HTTP cost? A token's latency and processor time by way of the gateway, beside the protocol's own way.

The engine hands out tokens at a set pace (`benchmarks.paced.engine`), to one client over GGP/1 or to as many HTTP
connections as there are streams. A row of its own has connections that are open and say nothing. No GPU is needed.

    python -m benchmarks.gateway
"""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.options import make_parser, run_script
from benchmarks.protocol import Setup, read_streams
from benchmarks.report import Row, machine, percentile, show, write_json
from graphgen.gateway.output_parsers.formats import PLAIN
from graphgen.gateway.settings import GatewaySettings, ModelFacts, settings_file

MODULE = "graphgen.gateway"
EVENT = b"data: {"


class Read(NamedTuple):
    """What a stream brought: how many tokens had come when, and how many events that were."""

    arrived: list[tuple[int, float]]
    num_events: int


class HttpSetup(Setup):
    """With a gateway in front of the frontend."""

    @contextlib.contextmanager
    def through_gateway(self) -> Iterator[int]:
        """The port of the gateway."""
        assert self.address, "the frontend has been started by this"
        with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
            GatewaySettings(
                descriptor=listener.fileno(),
                frontend=self.private_address,
                model_names=("none",),
                model=ModelFacts(PLAIN, {}),
                keys=None,
                metrics_names="graphgen",
                rates=str(self.folder / "rates"),
                memory_limit_bytes=1 << 30,
            ).write(settings_file(self.folder, 0))
            self._processes["gateway"] = self.start(MODULE, "0", descriptors=(listener.fileno(),))
            yield int(listener.getsockname()[1])


async def read_stream(port: int, num_tokens: int, counts: bool) -> Read:
    """A completion as it comes. counts: each event says how many tokens there were, which makes events longer."""
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}} if counts else {}
    body = {"prompt": [1, 2, 3], "max_tokens": num_tokens, "ignore_eos": True, "stream": True, **options}
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
    arrived: list[tuple[int, float]] = []
    num_events = 0
    while not (line := await reader.readline()).startswith(b"data: [DONE]"):
        if not line:
            raise SystemExit("the gateway closed a stream before its end")
        if line.startswith(EVENT):
            num_events += 1
            if counts:
                usage = json.loads(line.removeprefix(b"data: "))["usage"]
                arrived.append((usage["completion_tokens"], time.monotonic()))
    writer.close()
    return Read(arrived, num_events)


async def read_all(port: int, num_streams: int, num_tokens: int, counts: bool) -> list[Read]:
    streams = (read_stream(port, num_tokens, counts) for _ in range(num_streams))
    return await asyncio.gather(*streams)


def warm_up(port: int) -> None:
    asyncio.run(read_all(port, 1, 4, counts=False))


def latency_rows(streams: Sequence[int], num_tokens: int, step_ms: float) -> list[Row]:
    """us from the engine's socket to the reader, by either way."""
    rows: list[Row] = []
    for num_streams in streams:
        with HttpSetup(step_ms) as setup, setup.through_frontend() as core:
            reader = read_streams(core, num_streams, num_tokens)
            ours = list(zip(setup.sent_s(), reader.arrived_s, strict=True))
        ours_us = [(at - sent) * 1e6 for sents, ats in ours for sent, at in zip(sents, ats, strict=True)]
        with HttpSetup(step_ms) as setup, setup.through_gateway() as port:
            warm_up(port)
            reads = asyncio.run(read_all(port, num_streams, num_tokens, counts=True))
            sent_s = setup.sent_s()[1:]
        http_us = [
            (at - sents[num - 1]) * 1e6
            for sents, read in zip(_by_first(sent_s), sorted(reads, key=lambda read: read.arrived[0][1]), strict=True)
            for num, at in read.arrived
        ]
        p50, p99 = ([percentile(us, percent) for us in (ours_us, http_us)] for percent in (50, 99))
        rows.append(
            {
                "streams": num_streams,
                "step ms": step_ms,
                "GGP/1 p50 us": p50[0],
                "p99 us": p99[0],
                "HTTP p50 us": p50[1],
                "p99 us ": p99[1],
                "added p50 us": p50[1] - p50[0],
                "added p99 us": p99[1] - p99[0],
            }
        )
    return rows


def _by_first(sent_s: list[list[float]]) -> list[list[float]]:
    """All streams get their tokens in the same steps, so that it matters little which is which."""
    return sorted(sent_s)


def cpu_rows(streams: Sequence[int], num_tokens: int, step_ms: float, idle: int) -> list[Row]:
    """Processor time, which tells more than latency on a machine that others use too."""
    rows: list[Row] = []
    jobs = [(number, 0) for number in streams] + ([(streams[-1], idle)] if idle else [])
    for num_streams, num_idle in jobs:
        with HttpSetup(step_ms) as setup, setup.through_gateway() as port, contextlib.ExitStack() as stack:
            warm_up(port)
            for _ in range(num_idle):
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            before_s = {name: setup.cpu_s(name) for name in ("gateway", "frontend")}
            begun_s = time.monotonic()
            reads = asyncio.run(read_all(port, num_streams, num_tokens, counts=False))
            took_s = time.monotonic() - begun_s
            tokens = num_streams * num_tokens
            used_us = {name: (setup.cpu_s(name) - before) / tokens * 1e6 for name, before in before_s.items()}
            rows.append(
                {
                    "streams": num_streams,
                    "idle connections": num_idle,
                    "step ms": step_ms,
                    "tokens/s": round(tokens / took_s),
                    "tokens an event": tokens / sum(read.num_events for read in reads),
                    "gateway CPU us a token": used_us["gateway"],
                    "frontend CPU us a token": used_us["frontend"],
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--idle", type=int, default=1000, help="connections that say nothing, in the last row")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args(arguments)
    about = machine(f"{os.cpu_count()} cores")
    tables = {
        "A token's way from the engine's socket to the reader": latency_rows(
            options.streams, options.tokens, options.step_ms
        ),
        "Processor time at this pace": cpu_rows(options.streams, options.tokens, options.step_ms, options.idle),
        "As fast as the engine can": cpu_rows(options.streams[-1:], options.tokens, 0.0, 0),
    }
    for title, rows in tables.items():
        show(title, rows, about)
    write_json(options.json, [{"table": title, **row} for title, rows in tables.items() for row in rows], about)


if __name__ == "__main__":
    run_script(main)
