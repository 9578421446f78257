"""Several engines: what each is told, what is refused before anything starts, and when which is started again."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator

import pytest

from graphgen import ConfigError, EngineConfig
from graphgen.demo import model_folder
from graphgen.launch import processes, replicas
from graphgen.launch.engines import Engines
from graphgen.launch.processes import EngineProcesses, Exit
from graphgen.launch.replicas import alone, check_devices, count_gpus, of_replica
from graphgen.launch.resolve import resolve
from graphgen.launch.starts import MAX_STARTS, WITHIN_S
from graphgen.models.families import load_spec
from tests.fakes import FakeProcesses

KILLED = Exit("scheduler", -9, "")


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """So many GPUs are in the machine, and torch can use them."""

    def have(count: int) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(replicas, "_count_present", lambda: count)
        monkeypatch.setattr(replicas, "find_device", lambda: "cuda" if count else "cpu")
        monkeypatch.setattr(replicas, "check_device", lambda device: None)

    return have


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_engines_than_gpus_are_refused_by_name(on_gpus: Callable[[int], None], device: str) -> None:
    on_gpus(4)
    check_devices(EngineConfig(device=device, replicas=4))
    with pytest.raises(ConfigError, match=r"replicas is 5, and there are 4 GPUs here"):
        check_devices(EngineConfig(device=device, replicas=5))
    check_devices(EngineConfig(device="cpu", replicas=5))


def test_one_gpu_named_for_many_engines_is_refused(on_gpus: Callable[[int], None]) -> None:
    on_gpus(4)
    with pytest.raises(ConfigError, match=r"device is 'cuda:1', which is one GPU"):
        check_devices(EngineConfig(device="cuda:1", replicas=2))
    check_devices(EngineConfig(device="cuda:1"))


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 4), ("", 0), ("-1", 0), ("0", 1), ("2,3", 2), ("1,9,2", 1), ("GPU-a, GPU-b", 2)]
)
def test_what_is_visible_counts(
    on_gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int
) -> None:
    on_gpus(4)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == count


def test_ranks_and_engines_need_as_many_gpus_together(on_gpus: Callable[[int], None]) -> None:
    on_gpus(4)
    check_devices(EngineConfig(device="cuda", replicas=2, tensor_parallel=2))
    check_devices(EngineConfig(tensor_parallel=4))
    with pytest.raises(ConfigError, match=r"replicas is 2 and tensor_parallel is 3, and there are 4 GPUs.* 6 in all"):
        check_devices(EngineConfig(device="cuda", replicas=2, tensor_parallel=3))
    with pytest.raises(ConfigError, match=r"tensor_parallel is 8, and there are 4 GPUs.* one rank of an"):
        check_devices(EngineConfig(tensor_parallel=8))
    with pytest.raises(ConfigError, match=r"tensor_parallel is 2, and device is 'cuda:1', which is one GPU"):
        check_devices(EngineConfig(device="cuda:1", tensor_parallel=2))
    check_devices(EngineConfig(device="cpu", tensor_parallel=64))
    with pytest.raises(
        ConfigError, match=r"replicas is 33 and tensor_parallel is 2, 66 workers in all.* 64 are the most"
    ):
        check_devices(EngineConfig(device="cpu", replicas=33, tensor_parallel=2))


def test_ranks_have_gpus_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(9)))
    spec = load_spec(str(folder))
    launch = of_replica(resolve(EngineConfig(device="cuda", tensor_parallel=2), spec, folder), 1, 3)
    assert [launch.device_of(rank) for rank in range(2)] == ["cuda:2", "cuda:3"]
    one = of_replica(resolve(EngineConfig(device="cuda", tensor_parallel=2), spec, folder), 0, 1)
    assert [one.device_of(rank) for rank in range(2)] == ["cuda:0", "cuda:1"]
    on_cpu = of_replica(resolve(EngineConfig(device="cpu", tensor_parallel=2), spec, folder), 1, 2)
    assert (on_cpu.device_of(1), on_cpu.cpu_threads, on_cpu.rank_spec.attention.num_heads) == ("cpu", 2, 2)


def test_less_than_one_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="replicas is 0"):
        EngineConfig(replicas=0)


def test_each_engine_has_a_gpu_or_its_part_of_the_cores_and_a_step_log_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = model_folder()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(7)))

    def told(number: int, count: int, **settings: object) -> tuple[str, int | None, str | None]:
        config = EngineConfig(step_log="/tmp/steps", **settings)  # type: ignore[arg-type]  # a test's settings
        launch = of_replica(resolve(config, load_spec(str(folder)), folder), number, count)
        return launch.device, launch.cpu_threads, launch.step_log

    assert told(1, 2, device="cuda") == ("cuda:1", None, "/tmp/steps.1")
    assert told(2, 3, device="cpu") == ("cpu", 2, "/tmp/steps.2")
    assert told(0, 9, device="cpu") == ("cpu", 1, "/tmp/steps.0")
    assert told(1, 2, device="cpu", cpu_threads=3) == ("cpu", 3, "/tmp/steps.1")
    assert told(0, 1, device="cuda:3") == ("cuda:3", None, "/tmp/steps")


@pytest.mark.parametrize("settings", [{}, {"tensor_parallel": 2}, {"cpu_threads": 5}, {"replicas": 1}])
def test_one_alone_has_what_each_replica_has(monkeypatch: pytest.MonkeyPatch, settings: dict[str, int]) -> None:
    folder = model_folder()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(13)))
    config = EngineConfig(**{"device": "cpu", "replicas": 3, **settings})  # type: ignore[arg-type]  # a test's settings

    def threads(config: EngineConfig) -> int | None:
        return of_replica(resolve(config, load_spec(str(folder)), folder), 0, config.replicas).cpu_threads

    assert alone(config).replicas == 1
    assert threads(alone(config)) == threads(config)


class Fakes(FakeProcesses):
    """`dead` is its scheduler's end, until it is started again, which takes until `may_start`."""

    def __init__(self) -> None:
        super().__init__()
        self.dead: Exit | None = None
        self.may_start = True
        self.num_starts = 0
        self.num_ends = 0

    def find_exit(self, names: Collection[str] | None = None) -> Exit | None:
        return self.dead

    def restart_scheduler(self) -> None:
        while not self.may_start:
            time.sleep(0.005)
        self.num_starts += 1
        self.dead = None

    def end_scheduler(self) -> None:
        self.num_ends += 1
        self.dead = KILLED


