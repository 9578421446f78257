"""The receiving thread: every request hears exactly what is its own, and whatever breaks, nobody waits for ever."""

import asyncio
import functools
import queue
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from graphgen import CheckpointError, EngineClosedError, EngineDeadError, InvalidRequestError, SamplingParams
from graphgen.calls.outputs import Delivery, RequestOutput, StreamPiece
from graphgen.calls.streams import Mailbox
from graphgen.ipc.codec import pack_int32
from graphgen.ipc.engine_messages import Attach, Cancel, Outputs, Rejected, StatsRequest, Submit, TokenOutput
from graphgen.ipc.worker_messages import Failed, Progress, Shutdown
from graphgen.launch.processes import Exit
from graphgen.requests.link import Link
from graphgen.requests.open_request import OpenRequest
from graphgen.requests.tokenizer import Tokenizer
from tests.fakes import READY, STATS, FakeProcesses, FakeScheduler, open_request

piece_of = functools.partial(StreamPiece, prompt_tokens=3)
"""Of the prompts here."""
DEATH = Exit("worker", -9, "out of memory")


class Letters(Tokenizer):
    """Token 1 is "a", 2 is "b", and so on; 99 cannot be decoded."""

    def __init__(self) -> None:
        self.byte_token_ids = frozenset()

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        if 99 in token_ids:
            raise KeyError(99)
        return "".join(chr(96 + token_id) for token_id in token_ids)


class Rig:
    """A client, its processes and the fake scheduler at the other end."""

    def __init__(self) -> None:
        self.progress: list[Progress] = []
        self.processes = FakeProcesses()
        self.link = Link(self.processes, self.progress.append)
        self.scheduler = FakeScheduler(self.processes)

    def open(
        self, request_id: int, sampling: SamplingParams | None = None, streams: bool = True
    ) -> "queue.SimpleQueue[Delivery]":
        deliveries: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.link.submit([open_request(request_id, deliveries.put, Letters(), sampling, streams)])
        assert self.scheduler.expect(Submit).request_id == request_id
        return deliveries

    def settle(self) -> None:
        """Returns when everything sent so far was handled: messages are handled in order."""
        waiter = threading.Thread(target=self.link.stats, args=(5.0,))
        waiter.start()
        while not isinstance(self.scheduler._channel.receive(5.0), StatsRequest):
            pass
        self.scheduler.send(STATS)
        waiter.join(5.0)
        assert not waiter.is_alive()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    rig.scheduler.send(READY)
    rig.link.wait_ready(5.0)
    yield rig
    rig.link.close()
    rig.scheduler.close()


def test_each_request_gets_its_own_tokens_in_order(rig: Rig) -> None:
    first, second = rig.open(1), rig.open(2)
    rig.scheduler.send_tokens(1, [1])
    rig.scheduler.send_tokens(2, [5])
    rig.scheduler.send_tokens(1, [2], "length")
    rig.scheduler.send_tokens(2, [6], "stop")
    assert [first.get(timeout=5), first.get(timeout=5)] == [
        piece_of("a", (1,), None),
        piece_of("b", (2,), "length"),
    ]
    assert [second.get(timeout=5), second.get(timeout=5)] == [
        piece_of("e", (5,), None),
        piece_of("f", (6,), "stop"),
    ]


@pytest.mark.parametrize("streams", [True, False])
def test_tokens_without_news_come_between_the_first_and_the_last(rig: Rig, streams: bool) -> None:
    one, two, gone = rig.open(1, streams=streams), rig.open(2, streams=streams), 77
    rig.scheduler.send(Outputs((TokenOutput(1, (1,), None, 2.5, 3), TokenOutput(2, (5,), None, 4.5))))
    rig.scheduler.send(Outputs((), (2, gone, 1), (6, 9, 2)))
    rig.scheduler.send(Outputs((TokenOutput(1, (3,), "length", 2.5, 3), TokenOutput(2, (4,), "stop", 4.5))))
    for deliveries, text, cached, queued_s, reason in ((one, "abc", 3, 2.5, "length"), (two, "efd", 0, 4.5, "stop")):
        if streams:
            pieces = [deliveries.get(timeout=5) for _ in text]
            assert all(isinstance(piece, StreamPiece) and piece.cached_tokens == cached for piece in pieces)
            assert [piece.text for piece in pieces if isinstance(piece, StreamPiece)] == list(text)
        else:
            output = deliveries.get(timeout=5)
            assert isinstance(output, RequestOutput)
            assert (output.text, output.finish_reason, output.cached_tokens) == (text, reason, cached)
            assert output.timing.queued_s == queued_s


