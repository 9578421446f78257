"""One captured graph per shape, all in one memory pool; on a device without graphs, the step itself.

Owns the graphs and counts what ran. A step reads and writes tensors at fixed addresses and never synchronises with the
host. Capture is largest first, so that the pool's blocks are allocated once and the smaller graphs reuse them; what is
captured later finds them as well.

Without graphs any shape can run: steps are made when they are asked for, and none runs before that.
"""

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

import torch

from graphgen.capture.stream import CudaStream, HostStream

Shape = TypeVar("Shape", bound=Hashable)
"""What tells one step from another: its sizes."""

StepCall = Callable[[], None]

KEPT_STEPS = 64
"""Steps that a device without graphs keeps: those of a few decode rows come again and again."""

FIRST_WARM_UP_RUNS = 2
"""Runs of the largest bucket before its capture: one compiles and loads kernels, one settles allocations. Each of the
others runs once, shortened, for the kernels that only its shape uses: which of a library's kernels serves a product
depends on its rows, and one that is loaded while a graph is captured can spoil it."""


class _Captured(NamedTuple):
    """A graph, and the step whose tensors it reads and writes."""

    step: StepCall
    graph: torch.cuda.CUDAGraph


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device had too little memory, for a tensor or for what the driver keeps of a graph."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


class GraphPool(Generic[Shape]):
    """The steps an engine can run."""

    def __init__(
        self,
        stream: CudaStream | HostStream,
        make_step: Callable[[Shape], StepCall],
        largest_first: Sequence[Shape],
        before_warm_up: Callable[[Shape], None] = lambda shape: None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        shortened: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Warms up and captures these shapes; without graphs it leaves them alone.

        `before_warm_up(shape)` fills a step's inputs with something valid. Within `shortened()` a step leaves out what
        it would only do again: enough to warm up any shape but the first.
        """
        self._stream = stream
        self._graphs: dict[Shape, _Captured] = {}
        self._make_step = make_step
        self._step_of = lru_cache(KEPT_STEPS)(make_step)
        self._before_warm_up = before_warm_up
        self._shortened = shortened
        self.num_replays = 0
        self.num_eager_steps = 0
        if not isinstance(stream, CudaStream):
            return
        with quiet_garbage_collector():
            for done, shape in enumerate(largest_first):
                progress(done, len(largest_first))
                self._add(stream, shape)
            self._replay_once(stream, largest_first)
        progress(len(largest_first), len(largest_first))

    def capture(self, shape: Shape) -> None:
        """Captures one more shape, while nothing is submitted; without graphs there is nothing to do.

        Raises RuntimeError where it cannot, see `is_out_of_memory`; the shape then has no graph, and all others have.
        """
        if isinstance(self._stream, CudaStream):
            with quiet_garbage_collector():
                self._add(self._stream, shape)
                self._replay_once(self._stream, [shape])

    @property
    def captures(self) -> bool:
        """Whether steps are graph replays on this device."""
        return isinstance(self._stream, CudaStream)

    def run(self, shape: Shape) -> None:
        """Enqueues one step. To be called inside work submitted to the stream."""
        captured = self._graphs.get(shape)
        if captured is not None:
            self.num_replays += 1
            captured.graph.replay()
        else:
            self.num_eager_steps += self.captures
            self._step_of(shape)()

    def _add(self, stream: CudaStream, shape: Shape) -> None:
        step = self._make_step(shape)
        with self._shortened() if self._graphs else nullcontext():
            self._warm_up(stream, shape, step)
        self._graphs[shape] = _Captured(step, self._capture(stream, step))

    def _warm_up(self, stream: CudaStream, shape: Shape, step: StepCall) -> None:
        for _ in range(1 if self._graphs else FIRST_WARM_UP_RUNS):
            stream.submit(lambda: self._before_warm_up(shape))
            stream.submit(step)
        stream.synchronize()

    def _capture(self, stream: CudaStream, step: StepCall) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # The first graph's pool serves all others; it stays alive as long as one of its graphs does.
        first = next(iter(self._graphs.values()), None)
        pool = first.graph.pool() if first is not None else None
        # What another thread asks of CUDA meanwhile is none of the capture's business and must not spoil it.
        with torch.cuda.graph(graph, pool=pool, stream=stream.stream, capture_error_mode="thread_local"):
            step()
        return graph

    def _replay_once(self, stream: CudaStream, shapes: Sequence[Shape]) -> None:
        """The first replay of a graph takes it to the device, which no request should wait for."""
        for shape in shapes:
            stream.submit(lambda shape=shape: self._before_warm_up(shape))  # type: ignore[misc]  # taken for a parameter
            stream.submit(self._graphs[shape].graph.replay)
        stream.synchronize()


@contextmanager
def quiet_garbage_collector() -> Iterator[None]:
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
