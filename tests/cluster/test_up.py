"""What `graphgen cluster up` checks before anything starts, and what engines and frontend are told."""

import ast
import contextlib
import socket
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from graphgen.cluster import up
from graphgen.cluster.options import ClusterOptions
from graphgen.cluster.places import MachineResources
from graphgen.cluster.ray_launcher import check_answers, import_ray
from graphgen.cluster.record import Question, Record, ask, is_up
from graphgen.ipc.errors import ConfigError
from graphgen.launch.config import EngineConfig
from graphgen.launch.replicas import of_frontend
from graphgen.server.options import ServeOptions
from tests import ROOT
from tests.cluster.fakes import NoSignals
from tests.cluster.waiting import wait_until

WITHOUT_GPU = [MachineResources("a", 8, 0)]
ONE_WITH_GPUS = [MachineResources("a", 8, 0), MachineResources("b", 64, 8)]


def run(config: EngineConfig | None = None, **cluster: object) -> int:
    return up.run_cluster(config or EngineConfig(device="cpu"), ServeOptions(), ClusterOptions(**cluster), print)  # type: ignore[arg-type]  # values that a test chooses


def test_engines_get_the_device_that_the_machines_have() -> None:
    assert up.for_machines(EngineConfig(), WITHOUT_GPU).device == "cpu"
    assert up.for_machines(EngineConfig(), ONE_WITH_GPUS).device == "cuda"
    assert up.for_machines(EngineConfig(device="cpu"), ONE_WITH_GPUS).device == "cpu"


def test_engines_on_the_cpu_use_the_threads_that_ray_keeps_for_them() -> None:
    assert up.for_machines(EngineConfig(), WITHOUT_GPU).cpu_threads == 1
    assert up.for_machines(EngineConfig(cpu_threads=4), WITHOUT_GPU).cpu_threads == 4
    assert up.for_machines(EngineConfig(), ONE_WITH_GPUS).cpu_threads is None


def test_the_frontend_is_told_nothing_that_is_the_engines() -> None:
    told = up.for_frontend(EngineConfig(device="cuda", tensor_parallel=4, token_budget=512, max_model_len=77))
    assert (told.device, told.max_model_len) == ("cpu", 77)
    of_frontend(told)  # raises for any other field


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (EngineConfig(device="cuda:1"), "device is 'cuda:1', and Ray chooses the GPUs"),
        (EngineConfig(device="cpu", replicas=2), "replicas is 2, an engine of a cluster is one: use --engines"),
    ],
)
def test_what_ray_decides_is_not_asked_for(config: EngineConfig, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "import_ray", lambda starts_here: None)
    with pytest.raises(ConfigError, match=said):
        run(config)


def test_without_ray_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"graphgen cluster needs Ray .*: run pip install .*'\.\[ray\]'"):
        import_ray()


@pytest.mark.parametrize("address", ["here", "ray://here:10001", "here:", "http://here:8265"])
def test_what_is_no_address_of_ray_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is no address of Ray: give HOST:PORT"):
        check_answers(address)


def test_an_address_at_which_nothing_listens_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(up, "import_ray", lambda starts_here: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ConfigError, match=f"nothing answers at 127.0.0.1:{port} .*: start Ray there with `ray start"):
        run(address=f"127.0.0.1:{port}", name="nothing-there")


def test_a_name_that_is_up_is_refused_before_ray_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "import_ray", lambda starts_here: None)
    with (
        contextlib.closing(Record.claim("taken-by-a-test")),
        pytest.raises(ConfigError, match="a cluster 'taken-by-a-test' is up already"),
    ):
        run(name="taken-by-a-test")


class NoRoom:
    """A Ray that is slow to start, and whose machines have no room yet."""

    goes_on = threading.Event()
    ray, is_local, address = None, False, "ray:1"

    def __init__(self, address: str | None, temporary: Path) -> None:
        assert self.goes_on.wait(60.0), "the test lets it go on"

    def check_name(self, name: str) -> None:
        """No other has it."""

    def machines(self) -> list[MachineResources]:
        return []

    def free(self) -> tuple[float, float]:
        return 0.0, 0.0

    def close(self) -> None:
        """Nothing is there."""


def test_whoever_asks_is_answered_while_ray_starts_and_while_machines_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(up, "import_ray", lambda starts_here: None)
    monkeypatch.setattr(up, "RayConnection", NoRoom)
    monkeypatch.setattr(up, "EndSignals", NoSignals)  # a handler is set on the main thread alone
    name = f"t{uuid.uuid4().hex[:12]}"

    def is_told_doing(what: str) -> bool:
        found = ask(name, Question("status"))
        return (found.phase, found.doing, found.num_wanted) == ("starting", what, 3)

    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(run, name=name, wait_s=40.0, engines=3)
        try:
            wait_until(lambda: is_up(name), "its name is taken", 20.0)
            wait_until(lambda: is_told_doing("starting Ray here"), "it starts Ray", 20.0)
        finally:
            NoRoom.goes_on.set()
        wait_until(lambda: is_told_doing("waiting for machines with room"), "Ray has started", 20.0)
        ask(name, Question("down"))
        assert ended.result(20.0) == 0
    assert not is_up(name)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "a/b"}, "the name 'a/b' is none of a cluster"),
        ({"name": "x" * 21}, "20 letters"),
        ({"engines": 0}, "engines is 0, the least is 1"),
        ({"engines": 3, "max_engines": 2}, "engines is 3, min_engines 3 and max_engines 2: give 1 <= min_engines"),
        ({"engines": 2, "min_engines": 0}, "engines is 2, min_engines 0 and max_engines 2"),
        ({"scale_up_s": float("nan")}, "scale_up_s is nan: give a number from 0 on"),
        ({"scale_down_s": float("inf")}, "scale_down_s is inf"),
        ({"waiting_per_engine": 0}, "waiting_per_engine is 0, the least is 1"),
        ({"engines": 1, "min_engines": 2, "max_engines": 4}, "engines is 1, min_engines 2 and max_engines 4"),
        ({"wait_s": -1.0}, "wait_s is -1"),
        ({"engines": 2, "kept_starts": float("nan")}, "kept_starts is nan"),
    ],
)
def test_numbers_that_can_never_be_met_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ClusterOptions(**values).limits  # type: ignore[arg-type]  # noqa: B018


def test_without_limits_the_number_stays_what_was_asked_for() -> None:
    limits = ClusterOptions(engines=3).limits
    assert (limits.least, limits.most) == (3, 3)


def test_ray_is_imported_by_one_module_and_only_when_it_is_used() -> None:
    importing = set()
    for path in (ROOT / "graphgen").rglob("*.py"):
        tree = ast.parse(path.read_text())
        at_import = {id(one) for one in tree.body}
        for node in ast.walk(tree):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.partition(".")[0] == "ray" for name in names):
                importing.add(path.name)
                assert id(node) not in at_import, f"{path}: not before it is needed"
    assert importing == {"ray_launcher.py"}