def test_a_request_that_does_not_stream_gets_one_output(rig: Rig) -> None:
    deliveries = rig.open(1, streams=False)
    rig.scheduler.send_tokens(1, [1])
    rig.scheduler.send_tokens(1, [2], "length", started_s=2.5)
    output = deliveries.get(timeout=5)
    assert isinstance(output, RequestOutput)
    assert (output.text, output.token_ids, output.finish_reason) == ("ab", (1, 2), "length")
    assert output.prompt_token_ids == (1, 2, 3)
    assert output.timing.queued_s == 2.5
    assert 0 < output.timing.first_token_s <= output.timing.total_s
    assert len(output.timing.token_times_s) == 2


@pytest.mark.parametrize("streams", [True, False])
def test_a_stop_string_ends_the_request_at_the_scheduler(rig: Rig, streams: bool) -> None:
    deliveries = rig.open(1, SamplingParams(stop="bc"), streams)
    for token_id in (1, 2, 3, 4):
        rig.scheduler.send_tokens(1, [token_id])
    assert rig.scheduler.expect(Cancel).request_id == 1
    rig.settle()
    received = [deliveries.get_nowait() for _ in range(deliveries.qsize())]
    assert not any(isinstance(one, Exception) for one in received)
    if streams:
        assert received == [piece_of("a", (1,), None), piece_of("", (2,), None), piece_of("", (3,), "stop")]
    else:
        (output,) = received
        assert isinstance(output, RequestOutput)
        assert (output.text, output.token_ids, output.finish_reason) == ("a", (1, 2, 3), "stop")


def test_a_stop_string_in_the_last_token_wins_and_needs_no_cancel(rig: Rig) -> None:
    deliveries = rig.open(1, SamplingParams(stop="b"), streams=False)
    rig.scheduler.send_tokens(1, [1, 2, 3], "length")
    output = deliveries.get(timeout=5)
    assert isinstance(output, RequestOutput)
    assert (output.text, output.token_ids, output.finish_reason) == ("a", (1, 2), "stop")
    rig.link.cancel([1])
    rig.link.submit([open_request(2, lambda delivery: None)])
    assert rig.scheduler.expect(Submit).request_id == 2  # and no Cancel before it


def test_stop_strings_before_min_tokens_do_not_count(rig: Rig) -> None:
    deliveries = rig.open(1, SamplingParams(stop="b", min_tokens=3), streams=False)
    rig.scheduler.send_tokens(1, [1, 2, 1, 2])
    output = deliveries.get(timeout=5)
    assert isinstance(output, RequestOutput)
    assert (output.text, output.finish_reason) == ("aba", "stop")


def test_held_back_text_comes_with_the_last_token(rig: Rig) -> None:
    deliveries = rig.open(1, SamplingParams(stop="bcd"))
    rig.scheduler.send_tokens(1, [1])
    rig.scheduler.send_tokens(1, [2])
    rig.scheduler.send_tokens(1, [3], "length")
    assert [deliveries.get(timeout=5) for _ in range(3)] == [
        piece_of("a", (1,), None),
        piece_of("", (2,), None),
        piece_of("bc", (3,), "length"),
    ]


def test_tokens_on_their_way_to_a_cancelled_request_are_dropped(rig: Rig) -> None:
    deliveries = rig.open(1)
    rig.link.cancel([1])
    assert rig.scheduler.expect(Cancel).request_id == 1
    rig.scheduler.send_tokens(1, [1])
    rig.link.cancel([1, 77])
    rig.settle()
    assert deliveries.empty()


def test_a_rejected_request_is_told_why_and_others_go_on(rig: Rig) -> None:
    refused, other = rig.open(1), rig.open(2)
    rig.scheduler.send(Rejected(1, "InvalidRequestError", "needs 9 pages, there are 8"))
    rig.scheduler.send_tokens(2, [1], "length")
    error = refused.get(timeout=5)
    assert isinstance(error, InvalidRequestError)
    assert "9 pages" in str(error)
    assert other.get(timeout=5) == piece_of("a", (1,), "length")


