"""The device as a queue of work: a CUDA stream, or on the CPU one thread that runs what it is given in order.

Both honour the same contract, so that everything around them, the two steps in flight and the reuse of staging
buffers included, is the same code and is tested without a GPU:

    submit(work)  hands over work and returns; works run in order, one after the other
    mark()        a Mark that is reached when everything submitted before it is done
    fetch(a, b)   copies a device tensor to a host tensor when everything submitted before is done, and beside
                  what is submitted after; returns the Mark of the copy
    beside        runs what it is given in order too, but beside all that is submitted; from any one thread
    join_beside() what is submitted from now on waits for what `beside` was given before

On CUDA `work` runs at once in the caller and only enqueues kernels; on the CPU it runs later, in the thread. What the
thread that opened the stream does to tensors before it submits work is done when that work runs.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from graphgen.capture.device_clock import DeviceClock, Origin

HIGH_PRIORITY = -1
"""Of a CUDA stream; 0 is that of the steps."""


class Mark(Protocol):
    """A point in the stream."""

    def wait(self) -> float:
        """Blocks until the point is reached, without spinning; returns when it was, as time.monotonic()."""
        ...


class Queue(Protocol):
    """In-order execution of submitted work."""

    def submit(self, work: Callable[[], None]) -> None: ...

    def mark(self) -> Mark: ...


class DeviceStream(Queue, Protocol):
    """The one of the steps."""

    @property
    def beside(self) -> Queue: ...

    def join_beside(self) -> None: ...

    def fetch(self, source: torch.Tensor, target: torch.Tensor) -> Mark: ...

    def synchronize(self) -> None: ...

    def close(self) -> None: ...


class CudaMark:
    """A CUDA event, and what places it on the host's clock."""

    def __init__(self, event: torch.cuda.Event, clock: DeviceClock, origin: Origin, renews: bool) -> None:
        """origin, renews: see DeviceClock.reached_s."""
        self._event = event
        self._clock = clock
        self._origin = origin
        self._renews = renews

    def wait(self) -> float:
        self._event.synchronize()
        return self._clock.reached_s(self._event, self._origin, self._renews)


class CudaStream:
    """Compute stream of one CUDA device. Until it is closed both are the current ones of the thread that opened it.

    So kernels and workspaces that are made without a word of a device belong to it, and what the thread queues beside
    submitted work keeps its place among it. On a stream of its own, the filling of a table would wait behind the
    zeroing of a large KV cache while a step already reads the table.
    """

    def __init__(self, device: torch.device) -> None:
        if device.index is not None:
            torch.cuda.set_device(device)
        self.stream = torch.cuda.Stream(device)
        torch.cuda.set_stream(self.stream)
        self._copies = torch.cuda.Stream(device)
        # Before the next kernels of a step: something short, that the step's end waits for.
        self._beside = torch.cuda.Stream(device, priority=HIGH_PRIORITY)
        self._clock = DeviceClock(self._reached_now())

    def submit(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self.stream):
            work()

    def mark(self) -> CudaMark:
        if self._clock.is_stale and self.stream.query():
            self._clock.restart(self._reached_now())
        return self._mark(self.stream, renews=True)

    @property
    def beside(self) -> "_CudaQueue":
        return _CudaQueue(self._beside, self._mark)

    def join_beside(self) -> None:
        self.stream.wait_stream(self._beside)

    def fetch(self, source: torch.Tensor, target: torch.Tensor) -> CudaMark:
        self._copies.wait_stream(self.stream)
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        return self._mark(self._copies)

    def _mark(self, stream: torch.cuda.Stream, renews: bool = False) -> CudaMark:
        origin = self._clock.origin  # before the event is recorded: it was reached by then
        return CudaMark(_recorded(stream), self._clock, origin, renews)

    def _reached_now(self) -> torch.cuda.Event:
        event = _recorded(self.stream)
        event.synchronize()
        return event

    def synchronize(self) -> None:
        self.stream.synchronize()

    def close(self) -> None:
        self.stream.synchronize()
        torch.cuda.set_stream(torch.cuda.default_stream(self.stream.device))


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    # A blocking event lets the waiting thread sleep; a spinning one would hold the driver's lock.
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record(stream)
    return event


class _CudaQueue(NamedTuple):
    """A CUDA stream beside that of the steps, and how a mark of it is made."""

    stream: torch.cuda.Stream
    mark_of: Callable[[torch.cuda.Stream], CudaMark]

    def submit(self, work: Callable[[], None]) -> None:
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            work()

    def mark(self) -> CudaMark:
        return self.mark_of(self.stream)


class HostMark:
    """Reached when the thread comes by; carries the failure of the work before it, if any."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._reached_s = 0.0
        self._failure: BaseException | None = None

    def reach(self, failure: BaseException | None) -> None:
        self._failure = failure
        self._reached_s = time.monotonic()
        self._reached.set()

    def wait(self) -> float:
        self._reached.wait()
        if self._failure is not None:
            raise self._failure
        return self._reached_s


class HostStream:
    """One thread that stands in for a device."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | HostMark | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="host-stream", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def mark(self) -> HostMark:
        mark = HostMark()
        self._work.put(mark)
        return mark

    @property
    def beside(self) -> "_Caller":
        return _Caller()

    def join_beside(self) -> None:
        """What `beside` was given has run."""

    def fetch(self, source: torch.Tensor, target: torch.Tensor) -> HostMark:
        self.submit(lambda: _copy(source, target))
        return self.mark()

    def synchronize(self) -> None:
        self.mark().wait()

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        failure: BaseException | None = None
        with torch.inference_mode():
            while (item := self._work.get()) is not None:
                if isinstance(item, HostMark):
                    item.reach(failure)
                elif failure is None:  # like a device after a fault: nothing runs any more, every mark reports it
                    try:
                        item()
                    except BaseException as error:
                        failure = error


class _Caller:
    """Runs work at once, in the thread that submits it."""

    def submit(self, work: Callable[[], None]) -> None:
        with torch.inference_mode():
            work()

    def mark(self) -> HostMark:
        mark = HostMark()
        mark.reach(None)
        return mark


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)


def open_stream(device: torch.device) -> CudaStream | HostStream:
    """The stream of a device."""
    return CudaStream(device) if device.type == "cuda" else HostStream()