@pytest.fixture
def engines() -> Iterator[Engines]:
    engines = Engines(2, Fakes)
    yield engines
    engines.stop(0.0)


def fake(engines: Engines, number: int) -> Fakes:
    found: EngineProcesses = engines[number]
    assert isinstance(found, Fakes)
    return found


def settle(engines: Engines) -> None:
    """Until what is being started has been."""
    for thread in engines._starting:
        if thread is not None:
            thread.join(5)


def test_an_engine_is_seen_to_end_once_and_started_again_while_others_are_watched(engines: Engines) -> None:
    fake(engines, 0).may_start = False
    fake(engines, 0).dead = KILLED
    (end,) = engines.look()
    assert (end.number, end.restarts) == (0, True)
    assert engines.look() == []
    fake(engines, 1).dead = KILLED
    (end,) = engines.look()
    assert end.number == 1
    fake(engines, 0).may_start = True
    settle(engines)
    assert [fake(engines, number).num_starts for number in (0, 1)] == [1, 1]
    assert engines.look() == []


@pytest.mark.parametrize("by_itself", [True, False])
def test_starts_that_lead_to_nothing_are_bounded_and_one_that_serves_clears_them(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, by_itself: bool
) -> None:
    for _ in range(2):
        for _ in range(MAX_STARTS):
            fake(engines, 0).dead = KILLED
            (end,) = engines.look()
            assert end.restarts
            settle(engines)
        engines.serves(0)
    for expected in (*[True] * MAX_STARTS, False):
        fake(engines, 0).dead = KILLED
        (end,) = engines.look()
        assert end.restarts is expected
        settle(engines)
    assert engines.look() == []
    assert engines.num_kept == 1
    if by_itself:
        now_s = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now_s + WITHIN_S + 1.0)
        assert engines.look() == [], "its end was told"
    else:
        engines.wake(0)
    settle(engines)
    assert engines.num_kept == 2
    assert fake(engines, 0).dead is None


def test_an_engine_at_rest_stays_so_until_it_is_woken(engines: Engines) -> None:
    engines.rest(1).join()
    assert fake(engines, 1).num_ends == 1
    assert engines.look() == []
    assert (engines.num_kept, engines.is_at_rest(1)) == (1, True)
    engines.wake(0)
    assert fake(engines, 0).num_starts == 0
    engines.wake(1)
    settle(engines)
    assert fake(engines, 1).num_starts == 1
    assert engines.num_kept == 2


def test_all_are_killed_before_any_is_waited_for_and_they_share_the_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes, "LEFT_WORKERS_S", 1.0)
    monkeypatch.setattr(processes, "_lives", lambda _: True)  # as what a driver holds
    engines = Engines(3, Fakes)
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(subprocess.Popen(["sleep", "60"], start_new_session=True)) for _ in range(len(engines))
        ]
        for one, worker in zip(engines, workers, strict=True):
            (one.folder / "worker-0.pid").write_text(str(worker.pid))
        begun_s = time.monotonic()
        engines.stop(0.0)
        assert 1.0 <= time.monotonic() - begun_s < 2.0
        assert [worker.wait(5) for worker in workers] == [-signal.SIGKILL] * 3
    assert caplog.text.count("killed and not gone after 1 s, held by the device's driver: ['worker-0']") == 3