def test_a_failure_of_one_requests_text_ends_that_request_alone(rig: Rig) -> None:
    bad, good = rig.open(1), rig.open(2)
    rig.scheduler.send_tokens(1, [99])
    rig.scheduler.send_tokens(2, [1], "length")
    error = bad.get(timeout=5)
    assert isinstance(error, Exception)
    assert "KeyError" in str(error)
    assert rig.scheduler.expect(Cancel).request_id == 1
    assert good.get(timeout=5) == piece_of("a", (1,), "length")


@pytest.mark.alone
def test_a_dead_process_reaches_every_waiter_within_a_second(rig: Rig) -> None:
    waiting = [rig.open(number) for number in range(3)]
    failures: list[Exception] = []

    def ask() -> None:
        try:
            rig.link.stats(30.0)
        except EngineDeadError as error:
            failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    rig.scheduler.expect(StatsRequest)
    died_s = time.monotonic()
    rig.processes.exit = DEATH
    errors = [deliveries.get(timeout=2) for deliveries in waiting]
    asking.join(2.0)
    assert time.monotonic() - died_s < 1.0
    assert [type(error) for error in (*errors, *failures)] == [EngineDeadError] * 4
    assert "SIGKILL" in str(errors[0])
    assert "out of memory" in str(errors[0])
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        rig.link.submit([open_request(9, lambda delivery: None)])
    with pytest.raises(EngineDeadError):
        rig.link.stats(1.0)


def test_what_a_process_says_at_its_end_is_what_is_raised(rig: Rig) -> None:
    """The message of a failing process may be found after its end was."""
    deliveries = rig.open(1)
    rig.processes.exit = Exit("scheduler", 1, "")
    rig.scheduler.send(Failed("worker", "CheckpointError", "tensor x is missing"))
    error = deliveries.get(timeout=2)
    assert type(error) is CheckpointError
    assert str(error) == "tensor x is missing"


def test_a_failure_of_unknown_kind_names_the_process_and_the_kind(rig: Rig) -> None:
    deliveries = rig.open(1)
    rig.scheduler.send(Failed("worker", "OutOfMemoryError", "8 GiB"))
    error = deliveries.get(timeout=2)
    assert type(error) is EngineDeadError
    assert str(error) == "worker failed with OutOfMemoryError: 8 GiB"


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"\x93\xa6output", b"\xff" * 100])
def test_a_malformed_message_fails_loudly_and_hangs_nobody(rig: Rig, frame: bytes) -> None:
    deliveries = rig.open(1)
    rig.scheduler.send_raw(frame)
    error = deliveries.get(timeout=2)
    assert type(error) is EngineDeadError
    assert "receiving thread" in str(error)


def test_closing_ends_open_requests_and_later_calls(rig: Rig) -> None:
    deliveries = rig.open(1)
    rig.link.close()
    assert type(deliveries.get(timeout=2)) is EngineClosedError
    assert isinstance(rig.scheduler.expect(Shutdown), Shutdown)
    assert not rig.processes.folder.exists()
    rig.link.close()
    with pytest.raises(EngineClosedError):
        rig.link.submit([open_request(2, lambda delivery: None)])


def test_a_start_that_takes_too_long_is_given_up() -> None:
    rig = Rig()
    try:
        with pytest.raises(EngineDeadError, match="start_timeout_s"):
            rig.link.wait_ready(0.05)
    finally:
        rig.link.close()
        rig.scheduler.close()


def test_progress_is_passed_on_before_ready() -> None:
    rig = Rig()
    try:
        rig.scheduler.send(Progress("load", 1, 2))
        rig.scheduler.send(READY)
        assert rig.link.wait_ready(5.0) == READY
        assert rig.progress == [Progress("load", 1, 2)]
    finally:
        rig.link.close()
        rig.scheduler.close()


