"""The host stream keeps the contract of a device: in order, asynchronous, and its failures surface at the marks."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from graphgen.capture.buffers import BlockLayout, Field, StagingRing
from graphgen.capture.graphs import GraphPool, is_out_of_memory, quiet_garbage_collector
from graphgen.capture.memory import pages_that_fit
from graphgen.capture.stream import CudaStream, HostStream
from graphgen.ipc.errors import ConfigError
from graphgen.ipc.worker_messages import Bucket


def test_work_runs_in_order_while_the_caller_goes_on() -> None:
    stream = HostStream()
    gate = threading.Event()
    done: list[int] = []

    def first() -> None:
        gate.wait()
        done.append(0)

    stream.submit(first)
    for number in range(1, 50):
        stream.submit(lambda number=number: done.append(number))  # type: ignore[misc]  # mypy: default argument
    mark = stream.mark()
    assert done == []
    before_s = time.monotonic()
    gate.set()
    assert mark.wait() >= before_s
    assert done == list(range(50))
    stream.close()


def test_a_failure_reaches_every_later_mark_and_nothing_runs_after_it() -> None:
    stream = HostStream()
    ran: list[str] = []

    def fail() -> None:
        raise RuntimeError("out of pages")

    before = stream.mark()
    stream.submit(fail)
    stream.submit(lambda: ran.append("after"))
    before.wait()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of pages"):
            stream.mark().wait()
    assert ran == []


def test_a_staging_block_is_not_reused_before_its_copy_has_run() -> None:
    """The race that corrupts inputs with steps in flight: without the wait, the last values reach every step."""
    stream = HostStream()
    ring = StagingRing(num_words=1, num_blocks=2, pinned=False)
    device = torch.zeros(1, dtype=torch.int32)
    seen: list[int] = []
    for value in range(20):
        block = ring.acquire()
        block[0] = value
        stream.submit(lambda: time.sleep(0.002))

        def copy(block: torch.Tensor = block) -> None:
            device.copy_(block)
            seen.append(int(device))

        stream.submit(copy)
        ring.release(stream)
    stream.synchronize()
    assert seen == list(range(20))
    stream.close()


def test_fetch_copies_what_the_steps_before_it_wrote() -> None:
    stream = HostStream()
    source, target = torch.zeros(3), torch.zeros(3)
    stream.submit(lambda: _fill(source))
    stream.fetch(source, target).wait()
    assert target.tolist() == [7.0, 7.0, 7.0]
    stream.close()


def test_a_layout_places_fields_one_after_another_on_both_sides() -> None:
    layout = BlockLayout([Field("a", 2), Field("b", 3)])
    block = torch.arange(5, dtype=torch.int32)
    assert layout.num_words == 5
    assert layout.views(block)["b"].tolist() == [2, 3, 4]
    assert layout.host_views(block.numpy())["a"].tolist() == [0, 1]
    assert layout.offset("b") == 2


def test_without_graphs_a_pool_makes_and_runs_no_step_before_it_is_asked_and_then_any() -> None:
    stream = HostStream()
    made: list[Bucket] = []
    ran: list[Bucket] = []

    def make_step(shape: Bucket) -> Callable[[], None]:
        made.append(shape)
        return lambda: ran.append(shape)

    pool = GraphPool(stream, make_step, [Bucket(12, 4), Bucket(0, 1)], before_warm_up=ran.append)
    stream.synchronize()
    assert made == ran == []
    for shape in (Bucket(7, 0), Bucket(0, 1), Bucket(7, 0)):
        stream.submit(lambda shape=shape: pool.run(shape))  # type: ignore[misc]  # mypy takes the default for a parameter
    stream.synchronize()
    assert ran == [Bucket(7, 0), Bucket(0, 1), Bucket(7, 0)]
    assert made == [Bucket(7, 0), Bucket(0, 1)], "a shape that comes again is not made again"
    assert not pool.captures
    assert (pool.num_replays, pool.num_eager_steps) == (0, 0)
    stream.close()


class NoDevice(CudaStream):
    """A CUDA stream on which work runs at once, in the host."""

    def __init__(self) -> None:
        self.stream = None  # type: ignore[assignment]  # nothing asks for it

    def submit(self, work: Callable[[], None]) -> None:
        work()

    def synchronize(self) -> None: ...


class FakeGraph:
    """Replays nothing."""

    def pool(self) -> None: ...

    def replay(self) -> None: ...


def test_every_shape_is_captured_whole_and_all_but_the_first_are_warmed_up_by_a_shortened_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The layers of a model are alike, so the first ones run every kernel; a graph needs them all."""
    ran: list[tuple[int, str]] = []
    now = ["whole"]

    @contextmanager
    def shortened() -> Iterator[None]:
        now.append("shortened")
        yield
        now.pop()

    @contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        ran.append((0, "capture"))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    steps = lambda shape: lambda: ran.append((shape, now[-1]))  # noqa: E731
    pool = GraphPool(NoDevice(), steps, [16, 8, 4], shortened=shortened)
    capture = (0, "capture")
    first = [(16, "whole"), (16, "whole"), capture, (16, "whole")]
    assert ran == [*first, (8, "shortened"), capture, (8, "whole"), (4, "shortened"), capture, (4, "whole")]
    pool.run(8)
    assert (pool.num_replays, pool.num_eager_steps) == (1, 0)
    ran.clear()
    pool.capture(12)
    assert ran == [(12, "shortened"), capture, (12, "whole")], "later, as at first"
    pool.run(12)
    assert (pool.num_replays, pool.num_eager_steps) == (2, 0)


def test_a_shape_that_cannot_be_captured_leaves_the_others_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        yield

    def make_step(shape: int) -> Callable[[], None]:
        def step() -> None:
            ran.append(shape)
            if shape == 99:
                raise torch.OutOfMemoryError("no room")

        return step

    ran: list[int] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    pool = GraphPool(NoDevice(), make_step, [16, 8])
    with pytest.raises(torch.OutOfMemoryError) as caught:
        pool.capture(99)
    assert is_out_of_memory(caught.value)
    assert gc.isenabled()
    pool.run(16)
    pool.capture(12)
    pool.run(12)
    assert (pool.num_replays, pool.num_eager_steps) == (2, 0)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_what_counts_as_too_little_memory(error: RuntimeError, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was_and_sleeps_during_capture(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    try:
        with quiet_garbage_collector():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


@pytest.mark.parametrize(("budget", "wanted", "pages"), [(1000, 50, 10), (1099, 50, 10), (1000, 4, 4)])
def test_pages_fill_the_budget_up_to_what_can_be_used(budget: int, wanted: int, pages: int) -> None:
    assert pages_that_fit(budget, bytes_per_page=100, wanted_pages=wanted, least_pages=4) == pages


@pytest.mark.parametrize("budget", [399, 0, -5])
def test_a_cache_that_cannot_hold_one_request_is_refused(budget: int) -> None:
    with pytest.raises(ConfigError, match="max_model_len"):
        pages_that_fit(budget, bytes_per_page=100, wanted_pages=50, least_pages=4)


def _fill(tensor: torch.Tensor) -> None:
    tensor.fill_(7.0)
