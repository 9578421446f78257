"""What do the frontend and its protocol cost? A token's latency, messages a second, processor time, and neighbours.

The engine is a process that hands out tokens at a set pace (`benchmarks.paced.engine`), so that what is measured is a
token's way from the scheduler's socket to the reader's callback: to an Engine's own process, and through the frontend.
A disturbed run has one more client, which floods the server with bad messages and requests beyond its share, or opens
streams and is stopped. No GPU is needed.

    python -m benchmarks.protocol
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import zmq

from benchmarks.options import make_parser, run_script
from benchmarks.paced.engine import SENT_FILE
from benchmarks.report import Row, machine, percentile, show, write_json
from graphgen.calls.outputs import Delivery, StreamPiece
from graphgen.calls.sampling_params import SamplingParams
from graphgen.calls.streams import RequestCore
from graphgen.ipc.channel import Channel
from graphgen.ipc.ggp.framing import client_framing
from graphgen.ipc.ggp.messages import Generate, Hello, Sampling
from graphgen.ipc.senders import engine_channel
from graphgen.ipc.server_messages import FrontendToSupervisor, Listening, SupervisorToFrontend
from graphgen.ipc.worker_messages import Shutdown
from graphgen.launch.config import EngineConfig
from graphgen.remote.core import RemoteCore
from graphgen.requests.core import AttachedCore, launch_config, load_config_tokenizer
from graphgen.requests.tokenizer import read_tokenizer, write_tokenizer
from graphgen.router.engine_link import own_links
from graphgen.router.links import Links
from graphgen.server.frontend.process import EngineElsewhere
from graphgen.server.frontend.settings import FrontendSettings, frontend_name, settings_file

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 600.0
DISTURBANCES = ("none", "flood", "stopped reader")


class Reader:
    """When each token of each stream arrived."""

    def __init__(self, num_streams: int) -> None:
        self.arrived_s: list[list[float]] = [[] for _ in range(num_streams)]
        self.num_pieces = 0
        self.done = threading.Event()
        self.failure: Delivery | None = None
        self._num_open = num_streams

    def take(self, stream: int, delivery: Delivery) -> None:
        """The sink of a stream."""
        if not isinstance(delivery, StreamPiece):
            self.failure = delivery
            self.done.set()
            return
        now_s = time.monotonic()
        self.num_pieces += 1
        self.arrived_s[stream].extend([now_s] * len(delivery.token_ids))
        if delivery.finish_reason is not None:
            self._num_open -= 1
            if not self._num_open:
                self.done.set()


def read_streams(core: RequestCore, num_streams: int, num_tokens: int) -> Reader:
    """All streams from their first token to their last."""
    reader = Reader(num_streams)
    sinks = [functools.partial(reader.take, stream) for stream in range(num_streams)]
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    core.open([[1, 2, 3]] * num_streams, sampling, True, sinks)
    if not reader.done.wait(TIMEOUT_S):
        raise SystemExit(f"the streams did not end within {TIMEOUT_S:g} s")
    if reader.failure is not None:
        raise SystemExit(f"a stream failed: {reader.failure}")
    return reader


class Setup:
    """A folder with the engine's process in it and, when it serves, the frontend's."""

    def __init__(self, step_ms: float) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="graphgen-"))
        config = EngineConfig(device="cpu")
        self.launch = launch_config(config)
        self.launch.write(self.folder)
        write_tokenizer(load_config_tokenizer(config, self.launch), self.folder)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.private_address = f"ipc://{self.folder}/private"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._processes["engine"] = self.start("benchmarks.paced.engine", str(step_ms), "1")

    @contextlib.contextmanager
    def in_process(self) -> Iterator[AttachedCore]:
        """What an Engine is to its own process."""
        link = Links(own_links([EngineElsewhere(self.folder)], attaches=True))
        yield AttachedCore(self.launch, link.wait_ready(TIMEOUT_S), read_tokenizer(self.folder), link)
        link.close()

    @contextlib.contextmanager
    def through_frontend(self) -> Iterator[RemoteCore]:
        """A client of the frontend, over TCP."""
        core = RemoteCore(self.address, {})
        yield core
        core.close()

    @functools.cached_property
    def address(self) -> str:
        """Of the frontend's data socket; starts the frontend."""
        channel: Channel[SupervisorToFrontend, FrontendToSupervisor] = Channel(
            self._context, self.folder, frontend_name(0), "upper", FrontendToSupervisor
        )
        wildcard = "tcp://127.0.0.1:*"
        FrontendSettings(
            model="none",
            data=wildcard,
            control=wildcard,
            keys=None,
            private=self.private_address,
            memory_limit_bytes=1 << 30,
            max_unstarted=256,
        ).write(settings_file(self.folder, 0))
        self._processes["frontend"] = self.start("graphgen.server.frontend", "0")
        while not isinstance(message := channel.receive(TIMEOUT_S), Listening):
            pass
        channel.close()
        return message.data

    def cpu_s(self, name: str) -> float:
        """Processor time of a process so far."""
        stat = Path(f"/proc/{self._processes[name].pid}/stat").read_text()
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def sent_s(self) -> list[list[float]]:
        """Ends the engine: when it sent each token, by request."""
        with contextlib.closing(self._context.socket(zmq.PUSH)) as socket:
            socket.connect(f"ipc://{self.folder}/{engine_channel()}.down")
            socket.send(msgspec.msgpack.encode(Shutdown()))
            self._processes["engine"].wait(TIMEOUT_S)
        sent: list[list[float]] = json.loads((self.folder / SENT_FILE).read_text())
        return sent

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
        self._context.destroy(linger=0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, module: str, *options: str, descriptors: Sequence[int] = ()) -> subprocess.Popen[bytes]:
        """descriptors: of open files that the process inherits."""
        command = [sys.executable, "-m", module, str(self.folder), str(os.getpid()), *options]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, pass_fds=descriptors)


