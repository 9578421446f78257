"""Children of an engine: how they are found dead, how they end, and that nothing they started outlives them."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from graphgen import ConfigError
from graphgen.launch.processes import LOG_BYTES, EngineProcesses, Exit, _lives, process_age_s
from tests import ROOT
from tests.serving import is_alive

CHILD = "tests.launch.child"
SOON_S = 5.0


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + SOON_S
    while not holds():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def compiler_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPILER", str(tmp_path / "compiler"))
    return tmp_path / "compiler"


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, compiler_file: Path) -> Iterator[Callable[[str], EngineProcesses]]:
    started: list[EngineProcesses] = []

    def begin(words: str) -> EngineProcesses:
        monkeypatch.setenv("CHILD", words)
        started.append(EngineProcesses((CHILD,)))
        return started[-1]

    yield begin
    for processes in started:
        processes.stop(0.0)


def wait_for_compiler(file: Path) -> int:
    wait_until(file.exists)
    pid = int(file.read_text())
    assert is_alive(pid)
    return pid


@pytest.mark.parametrize("words", ["compiler", "compiler ends", "compiler stubborn"])
def test_what_a_child_started_ends_with_it(
    start: Callable[[str], EngineProcesses], compiler_file: Path, words: str
) -> None:
    """The compilers of a worker, also of one that has ended by itself: they are in its process group."""
    processes = start(words)
    compiler = wait_for_compiler(compiler_file)
    if "ends" in words:
        wait_until(lambda: processes.find_exit() is not None)
        assert is_alive(compiler), "nobody has ended it yet"
    processes.stop(0.0)
    wait_until(lambda: not is_alive(compiler))
    assert not processes.folder.exists()


@pytest.mark.parametrize("words", ["watches compiler", "watches compiler stubborn"])
def test_what_a_child_started_ends_with_the_user_program_however_that_ends(
    compiler_file: Path, tmp_path: Path, words: str
) -> None:
    program = f"""
import os, time
from graphgen.launch.processes import EngineProcesses
processes = EngineProcesses(({CHILD!r},))
print(processes.folder, processes.pids["child"], flush=True)
time.sleep(100)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CHILD": words}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment, text=True) as user:
        assert user.stdout is not None
        folder, child = user.stdout.readline().split()
        compiler = wait_for_compiler(compiler_file)
        user.kill()
    wait_until(lambda: not is_alive(int(child)) and not is_alive(compiler))
    assert not Path(folder).exists()


def test_a_child_that_ends_in_time_is_not_signalled(start: Callable[[str], EngineProcesses]) -> None:
    processes = start("ends")
    (child,) = processes._children.values()
    processes.stop(grace_s=SOON_S)
    assert child.returncode == 0


def test_a_child_that_does_not_end_in_time_is_killed(start: Callable[[str], EngineProcesses]) -> None:
    processes = start("stubborn")
    wait_until((processes.folder / "running").exists)
    (child,) = processes._children.values()
    begun_s = time.monotonic()
    processes.stop(grace_s=0.3)
    assert child.returncode == -signal.SIGKILL
    assert 0.3 <= time.monotonic() - begun_s < 3.0
    processes.stop(grace_s=0.0)  # again is nothing


def test_a_dead_child_is_found_with_its_code_and_its_last_lines(start: Callable[[str], EngineProcesses]) -> None:
    processes = start("fails")
    wait_until(lambda: processes.find_exit() is not None)
    found = processes.find_exit()
    assert found is not None
    assert (found.name, found.code) == ("child", 3)
    assert found.tail.splitlines() == [f"line {number}" for number in range(25, 40)]
    assert processes.find_exit(("worker",)) is None, "another was asked for"
    assert str(found).startswith("the child process ended with exit code 3; its last lines were:\nline 25")


def test_a_child_that_lives_is_no_exit(start: Callable[[str], EngineProcesses]) -> None:
    processes = start("waits")
    wait_until((processes.folder / "running").exists)
    assert processes.find_exit() is None
    os.kill(processes.pids["child"], signal.SIGKILL)
    wait_until(lambda: processes.find_exit() is not None)
    assert "was killed by SIGKILL" in str(processes.find_exit())


