"""The engines of a comparison: how each is started as its own users start it, and how it is installed.

Owns their command lines and their processes. Never sends a request: `requests.py` does. A new engine is a row of
ENGINES. Called by `benchmarks.compare`.
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from msgspec import Struct

ROOT = Path(__file__).resolve().parents[2]
LOOK_S = 0.2
"""How often a server that starts is asked whether it is ready."""
END_S = 30.0
"""Until a server that was asked to end is killed."""


class Job(Struct, frozen=True):
    """What every engine serves."""

    model: str  # folder of a checkpoint, or of its config where weights are random
    random_weights: bool
    max_model_len: int
    dtype: str | None  # None: the checkpoint's


class Engine(NamedTuple):
    """One that speaks OpenAI's API."""

    distribution: str
    """Of the package registry: says whether it is installed, and in which version."""
    install: str
    """The command that installs it."""
    arguments: Callable[[Job, int], list[str]]
    """(job, port): of a Python interpreter, for a server at that port of this machine."""

    def version(self, python: str) -> str | None:
        """None where it is not installed for that interpreter."""
        code = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
        asked = subprocess.run(
            [python, "-c", code, self.distribution], capture_output=True, text=True, env=_environment()
        )
        return asked.stdout.strip() if asked.returncode == 0 else None


class Contender(Struct, frozen=True):
    """An engine with settings, under the name that its rows have."""

    label: str
    engine: str  # of ENGINES
    more: tuple[str, ...] = ()  # arguments of its server

    @classmethod
    def parse(cls, text: str) -> Self:
        """ENGINE, or LABEL=ENGINE ARGUMENTS: vllm, or vLLM 512=vllm --max-num-batched-tokens 512. Raises ValueError."""
        label, has_label, command = text.partition("=")
        engine, *more = shlex.split(command if has_label else text)
        if engine not in ENGINES:
            raise ValueError(
                f"engine {engine!r} is not known: use one of {', '.join(ENGINES)}, or LABEL=ENGINE ARGUMENTS"
            )
        return cls(label if has_label else engine, engine, tuple(more))


def _graphgen(job: Job, port: int) -> list[str]:
    arguments = ["-P", "-m", "graphgen", "serve", job.model, "--bind", "tcp://127.0.0.1:*"]
    return [*arguments, "--http", f"127.0.0.1:{port}", "--max-model-len", str(job.max_model_len), *_weights(job)]


def _vllm(job: Job, port: int) -> list[str]:
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", job.model]
    return [*arguments, "--port", str(port), "--max-model-len", str(job.max_model_len), *_weights(job)]


def _sglang(job: Job, port: int) -> list[str]:
    arguments = ["-m", "sglang.launch_server", "--model-path", job.model]
    return [*arguments, "--port", str(port), "--context-length", str(job.max_model_len), *_weights(job)]


def _weights(job: Job) -> list[str]:
    """What all of them call alike."""
    dummy = ["--load-format", "dummy"] if job.random_weights else []
    return dummy if job.dtype is None else [*dummy, "--dtype", job.dtype]


ENGINES: Mapping[str, Engine] = {
    "graphgen": Engine("graphgen-serve", "pip install ./ipc/clients/python '.[cuda]'", _graphgen),
    "vllm": Engine("vllm", "pip install vllm", _vllm),
    "sglang": Engine("sglang", "pip install sglang", _sglang),
}
"""Their settings are their own defaults but for what a Job says."""


class Served(NamedTuple):
    """A server that is ready."""

    url: str
    pid: int
    ready_s: float
    """Since its process was started."""


@contextlib.contextmanager
def serving(command: Callable[[int], Sequence[str]], log: Path, timeout_s: float) -> Iterator[Served]:
    """A server in a process group of its own, which ends with the block. command: of a port.

    log: takes what it prints. Raises RuntimeError with the end of it where the server ends or takes too long.
    """
    port = _free_port()
    words = command(port)
    begun_s = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, cwd=ROOT, start_new_session=True, env=_environment())
    try:
        url = f"http://127.0.0.1:{port}"
        while not _is_ready(url):
            waited_s = time.monotonic() - begun_s
            if process.poll() is not None or waited_s > timeout_s:
                how = f"ended with exit code {process.poll()}" if process.poll() is not None else "is not ready"
                raise RuntimeError(f"{shlex.join(words)} {how} after {waited_s:.0f} s:\n{_end_of(log)}")
            time.sleep(LOOK_S)
        yield Served(url, process.pid, time.monotonic() - begun_s)
    finally:
        _end(process)


def _environment() -> dict[str, str]:
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, "PYTHONPATH": path}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _is_ready(url: str) -> bool:
    """Whether it lists a model: all of these servers do so no earlier than they can serve it."""
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Of the whole group: servers start processes of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
