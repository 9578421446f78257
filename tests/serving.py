"""A server of the demo model in processes of its own, as `graphgen serve` starts it."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests import ROOT

START_TIMEOUT_S = 60.0


def is_alive(pid: int) -> bool:
    """A zombie that its new parent has not looked at yet is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def free_address(num_ports: int) -> str:
    """Of a server that needs so many ports in a row: below those that the system gives to others."""
    for first in random.sample(range(20_000, 30_000), 100):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + num_ports):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return f"tcp://127.0.0.1:{first}"
    raise AssertionError("no ports are free")


class ServerProcess:
    """The supervisor and, under it, scheduler, worker and frontend."""

    def __init__(self, output: Path, *arguments: str, python_path: str = "") -> None:
        self._output = output
        command = [sys.executable, "-P", "-m", "graphgen", "serve", "--device", "cpu", "--bind", "tcp://127.0.0.1:*"]
        path = os.pathsep.join(part for part in (python_path, str(ROOT)) if part)
        with output.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *arguments], stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": path}
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def said(self) -> list[str]:
        """What it told its operator, whatever the form of its logs."""
        lines = self.output.splitlines()
        return [json.loads(line)["message"] if line.startswith("{") else line for line in lines]

    def wait_ready(self) -> "ServerProcess":
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while "ready" not in self.said:
            assert self.process.poll() is None, f"the server ended:\n{self.output}"
            assert time.monotonic() < deadline_s, f"the server is not ready:\n{self.output}"
            time.sleep(0.02)
        return self

    @property
    def address(self) -> str:
        """Of the data socket."""
        return self.addresses[0]

    @property
    def addresses(self) -> list[str]:
        """Of each frontend's data socket."""
        return [line.split()[2] for line in self.said if line.endswith("(data)")]

    @property
    def control(self) -> str:
        return next(line.split()[2] for line in self.said if line.endswith("(control)"))

    @property
    def url(self) -> str:
        """Of the HTTP gateway."""
        return next(line.split()[2] for line in self.said if line.endswith("(OpenAI's API)"))

    def pid_of(self, module: str) -> int:
        """The process below this one that runs `python -m module`."""
        return self.pids_of(module)[0]

    def pids_of(self, module: str) -> list[int]:
        """All of them. Raises LookupError where there is none."""
        below, found = [self.process.pid], []
        while below:
            pid = below.pop(0)
            if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                found.append(pid)
            below += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        if not found:
            raise LookupError(f"no process of the server runs {module}")
        return found

    def end(self, number: int = signal.SIGTERM, timeout_s: float = 30.0) -> int:
        """Sends the signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


@contextlib.contextmanager
def serving(folder: Path, *arguments: str, python_path: str = "") -> Iterator[ServerProcess]:
    """A server that is ready; whatever a test did to it, nothing is left of it."""
    server = ServerProcess(folder / "serve.log", *arguments, python_path=python_path)
    try:
        yield server.wait_ready()
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
