"""One captured graph per bucket, all in one memory pool; on the CPU, the bucket's callable itself.

Owns the graphs and counts what ran. The callable of a bucket reads and writes tensors at fixed addresses and never
synchronises with the host. Capture is largest first, so that the pool's blocks are allocated once and the smaller
graphs reuse them.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from graphgen.capture.stream import CudaStream, HostStream
from graphgen.ipc.messages import Bucket

FIRST_WARM_UP_RUNS = 2
"""Runs of the largest bucket before its capture: one compiles and loads kernels, one settles allocations. Each of the
others runs once, for the kernels that only its shape uses."""


class GraphPool:
    """The steps an engine can run."""

    def __init__(
        self,
        stream: CudaStream | HostStream,
        steps: Mapping[Bucket, Callable[[], None]],
        before_warm_up: Callable[[Bucket], None] = lambda bucket: None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Warms up and captures every bucket. `before_warm_up(bucket)` fills its inputs with a valid step."""
        self._stream = stream
        self._steps = dict(steps)
        self._graphs: dict[Bucket, torch.cuda.CUDAGraph] = {}
        self.num_replays = 0
        self.num_eager_steps = 0
        largest_first = sorted(steps, key=lambda bucket: -bucket.num_rows)
        with _quiet_garbage_collector():
            for done, bucket in enumerate(largest_first):
                progress(done, len(largest_first))
                self._warm_up_and_capture(bucket, before_warm_up)
        progress(len(largest_first), len(largest_first))

    @property
    def captures(self) -> bool:
        """Whether steps are graph replays on this device."""
        return isinstance(self._stream, CudaStream)

    def run(self, bucket: Bucket) -> None:
        """Enqueues one step. To be called inside work submitted to the stream."""
        graph = self._graphs.get(bucket)
        if graph is not None:
            self.num_replays += 1
            graph.replay()
        else:
            self.num_eager_steps += self.captures
            self._steps[bucket]()

    def _warm_up_and_capture(self, bucket: Bucket, before_warm_up: Callable[[Bucket], None]) -> None:
        step = self._steps[bucket]
        for _ in range(FIRST_WARM_UP_RUNS if self.captures and not self._graphs else 1):
            self._stream.submit(lambda: before_warm_up(bucket))
            self._stream.submit(step)
        self._stream.synchronize()
        if not isinstance(self._stream, CudaStream):
            return
        graph = torch.cuda.CUDAGraph()
        # The first graph's pool serves all others; it stays alive as long as one of its graphs does.
        first = next(iter(self._graphs.values()), None)
        pool = first.pool() if first is not None else None
        # What another thread asks of CUDA meanwhile is none of the capture's business and must not spoil it.
        with torch.cuda.graph(graph, pool=pool, stream=self._stream.stream, capture_error_mode="thread_local"):
            step()
        self._graphs[bucket] = graph


@contextmanager
def _quiet_garbage_collector() -> Iterator[None]:
    """No collection during capture (it would free CUDA memory in the middle), none of its objects scanned later."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        if was_enabled:
            gc.enable()