def test_a_reader_whose_event_loop_is_gone_is_cancelled(rig: Rig) -> None:
    loop = asyncio.new_event_loop()
    mailbox, pieces = Mailbox(loop), asyncio.Queue[Delivery]()
    rig.link.submit([open_request(1, lambda delivery: mailbox.put(pieces, delivery), Letters())])
    rig.scheduler.expect(Submit)
    other = rig.open(2)
    loop.close()
    rig.scheduler.send_tokens(1, [1])
    assert rig.scheduler.expect(Cancel).request_id == 1
    rig.scheduler.send_tokens(2, [1], "length")
    assert other.get(timeout=5) == piece_of("a", (1,), "length")


def test_many_deliveries_wake_a_loop_once_and_keep_their_order() -> None:
    async def scenario() -> tuple[int, list[Delivery]]:
        loop = asyncio.get_running_loop()
        mailbox, pieces = Mailbox(loop), asyncio.Queue[Delivery]()
        wakeups = 0
        schedule = loop.call_soon_threadsafe

        def count(*call: object) -> object:
            nonlocal wakeups
            wakeups += 1
            return schedule(*call)  # type: ignore[arg-type]  # passed on as it came

        loop.call_soon_threadsafe = count  # type: ignore[assignment,method-assign]  # counting what is called
        sent = [piece_of(str(number), (number,), None) for number in range(50)]
        for piece in sent:
            mailbox.put(pieces, piece)
        received = [await pieces.get() for _ in sent]
        assert received == sent
        return wakeups, received

    wakeups, _ = asyncio.run(scenario())
    assert wakeups == 1


def test_what_a_kept_engine_sent_before_it_ended_is_delivered_before_its_requests_are_given_back() -> None:
    processes = FakeProcesses()
    scheduler = FakeScheduler(processes)
    link = Link(processes, attaches=True, is_kept=True)
    taken: queue.SimpleQueue[list[OpenRequest]] = queue.SimpleQueue()
    try:
        scheduler.send(READY)
        link.wait_ready(5)
        scheduler.expect(Attach)
        deliveries: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        link.submit([open_request(1, deliveries.put, Letters(), SamplingParams(max_tokens=9))])
        scheduler.expect(Submit)
        scheduler.send_tokens(1, [1, 2])
        scheduler.send(Failed("worker", "EngineDeadError", "no worker can be started"))
        link.lose(taken.put)
        (request,) = taken.get(timeout=5)
        assert deliveries.get_nowait() == piece_of("ab", (1, 2), None)
        scheduler.expect(Attach)
        scheduler.send_tokens(1, [3])  # not this engine's word any more
        request.move(1)
        scheduler.send(READY)
        link.submit([request])
        again = scheduler.expect(Submit)
        assert (again.num_moves, again.output_token_ids, again.num_deaths) == (1, pack_int32([1, 2]), 1)
        assert again.prompt_token_ids == pack_int32((1, 2, 3))
        scheduler.send_tokens(1, [4], "length")
        assert deliveries.get(timeout=5) == piece_of("d", (4,), "length")
        assert deliveries.empty()
    finally:
        link.close()
        scheduler.close()


def test_a_request_that_goes_elsewhere_is_ended_here_and_nothing_more_of_it_is_heard(rig: Rig) -> None:
    going, staying = rig.open(1), rig.open(2)
    taken: queue.SimpleQueue[list[OpenRequest]] = queue.SimpleQueue()
    rig.link.release([1, 7], taken.put)
    (request,) = taken.get(timeout=5)
    assert request.submit.request_id == 1
    assert rig.scheduler.expect(Cancel).request_id == 1
    rig.scheduler.send_tokens(1, [1])
    rig.scheduler.send_tokens(2, [1], "length")
    assert staying.get(timeout=5) == piece_of("a", (1,), "length")
    assert going.empty()


def test_what_was_meant_for_the_link_before_is_not_heard_by_the_one_that_takes_its_place() -> None:
    """Its answers are on the way when it dies: the new one has asked for none of them."""
    processes = FakeProcesses()
    scheduler = FakeScheduler(processes)
    scheduler.send(STATS)
    scheduler.send_tokens(1, [5], "length")
    scheduler.send(READY)
    link = Link(processes, attaches=True)
    try:
        assert link.wait_ready(5) == READY
    finally:
        link.close()
        scheduler.close()