def test_of_two_dead_children_the_one_that_failed_is_told(
    start: Callable[[str], EngineProcesses], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other only followed it."""
    processes = start("ends")
    failed = start("fails")
    processes._children["other"] = failed._children["child"]
    wait_until(lambda: all(child.poll() is not None for child in processes._children.values()))
    found = processes.find_exit()
    assert found is not None
    assert (found.name, found.code) == ("other", 3)


def test_a_signal_without_a_name_is_told_by_its_number() -> None:
    assert str(Exit("worker", -64, "")) in (
        "the worker process was killed by SIGRTMAX and wrote nothing",
        "the worker process was killed by signal 64 and wrote nothing",
    )


def test_a_child_that_is_started_anew_takes_the_place_of_the_one_before(
    start: Callable[[str], EngineProcesses], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = start("fails")
    wait_until(lambda: processes.find_exit() is not None)
    first = processes.pids["child"]
    monkeypatch.setitem(processes._environment, "CHILD", "waits")
    processes.start(CHILD)
    wait_until((processes.folder / "running").exists)
    assert processes.pids["child"] != first
    assert processes.find_exit() is None
    assert processes.log_tail("child") == "", "its output begins anew"


def test_children_have_a_session_of_their_own_and_read_no_terminal(start: Callable[[str], EngineProcesses]) -> None:
    """Ctrl-C reaches the user's program alone."""
    processes = start("waits")
    pid = processes.pids["child"]
    wait_until((processes.folder / "running").exists)
    assert os.getsid(pid) == os.getpgid(pid) == pid
    assert os.readlink(f"/proc/{pid}/fd/0") == os.devnull


def test_the_folder_is_its_users_alone(start: Callable[[str], EngineProcesses]) -> None:
    assert stat.S_IMODE(start("ends").folder.stat().st_mode) == 0o700


def test_a_folder_that_no_socket_fits_into_is_refused_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(ConfigError, match="set TMPDIR to a shorter path"):
        EngineProcesses(())
    assert list(long.iterdir()) == []


def test_a_start_that_fails_leaves_neither_children_nor_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler_file: Path
) -> None:
    monkeypatch.setenv("CHILD", "compiler")
    with tempfile.TemporaryDirectory(prefix="gg") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        begin = EngineProcesses.start

        def start(processes: EngineProcesses, module: str) -> None:
            if module == "missing":
                wait_for_compiler(compiler_file)
                raise OSError("no process to be had")
            begin(processes, module)

        monkeypatch.setattr(EngineProcesses, "start", start)
        with pytest.raises(OSError, match="no process to be had"):
            EngineProcesses((CHILD, "missing"))
        assert list(Path(folder).iterdir()) == []
    wait_until(lambda: not is_alive(int(compiler_file.read_text())))


def test_workers_are_those_whose_files_are_whole_in_a_folder_that_is_there() -> None:
    processes = EngineProcesses(modules=())
    files = {"worker-0": "123", "worker-1.partial": "124", "worker-2": "", "frontend": "125", "standby-0": "126"}
    for name, text in files.items():
        (processes.folder / f"{name}.pid").write_text(text)
    assert processes.pids == {"worker-0": 123, "standby-0": 126}, "what stands by is ended with the workers"
    shutil.rmtree(processes.folder)  # as whoever ends last does
    assert processes.pids == {}
    processes.stop(grace_s=0.0)


def test_a_worker_that_its_scheduler_left_is_gone_when_the_engine_has_ended(
    start: Callable[[str], EngineProcesses],
) -> None:
    """With the memory that it holds, which takes a while to be given back."""
    processes = start("watches sleeps")
    program = "held = bytearray(b'x') * (1 << 28); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        (processes.folder / "worker-0.pid").write_text(str(worker.pid))
        processes.stop(grace_s=0.0)
        assert not _lives(worker.pid)
        assert not processes.folder.exists()


def test_a_process_knows_its_age() -> None:
    begun_s = time.monotonic()
    code = "import time; time.sleep(0.3); from graphgen.launch.processes import process_age_s; print(process_age_s())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 0.25 < float(done.stdout) < time.monotonic() - begun_s + 0.05
    assert process_age_s() > float(done.stdout)


def test_the_log_of_a_child_is_short_whatever_it_writes(start: Callable[[str], EngineProcesses]) -> None:
    processes = start("watches floods")
    log, before = (processes.folder / f"child.log{end}" for end in ("", ".1"))

    def sizes() -> int:
        return sum(file.stat().st_size for file in (log, before) if file.exists())

    largest = 0
    deadline_s = time.monotonic() + 20
    while not (processes.folder / "running").exists():
        assert time.monotonic() < deadline_s
        largest = max(largest, sizes())
        time.sleep(0.01)
    assert LOG_BYTES < largest < 16 << 20, "24 MiB were written"
    wait_until(lambda: sizes() < 2 * LOG_BYTES)
    assert processes.log_tail("child").splitlines()[-1] == "the last line"
    assert len(processes.log_tail("child", 10).splitlines()) == 10


def test_a_process_whose_first_thread_alone_has_ended_lives() -> None:
    """So does one that is killed, for as long as a thread of it gives a device's memory back."""
    program = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as child:
        stat_file = Path(f"/proc/{child.pid}/stat")
        try:
            wait_until(lambda: stat_file.read_text().rpartition(")")[2].split()[0] == "Z")
            assert _lives(child.pid)
        finally:
            child.kill()
        wait_until(lambda: not _lives(child.pid))
    assert not _lives(child.pid), "nobody has that number any more"
