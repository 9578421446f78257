"""A cluster of two CPU engines under Ray on this machine: deaths under load, and its growth and decline."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from graphgen import Client, SamplingParams
from graphgen.cluster.record import ClusterStatus, Question, ask
from graphgen.cluster.roster import EngineStatus
from tests import ROOT
from tests.cluster.waiting import wait_until
from tests.serving import is_alive

IN_TIME_S = 180.0
"""For what takes seconds on a machine where nothing else runs. All of it together has TEST_S."""
TEST_S = 600
PROMPTS = [f"{name}:" for name in ("ROMEO", "JULIET", "HAMLET", "BRUTUS", "VIOLA", "ORSINO")]
SAMPLING = SamplingParams(temperature=0.0, max_tokens=48)

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or not os.environ.get("TEST_RAY"),
    reason="Ray starts a process for everything: `make cluster-test`, which CI runs when all else has ended",
)


class Cluster:
    """`graphgen cluster up` and what others ask it, from other processes."""

    def __init__(self, folder: Path, temporary: str, *arguments: str) -> None:
        """temporary: the folder for temporary files of this process as well, so that it finds the cluster."""
        self.log = folder / "up.log"
        self.temporary = temporary
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": self.temporary, "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*self._graphgen("cluster", "up", "--device", "cpu", "--bind", "tcp://127.0.0.1:*"), *arguments],
                stdout=log,
                stderr=log,
                env=self._environment,
            )

    def _graphgen(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "graphgen", *arguments]

    def call(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self._graphgen(*arguments), env=self._environment, capture_output=True, text=True, timeout=IN_TIME_S
        )

    def status(self) -> ClusterStatus:
        return ask("default", Question("status"))

    def wait_ready(self) -> "Cluster":
        def is_ready() -> bool:
            said = self.log.read_text()
            assert self.process.poll() is None, said
            return "the cluster 'default' serves" in said

        wait_until(is_ready, "the cluster serves", IN_TIME_S)
        return self

    def engines(self) -> list[EngineStatus]:
        return [one.status for one in self.status().engines]

    def wait_engines(self, num_serving: int, num_restarts: int) -> None:
        def are_there() -> bool:
            found = self.engines()
            serving = [one for one in found if one.state == "serving"]
            restarts = sum(one.restarts for one in found)
            return len(serving) == len(found) == num_serving and restarts == num_restarts

        try:
            wait_until(are_there, f"{num_serving} engines serve after {num_restarts} restarts", IN_TIME_S)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.status()}\n{self.log.read_text()}") from None

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """One engine, or two while requests wait for the two slots of each."""
    numbers = ("--engines", "1", "--min-engines", "1", "--max-engines", "2")
    speed = ("--waiting-per-engine", "1", "--scale-up-s", "1", "--scale-down-s", "8", "--kept-starts", "0")
    # Sockets' paths are short, and pytest's folders are long.
    temporary = tempfile.mkdtemp(prefix="gt-", dir="/tmp")
    monkeypatch.setattr(tempfile, "tempdir", temporary)
    cluster = Cluster(tmp_path, temporary, *numbers, *speed, "--max-num-seqs", "2")
    yield cluster
    cluster.close()


class Load:
    """Clients that ask for the same few outputs again and again, each compared with the first of its kind."""

    def __init__(self, address: str, expected: Sequence[Sequence[int]]) -> None:
        self.problems: list[str] = []
        self.num_outputs = 0
        self._client = Client(address)
        self._ends = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(prompt, list(tokens)))
            for prompt, tokens in zip(PROMPTS, expected, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, prompt: str, expected: list[int]) -> None:
        while not self._ends.is_set():
            try:
                (output,) = self._client.generate([prompt], SAMPLING)
            except Exception as error:  # a thread's error is told by the test
                self.problems.append(repr(error))
                return
            self.num_outputs += 1
            if list(output.token_ids) != expected:
                self.problems.append(f"{prompt} {list(output.token_ids)} is not {expected}")

    def end(self) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join(IN_TIME_S)
        self._client.close()


@needs_ray
@pytest.mark.alone
@pytest.mark.timeout(TEST_S)
def test_two_engines_survive_deaths_under_load_and_only_one_is_kept_without(cluster: Cluster) -> None:
    """1 -> 2 -> 1 engines; the server of one is killed, then the actor of the other: no request notices."""
    address = cluster.wait_ready().status().data
    with Client(address) as client:
        expected = [output.token_ids for output in client.generate(PROMPTS, SAMPLING)]
    pids: set[int] = set()
    load = Load(address, expected)
    try:
        cluster.wait_engines(2, num_restarts=0)
        pids |= {pid for one in cluster.engines() for pid in one.pids}
        os.kill(cluster.engines()[0].pids[1], signal.SIGKILL)
        cluster.wait_engines(2, num_restarts=1)
        pids |= {pid for one in cluster.engines() for pid in one.pids}
        os.kill(cluster.engines()[1].pids[0], signal.SIGKILL)
        cluster.wait_engines(2, num_restarts=2)
        pids |= {pid for one in cluster.engines() for pid in one.pids}
    finally:
        load.end()
    assert not load.problems
    assert load.num_outputs >= len(PROMPTS)
    wait_until(lambda: len(cluster.engines()) == 1, "one engine is left", IN_TIME_S)
    assert cluster.engines()[0].state == "serving"
    found = cluster.call("cluster", "status", "--json")
    assert [one["status"]["state"] for one in json.loads(found.stdout)["engines"]] == ["serving"], found.stderr
    with Client(address) as client:
        assert [output.token_ids for output in client.generate(PROMPTS, SAMPLING)] == expected
    done = cluster.call("cluster", "down")
    assert (done.returncode, done.stdout) == (0, "the cluster 'default' is down\n"), done.stderr
    assert cluster.process.wait(IN_TIME_S) == 0, cluster.log.read_text()
    assert not [pid for pid in pids if is_alive(pid)], "no process is left"
    wait_until(lambda: not list(Path(cluster.temporary).glob("*/*")), "no file is left", IN_TIME_S)