def latency_rows(streams: Sequence[int], num_tokens: int, step_ms: float) -> list[Row]:
    """us from the scheduler's socket to the reader's callback, by either way."""
    rows: list[Row] = []
    for num_streams in streams:
        ways_us: dict[str, list[float]] = {}
        for way in ("in process", "frontend"):
            with Setup(step_ms) as setup:
                opened = setup.in_process() if way == "in process" else setup.through_frontend()
                with opened as core:
                    reader = read_streams(core, num_streams, num_tokens)
                ways_us[way] = _ways_us(setup.sent_s(), reader.arrived_s)
        p50, p99 = ({way: percentile(us, percent) for way, us in ways_us.items()} for percent in (50, 99))
        rows.append(
            {
                "streams": num_streams,
                "step ms": step_ms,
                "in process p50 us": p50["in process"],
                "p99 us": p99["in process"],
                "frontend p50 us": p50["frontend"],
                "p99 us ": p99["frontend"],
                "added p50 us": p50["frontend"] - p50["in process"],
                "added p99 us": p99["frontend"] - p99["in process"],
            }
        )
    return rows


def throughput_rows(streams: Sequence[int], num_tokens: int) -> list[Row]:
    """Tokens as fast as the engine hands them out."""
    rows: list[Row] = []
    for num_streams in streams:
        with Setup(step_ms=0.0) as setup, setup.through_frontend() as core:
            before_s = setup.cpu_s("frontend")
            begun_s = time.monotonic()
            reader = read_streams(core, num_streams, num_tokens)
            took_s = time.monotonic() - begun_s
            tokens = num_streams * num_tokens
            rows.append(
                {
                    "streams": num_streams,
                    "tokens/s": round(tokens / took_s),
                    "messages/s": round(reader.num_pieces / took_s),
                    "tokens a message": tokens / reader.num_pieces,
                    "frontend CPU s per 10 000 tokens": (setup.cpu_s("frontend") - before_s) * 10_000 / tokens,
                }
            )
    return rows


