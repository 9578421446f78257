"""The meter against a process that computes and one that sleeps."""

import math
import os
import subprocess
import sys
import time

from benchmarks.cpu_time import CpuMeter, cpu_seconds


def test_a_process_that_computes_is_told_from_one_that_sleeps() -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        time.sleep(0.5)  # its start is over
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
        sleeper.wait()
    assert math.isnan(cpu_seconds(sleeper.pid))
