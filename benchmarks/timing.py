"""How long does work take on a device, and what is the most the device can do? Used by the kernel benchmarks.

On CUDA the work is captured and its replays are timed by events, so that neither Python nor launches count; on the
CPU it is called and timed by the clock. Scripts that run at once compile beside one another and time in turn.
"""

import fcntl
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.report import percentile

WARM_UP_RUNS = 2


def median_s(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of one run of `work`, which must not synchronise with the host."""
    if device.type == "cuda":
        work()  # compiles what it needs
        torch.cuda.synchronize(device)
        with _alone():
            return percentile(_replays_s(work, device, repeats), 50)
    times = []
    for _ in range(WARM_UP_RUNS + repeats):
        begun_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun_s)
    return percentile(times[WARM_UP_RUNS:], 50)


@contextmanager
def _alone() -> Iterator[None]:
    """One process at a time."""
    with (Path(tempfile.gettempdir()) / "graphgen-benchmark.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replays_s(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    stream = torch.cuda.Stream(device)
    times = []
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_RUNS):
            work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
        for _ in range(WARM_UP_RUNS + repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000.0)
    return times[WARM_UP_RUNS:]


def read_bytes_per_s(device: torch.device, num_bytes: int) -> float:
    """Bandwidth of a reduction that reads `num_bytes` once. Use more bytes than the caches hold."""
    data = torch.ones(num_bytes // 4, dtype=torch.int32, device=device)
    return data.nbytes / median_s(lambda: data.amax(), device, repeats=10)


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Rate of a product of two square matrices of random numbers: zeros would draw less power and run faster."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / median_s(lambda: left @ right, device, repeats=10)
