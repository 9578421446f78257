"""CPU time of the engine's processes, read from the operating system. Linux only, like `/proc`.

Used by `benchmarks.latency` for the cost of a step and of doing nothing, and by the benchmarks of the CPU.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, user and system, all threads; NaN where the system does not say."""
    try:
        fields = _fields_of(pid)
    except OSError:
        return float("nan")
    user, system = int(fields[11]), int(fields[12])
    return (user + system) / os.sysconf("SC_CLK_TCK")


def num_faults(pids: Iterable[int]) -> int:
    """Page faults of the processes so far that needed no disk: memory that was used for the first time."""
    return sum(int(_fields_of(pid)[7]) for pid in pids)


def _fields_of(pid: int) -> list[str]:
    """/proc/PID/stat, counted from the field behind the name."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


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
