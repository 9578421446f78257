"""CPU time of the engine's processes, read from the operating system. Linux only, like `/proc`.

Used by `benchmarks.latency` for the cost of a step and of doing nothing.
"""

import os
from collections.abc import Mapping
from pathlib import Path


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, user and system, all threads; NaN where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    user, system = int(fields[11]), int(fields[12])  # counted from the field behind the name
    return (user + system) / os.sysconf("SC_CLK_TCK")


class CpuMeter:
    """CPU time of named processes since the meter was made or last read."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self._before = {name: cpu_seconds(pid) for name, pid in pids.items()}

    def read(self) -> dict[str, float]:
        """Seconds of each process since the last reading."""
        now = {name: cpu_seconds(pid) for name, pid in self._pids.items()}
        spent = {name: now[name] - self._before[name] for name in now}
        self._before = now
        return spent
