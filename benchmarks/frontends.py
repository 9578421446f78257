"""Do two frontends serve twice the tokens of one? Processor time of a token, and tokens a second, by frontends.

The engines are processes that hand out tokens (`benchmarks.paced.engine`), at a set pace or as fast as they can, so
that the frontends have most to do. Each frontend has a reader in a process of its own, which asks for batches and does
little with them. Each frontend has as many streams in every row; what it takes to open them is counted. No GPU is
needed.

Tokens a second say something only where every process has a core to itself: two for each frontend (it and its reader),
one for each engine. Elsewhere the processor time does: as long as a token costs no more of it, as many frontends as
there are cores serve so many times the tokens. *capacity* is that: frontends / processor seconds of a token.

    python -m benchmarks.frontends
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq
from msgspec import Struct

from benchmarks.cpu_time import cpu_seconds
from benchmarks.options import make_parser, run_script
from benchmarks.report import Row, machine, percentile, show, write_json
from graphgen.ipc.channel import Channel
from graphgen.ipc.ggp.framing import client_framing
from graphgen.ipc.ggp.messages import Delta, Deltas, Done, Error, Generate, Hello, Ping, Pong, Sampling
from graphgen.ipc.server_messages import FrontendToSupervisor, Listening, SupervisorToFrontend
from graphgen.launch.config import EngineConfig
from graphgen.requests.core import launch_config, load_config_tokenizer
from graphgen.requests.tokenizer import write_tokenizer
from graphgen.server.frontend.settings import FrontendSettings, frontend_name, settings_file

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 300.0


class Read(Struct, frozen=True):
    """What a reader has read, and when."""

    num_tokens: int
    num_messages: int
    begun_s: float
    ended_s: float


class Setup:
    """Engines and frontends, which serve when this is made."""

    def __init__(self, num_frontends: int, num_engines: int, step_ms: float, num_streams: int) -> None:
        """num_streams: of each frontend."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._folders = [Path(tempfile.mkdtemp(prefix="graphgen-")) for _ in range(num_engines)]
        self._processes: list[subprocess.Popen[bytes]] = []
        config = EngineConfig(device="cpu")
        launch = launch_config(config)
        for folder in self._folders:
            launch.write(folder)
            write_tokenizer(load_config_tokenizer(config, launch), folder)
        self.engines = [
            self._start("benchmarks.paced.engine", folder, str(step_ms), str(num_frontends)) for folder in self._folders
        ]
        self.frontends: list[int] = []
        self.addresses: list[str] = []
        for number in range(num_frontends):
            self._start_frontend(number, num_frontends, num_streams)

    def _start_frontend(self, number: int, count: int, num_streams: int) -> None:
        folder, wildcard = self._folders[0], "tcp://127.0.0.1:*"
        channel: Channel[SupervisorToFrontend, FrontendToSupervisor] = Channel(
            self._context, folder, frontend_name(number), "upper", FrontendToSupervisor
        )
        FrontendSettings(
            model="none",
            data=wildcard,
            control=wildcard,
            keys=None,
            num_frontends=count,
            engines=tuple(map(str, self._folders)) if len(self._folders) > 1 else (),
            memory_limit_bytes=1 << 30,
            open_requests=num_streams,
            max_unstarted=num_streams,
        ).write(settings_file(folder, number))
        self.frontends.append(self._start("graphgen.server.frontend", folder, str(number)))
        while not isinstance(message := channel.receive(TIMEOUT_S), Listening):
            pass
        channel.close()
        self.addresses.append(message.data)

    def _start(self, module: str, folder: Path, *options: str) -> int:
        command = [sys.executable, "-m", module, str(folder), str(os.getpid()), *options]
        self._processes.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL))
        return self._processes[-1].pid

    def read(self, num_streams: int, num_tokens: int) -> list[Read]:
        """All streams of each frontend, from their first token to their last."""
        command = [sys.executable, "-m", "benchmarks.frontends"]
        readers = [
            subprocess.Popen(
                [*command, "--reader", address, "--streams", str(num_streams), "--tokens", str(num_tokens)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for address in self.addresses
        ]
        for reader in readers:
            assert reader.stdout is not None, "it is a pipe"
            reader.stdout.readline()
        for reader in readers:
            assert reader.stdin is not None, "it is a pipe"
            reader.stdin.write("go\n")
            reader.stdin.flush()
        return [Read(**json.loads(reader.communicate(timeout=TIMEOUT_S)[0])) for reader in readers]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._context.destroy(linger=0)
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)


def be_reader(address: str, num_streams: int, num_tokens: int) -> None:
    """Says that it has a session, waits for a line, and prints what it has read."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.LINGER, 0)
    socket.set_hwm(0)
    socket.connect(address)
    framing = client_framing()
    socket.send_multipart(framing.encode(Hello(batches=True)))
    socket.recv_multipart()
    print("ready", flush=True)
    sys.stdin.readline()
    sampling = Sampling(max_tokens=num_tokens, ignore_eos=True)
    begun_s = time.monotonic()
    for number in range(num_streams):
        socket.send_multipart(framing.encode(Generate(id=number, prompt_ids=[1, 2, 3], sampling=sampling)))
    num_read = num_messages = num_done = 0
    while num_done < num_streams:
        match framing.decode(socket.recv_multipart()):
            case Deltas(items=items):
                num_messages += 1
                num_read += sum(len(item.ids) for item in items)
            case Delta(ids=ids):
                num_messages += 1
                num_read += len(ids)
            case Done():
                num_done += 1
            case Ping():
                socket.send_multipart(framing.encode(Pong()))
            case Error(message=message):
                raise SystemExit(f"a stream failed: {message}")
    ended_s = time.monotonic()
    print(json.dumps(dict(num_tokens=num_read, num_messages=num_messages, begun_s=begun_s, ended_s=ended_s)))
    socket.close()
    context.term()


def run(num_frontends: int, num_engines: int, num_streams: int, num_tokens: int, step_ms: float) -> dict[str, float]:
    """One run: the figures of a row."""
    with Setup(num_frontends, num_engines, step_ms, num_streams) as setup:
        watched = [*setup.frontends, *setup.engines]
        before = {pid: cpu_seconds(pid) for pid in watched}
        read = setup.read(num_streams, num_tokens)
        used = {pid: cpu_seconds(pid) - before[pid] for pid in watched}
    tokens = sum(one.num_tokens for one in read)
    assert tokens == num_streams * num_frontends * num_tokens, "every token of every stream"
    took_s = max(one.ended_s for one in read) - min(one.begun_s for one in read)
    token_us = sum(used[pid] for pid in setup.frontends) / tokens * 1e6
    return {
        "tokens a batch": tokens / sum(one.num_messages for one in read),
        "frontend CPU us a token": token_us,
        "of the busiest": max(used[pid] for pid in setup.frontends) * num_frontends / tokens * 1e6,
        "capacity, tokens/s": num_frontends / token_us * 1e6,
        "tokens/s": tokens / took_s,
        "engine CPU us a token": sum(used[pid] for pid in setup.engines) / tokens * 1e6,
    }


def rows_of(
    counts: Sequence[int], num_engines: int, num_streams: int, num_tokens: int, steps_ms: Sequence[float], rounds: int
) -> list[Row]:
    """Medians of so many rounds; a round has a run of each count, so that all have the same neighbours."""
    rows: list[Row] = []
    for step_ms in steps_ms:
        runs: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
        for _ in range(rounds):
            for count in counts:
                runs[count].append(run(count, num_engines, num_streams, num_tokens, step_ms))
        first = runs[counts[0]]
        for count in counts:
            row: dict[str, object] = {"step ms": step_ms, "frontends": count, "streams of each": num_streams}
            row |= {name: percentile([one[name] for one in runs[count]], 50) for name in runs[count][0]}
            for name in ("capacity, tokens/s", "tokens/s"):
                ratios = [one[name] / other[name] for one, other in zip(runs[count], first, strict=True)]
                row[f"{name} x"] = percentile(ratios, 50)
            rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--frontends", type=int, nargs="+", default=[1, 2], help="the first is what others are held to")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--streams", type=int, default=128, help="of each frontend")
    parser.add_argument("--tokens", type=int, default=256, help="of each stream")
    parser.add_argument("--step-ms", type=float, nargs="+", default=[0.0, 20.0], help="0: as fast as the engines can")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.reader is not None:
        be_reader(options.reader, options.streams, options.tokens)
        return
    about = machine(f"{os.cpu_count()} cores")
    rows = rows_of(options.frontends, options.engines, options.streams, options.tokens, options.step_ms, options.rounds)
    show("Frontends that share the engines", rows, about)
    write_json(options.json, rows, about)


if __name__ == "__main__":
    run_script(main)
