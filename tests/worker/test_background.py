"""What runs beside the imports: it is counted once, and whatever fails in it is left to the place that needs it."""

import ctypes
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from graphgen import demo
from graphgen.worker import background
from graphgen.worker.background import Background, open_context, prepare_first_use, retain_primary_context
from tests import ROOT
from tests.worker.local_engine import launch_config


class FakeDriver:
    """libcuda with one device; `failing` is the function that reports an error."""

    def __init__(self, failing: str | None = None) -> None:
        self.calls: list[str] = []
        self.ordinal: int | None = None
        self._failing = failing

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self._call("cuInit")

    def cuDeviceGet(self, device: object, ordinal: int) -> int:
        self.ordinal = ordinal
        return self._call("cuDeviceGet")

    def cuDevicePrimaryCtxRetain(self, context: object, device: object) -> int:
        return self._call("cuDevicePrimaryCtxRetain")

    def _call(self, name: str) -> int:
        self.calls.append(name)
        return 100 if name == self._failing else 0


def test_seconds_are_either_waited_for_or_hidden() -> None:
    may_end = threading.Event()

    def work() -> float:
        may_end.wait()
        return 5.0

    piece = Background("context", work)
    may_end.set()
    phase = piece.wait()
    assert phase.name == "context"
    assert 0.0 <= phase.seconds < 1.0
    assert phase.hidden_s == pytest.approx(5.0 - phase.seconds)
    # Work that began when it was waited for hid nothing: the wait is longer than the work by the thread's start.
    assert Background("late", lambda: 0.0).wait().hidden_s == 0.0


def test_a_failure_is_left_to_whoever_needs_the_result() -> None:
    def work() -> float:
        raise OSError("libcuda.so.1: cannot open shared object file")

    assert Background("context", work).wait().hidden_s == 0.0


def test_the_context_is_made_on_the_device_of_the_launch_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drivers: list[FakeDriver] = []

    def load(name: str) -> FakeDriver:
        assert name == "libcuda.so.1"
        drivers.append(FakeDriver())
        return drivers[-1]

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.delenv("CUDA_MODULE_LOADING", raising=False)
    came = threading.Event()
    came.set()
    config = launch_config(demo.model_folder(), device="cpu")
    config.write(tmp_path)
    assert open_context(tmp_path, 0, came.wait) == 0.0
    assert not drivers, "an engine on the CPU leaves the GPU alone"
    for device, ordinal in (("cuda", 0), ("cuda:3", 3)):
        msgspec.structs.replace(config, device=device).write(tmp_path)
        assert open_context(tmp_path, 0, came.wait) > 0.0
        assert drivers[-1].ordinal == ordinal
        assert drivers[-1].calls == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]


def test_no_context_is_made_before_the_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a standby: the worker that serves has the device, and its pages were counted without another context."""
    driver, now_s = FakeDriver(), 0.0
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(background, "time", SimpleNamespace(monotonic=lambda: now_s))
    msgspec.structs.replace(launch_config(demo.model_folder(), device="cpu"), device="cuda:2").write(tmp_path)

    def wait() -> None:
        nonlocal now_s
        assert driver.calls == []
        now_s += 60.0

    assert open_context(tmp_path, 0, wait) == 0.0, "the wait for the turn is no part of it"
    assert driver.calls == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]


@pytest.mark.parametrize("failing", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"])
def test_nothing_is_asked_of_a_driver_that_failed(failing: str) -> None:
    driver = FakeDriver(failing)
    assert not retain_primary_context(driver, 0)
    assert driver.calls[-1] == failing
    assert retain_primary_context(FakeDriver(), 0)


def test_only_what_will_be_used_is_prepared() -> None:
    assert prepare_first_use(compiles=False, on_cuda=False, kernel_package=None) == []


def test_a_worker_that_compiles_nothing_imports_no_compiler() -> None:
    """PyTorch imports its compiler and sympy for many small things: initialising a tensor without a device for one."""
    code = (
        "import sys\n"
        "from graphgen.worker.runner import ModelRunner\n"
        "from graphgen import demo\n"
        "from tests.worker.local_engine import launch_config\n"
        "runner = ModelRunner(launch_config(demo.model_folder(), device='cpu', num_pages=64), lambda progress: None)\n"
        "runner.close()\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"torch._dynamo", "torch._inductor", "sympy", "transformers"}
