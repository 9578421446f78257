"""A channel carries messages both ways, whole, in order, from any thread."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from graphgen.ipc.channel import Channel
from graphgen.ipc.engine_messages import Cancel, EngineToScheduler, SchedulerToEngine
from graphgen.ipc.worker_messages import Progress

Down = Channel[SchedulerToEngine, EngineToScheduler]
Up = Channel[EngineToScheduler, SchedulerToEngine]


@pytest.fixture
def context() -> "Iterator[zmq.Context[zmq.Socket[bytes]]]":
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


def test_messages_arrive_in_order_both_ways_whichever_end_starts(
    context: "zmq.Context[zmq.Socket[bytes]]", tmp_path: Path
) -> None:
    for number, (first, second) in enumerate((("upper", "lower"), ("lower", "upper"))):
        one: Up = Channel(context, tmp_path, f"c{number}", first, SchedulerToEngine)  # type: ignore[arg-type]
        for request_id in range(100):
            one.send(Cancel(request_id))  # before the other end exists
        other: Down = Channel(context, tmp_path, f"c{number}", second, EngineToScheduler)  # type: ignore[arg-type]
        assert [other.receive(5) for _ in range(100)] == [Cancel(request_id) for request_id in range(100)]
        other.send(Progress("load", 1, 2))
        assert one.receive(5) == Progress("load", 1, 2)
        one.close()
        other.close()


def test_receive_gives_up_after_its_timeout_and_drain_never_waits(
    context: "zmq.Context[zmq.Socket[bytes]]", tmp_path: Path
) -> None:
    one: Up = Channel(context, tmp_path, "c", "upper", SchedulerToEngine)
    begun_s = time.monotonic()
    assert one.receive(0.05) is None
    assert list(one.drain()) == []
    assert 0.04 < time.monotonic() - begun_s < 2
    one.close()


def test_threads_may_send_at_once_and_no_message_is_torn(
    context: "zmq.Context[zmq.Socket[bytes]]", tmp_path: Path
) -> None:
    one: Up = Channel(context, tmp_path, "c", "upper", SchedulerToEngine)
    other: Down = Channel(context, tmp_path, "c", "lower", EngineToScheduler)

    def send(base: int) -> None:
        for offset in range(500):
            one.send(Cancel(base + offset))

    threads = [threading.Thread(target=send, args=(base,)) for base in (0, 1000, 2000, 3000)]
    for thread in threads:
        thread.start()
    received = [other.receive(5) for _ in range(2000)]
    for thread in threads:
        thread.join()
    ids = [message.request_id for message in received if isinstance(message, Cancel)]
    for base in (0, 1000, 2000, 3000):  # each thread's messages kept their order
        assert [i for i in ids if base <= i < base + 1000] == list(range(base, base + 500))
    one.close()
    other.close()


def test_the_sockets_are_files_of_the_folder_and_go_with_the_channel(
    context: "zmq.Context[zmq.Socket[bytes]]", tmp_path: Path
) -> None:
    one: Up = Channel(context, tmp_path, "c", "upper", SchedulerToEngine)
    assert [path.name for path in tmp_path.iterdir()] == ["c.up"]
    one.close()
    deadline_s = time.monotonic() + 5
    while list(tmp_path.iterdir()) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []
