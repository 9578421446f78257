"""The meter against a process that computes and one that sleeps."""

import math
import mmap
import os
import subprocess
import sys
import time

from benchmarks.cpu_time import CpuMeter, cpu_seconds, num_faults


def test_a_process_that_computes_is_told_from_one_that_sleeps() -> None:
    program = "import time; print(flush=True); time.sleep(60)"
    sleeper = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert sleeper.stdout is not None
        sleeper.stdout.readline()  # its start is over
        meter = CpuMeter({"this": os.getpid(), "sleeper": sleeper.pid})
        begun_s = time.process_time()
        while time.process_time() - begun_s < 0.3:
            pass
        spent = meter.read()
        assert 0.25 < spent["this"] < 0.6
        assert spent["sleeper"] < 0.1
        assert meter.read()["this"] < 0.1
    finally:
        sleeper.kill()
        sleeper.communicate()
    assert math.isnan(cpu_seconds(sleeper.pid))


def test_memory_that_is_used_for_the_first_time_is_counted_once() -> None:
    pids, size = [os.getpid()], 16 << 20
    with mmap.mmap(-1, size) as memory:
        before = num_faults(pids)
        memory[::4096] = b"x" * (size // 4096)
        first = num_faults(pids) - before
        memory[::4096] = b"y" * (size // 4096)
        again = num_faults(pids) - before - first
    assert first >= 8, "pages of 2 MiB at most"
    assert again < first / 2