def paced_cpu_rows(streams: Sequence[int], num_tokens: int, step_ms: float) -> list[Row]:
    """Processor time when every token is a message of its own, as at a GPU's pace."""
    rows: list[Row] = []
    for num_streams in streams:
        with Setup(step_ms) as setup, setup.through_frontend() as core:
            before_s = setup.cpu_s("frontend")
            reader = read_streams(core, num_streams, num_tokens)
            tokens = num_streams * num_tokens
            used_s = setup.cpu_s("frontend") - before_s
            rows.append(
                {
                    "streams": num_streams,
                    "step ms": step_ms,
                    "tokens a message": tokens / reader.num_pieces,
                    "frontend CPU s per 10 000 tokens": used_s * 10_000 / tokens,
                }
            )
    return rows


def neighbour_rows(num_streams: int, num_tokens: int, step_ms: float) -> list[Row]:
    """ITL of one client's streams, beside a client that does no good."""
    rows: list[Row] = []
    for disturbance in DISTURBANCES:
        with Setup(step_ms) as setup, setup.through_frontend() as core:
            with disturbed(setup, disturbance):
                reader = read_streams(core, num_streams, num_tokens)
            gaps_ms = [
                (later - earlier) * 1000
                for arrived_s in reader.arrived_s
                for earlier, later in itertools.pairwise(arrived_s)
            ]
            percentiles = {f"ITL p{percent} ms": percentile(gaps_ms, percent) for percent in (50, 95, 99)}
            rows.append({"neighbour": disturbance, "streams": num_streams, "step ms": step_ms, **percentiles})
    return rows


@contextlib.contextmanager
def disturbed(setup: Setup, disturbance: str) -> Iterator[None]:
    if disturbance == "none":
        yield
        return
    command = [sys.executable, "-m", "benchmarks.protocol", "--neighbour", disturbance, "--address", setup.address]
    neighbour = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert neighbour.stdout is not None, "it is a pipe"
    neighbour.stdout.readline()
    if disturbance == "stopped reader":
        neighbour.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


def be_neighbour(disturbance: str, address: str) -> None:
    """Until killed. A neighbour is on another machine as a rule: on this one it takes what processor time is left."""
    os.nice(19)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(address)
    framing = client_framing()
    socket.send_multipart(framing.encode(Hello()))
    socket.recv_multipart()
    for number in range(16):
        sampling = Sampling(max_tokens=1000, ignore_eos=True)
        socket.send_multipart(framing.encode(Generate(id=number, prompt_ids=[1], sampling=sampling)))
    socket.recv_multipart()
    print("begun", flush=True)
    bad = [(b"GG\x01G", b"\x81"), framing.encode(Generate(id=0, prompt_ids=[1])), (b"x",)]
    while disturbance == "flood":
        for frames in bad:
            socket.send_multipart(frames)
        while socket.poll(0):
            socket.recv_multipart()
    while True:
        socket.recv_multipart()


def _ways_us(sent_s: list[list[float]], arrived_s: list[list[float]]) -> list[float]:
    return [
        (arrived - sent) * 1e6
        for sent_of_one, arrived_of_one in zip(sent_s, arrived_s, strict=True)
        for sent, arrived in zip(sent_of_one, arrived_of_one, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--neighbour", choices=DISTURBANCES, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.neighbour is not None:
        be_neighbour(options.neighbour, options.address)
    about = machine(f"{os.cpu_count()} cores")
    paced = (options.streams, options.tokens, options.step_ms)
    tables = {
        "A token's way from the scheduler's socket to the reader": latency_rows(*paced),
        "As fast as the engine can": throughput_rows(options.streams, options.tokens),
        "Processor time at this pace": paced_cpu_rows(*paced),
        "Beside a bad neighbour": neighbour_rows(16, options.tokens, options.step_ms),
    }
    for title, rows in tables.items():
        show(title, rows, about)
    write_json(options.json, [{"table": title, **row} for title, rows in tables.items() for row in rows], about)


if __name__ == "__main__":
    run_script(main)
