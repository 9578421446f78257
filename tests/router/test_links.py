"""Several engines as one, with schedulers that say what a test tells them: where requests go, and that none is lost or
heard twice when an engine ends, drains or has no room."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import msgspec
import pytest

from graphgen import EngineClosedError, EngineDeadError, OverloadedError, PoisonedRequestError
from graphgen.calls.outputs import Delivery, StreamPiece
from graphgen.calls.sampling_params import SamplingParams
from graphgen.ipc.codec import pack_int32
from graphgen.ipc.engine_messages import (
    Attach,
    Blamed,
    Cancel,
    EngineToScheduler,
    Notice,
    Outputs,
    Rejected,
    ReportRequest,
    StatsRequest,
    Submit,
    TokenOutput,
)
from graphgen.ipc.reports import EngineReport
from graphgen.ipc.worker_messages import Failed, Probe
from graphgen.requests.open_request import OpenRequest
from graphgen.router.engine_link import own_links
from graphgen.router.links import Links
from graphgen.router.records import MAX_LOSSES
from tests.fakes import READY, STATS, FakeProcesses, FakeScheduler, open_request
from tests.requests.test_link import Letters

Message = TypeVar("Message")
LONG = SamplingParams(max_tokens=50)


class Rig:
    """Links to so many schedulers."""

    def __init__(self, count: int = 2) -> None:
        self.processes = [FakeProcesses() for _ in range(count)]
        self.noticed: queue.SimpleQueue[Notice] = queue.SimpleQueue()
        self.links = Links(own_links(self.processes, attaches=True), self.noticed.put)
        self.schedulers = [FakeScheduler(one) for one in self.processes]
        for scheduler in self.schedulers:
            scheduler.expect(Attach)
            scheduler.send(READY)
        self.links.wait_ready(5.0)
        self.served: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.links.when_ready(lambda number, _: self.served.put(number))
        self._ids = iter(range(1, 1000))
        self.unread: list[tuple[int, EngineToScheduler]] = []
        """What the schedulers got, and no test has looked at."""

    def expect(
        self, fits: Callable[[int, EngineToScheduler], bool], patience_s: float = 5.0
    ) -> tuple[int, EngineToScheduler]:
        """The first message of this kind, and whose it is."""
        for _ in range(int(patience_s / 0.02)):
            self.read()
            for place, (number, message) in enumerate(self.unread):
                if fits(number, message):
                    return self.unread.pop(place)
            time.sleep(0.02)
        raise AssertionError(f"it did not come, but {self.unread}")

    def read(self) -> None:
        """Takes what the schedulers have got."""
        for number, scheduler in enumerate(self.schedulers):
            while (message := scheduler.receive(0.0)) is not None:
                self.unread.append((number, message))

    def expect_at(self, number: int, kind: type[Message]) -> Message:
        _, message = self.expect(lambda at, one: at == number and isinstance(one, kind))
        assert isinstance(message, kind)
        return message

    def open(self) -> "Opened":
        opened = Opened(next(self._ids))
        self.links.submit([opened.request])
        opened.find(self)
        return opened

    def open_at(self, number: int) -> "Opened":
        """One that this engine has."""
        for _ in range(20):
            if (opened := self.open()).at == number:
                return opened
        raise AssertionError(f"nothing goes to engine {number}")

    def lose(self, number: int) -> None:
        """The engine ends; what it had goes on elsewhere."""
        assert self.links.lose(number)
        self.expect_at(number, Attach)

    def serve(self, number: int) -> None:
        self.schedulers[number].send(READY)
        assert self.served.get(timeout=5) == number

    def close(self) -> None:
        self.links.close()
        for scheduler in self.schedulers:
            scheduler.close()


class Opened:
    """A request, and what came of it."""

    def __init__(self, request_id: int) -> None:
        self.id = request_id
        self.deliveries: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.request: OpenRequest = open_request(request_id, self.deliveries.put, Letters(), LONG)
        self.at = -1
        self.submit = self.request.submit

    def find(self, rig: Rig) -> None:
        """Which engine gets it next."""
        number, message = rig.expect(lambda _, one: isinstance(one, Submit) and one.request_id == self.id)
        assert isinstance(message, Submit)
        self.at, self.submit = number, message

    def hear(self, rig: Rig, token_ids: list[int]) -> None:
        """Its engine gives it these tokens, and they come."""
        rig.schedulers[self.at].send_tokens(self.id, token_ids)
        piece = self.deliveries.get(timeout=5)
        assert isinstance(piece, StreamPiece)
        assert list(piece.token_ids) == token_ids

    def end(self, rig: Rig) -> None:
        rig.schedulers[self.at].send_tokens(self.id, [7], "length")
        piece = self.deliveries.get(timeout=5)
        assert isinstance(piece, StreamPiece)
        assert piece.finish_reason == "length"
        assert self.deliveries.empty()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def test_requests_go_where_there_is_least_to_do(rig: Rig) -> None:
    opened = [rig.open() for _ in range(6)]
    assert sorted(one.at for one in opened) == [0, 0, 0, 1, 1, 1]
    for one in opened:
        one.hear(rig, [one.id % 20])
    for one in opened:
        if one.at == 0:
            one.end(rig)
    assert [rig.open().at for _ in range(3)] == [0, 0, 0]


def test_a_request_goes_on_elsewhere_behind_all_that_its_engine_had_sent(rig: Rig) -> None:
    one = rig.open()
    first, other = one.at, 1 - one.at
    one.hear(rig, [1, 2])
    rig.schedulers[first].send_tokens(one.id, [3])
    rig.schedulers[first].send(Outputs((), (one.id,), (4,)))
    rig.schedulers[first].send(Failed("scheduler", "RuntimeError", "it fell"))
    rig.lose(first)
    one.find(rig)
    assert one.at == other
    assert one.submit.output_token_ids == pack_int32([1, 2, 3, 4])
    assert (one.submit.num_moves, one.submit.num_deaths, one.submit.max_tokens) == (1, 1, 50)
    pieces = [one.deliveries.get(timeout=5) for _ in range(2)]
    assert [piece.text for piece in pieces if isinstance(piece, StreamPiece)] == ["c", "d"]
    rig.schedulers[first].send_tokens(one.id, [9])  # it is not this engine's any more
    one.hear(rig, [5])
    rig.serve(first)
    one.end(rig)


def test_what_is_said_of_its_beginning_stays(rig: Rig) -> None:
    one = rig.open()
    rig.schedulers[one.at].send(Outputs((TokenOutput(one.id, (1,), None, 2.5, 3),)))
    piece = one.deliveries.get(timeout=5)
    assert isinstance(piece, StreamPiece)
    assert piece.cached_tokens == 3
    rig.lose(one.at)
    one.find(rig)
    assert one.submit.first_token_s is not None
    rig.schedulers[one.at].send(Outputs((TokenOutput(one.id, (2,), "length", 99.5, 1),)))
    piece = one.deliveries.get(timeout=5)
    assert isinstance(piece, StreamPiece)
    assert piece.cached_tokens == 3
    assert one.request.started_s == 2.5


def test_while_no_engine_serves_what_is_open_waits_and_new_requests_are_told_when_to_come(rig: Rig) -> None:
    one = rig.open()
    one.hear(rig, [1])
    rig.lose(1 - one.at)
    rig.lose(one.at)
    with pytest.raises(OverloadedError, match="no engine takes requests now") as refused:
        rig.links.submit([open_request(99, lambda _: None)])
    assert refused.value.retry_after_s > 0
    rig.links.tick()
    assert one.deliveries.empty()
    rig.serve(1 - one.at)
    one.find(rig)
    one.hear(rig, [2])
    one.end(rig)


@pytest.mark.parametrize("moment", ["before", "between", "while none serves"])
def test_a_cancel_holds_wherever_the_request_is(rig: Rig, moment: str) -> None:
    one, other = rig.open(), rig.open()
    if moment == "before":
        rig.links.cancel([one.id])
        assert rig.expect_at(one.at, Cancel).request_id == one.id
    else:
        if moment == "while none serves":
            rig.lose(other.at)
            other.find(rig)
        with rig.links._lock:  # its engine gives it back only after this
            assert rig.links.lose(one.at)
            if moment == "between":
                rig.links.cancel([one.id])
        if moment != "between":
            rig.expect_at(one.at, Attach)
            rig.links.cancel([one.id])
    rig.links.cancel([other.id, 777])
    for number in (0, 1):
        rig.schedulers[number].send(READY)
    rig.links.tick()
    with pytest.raises(AssertionError, match="did not come"):
        rig.expect(lambda _, message: isinstance(message, Submit), patience_s=0.3)
    assert one.deliveries.empty()
    assert rig.links._places._router.num_open == 0


def test_one_that_its_engine_has_no_room_for_is_taken_by_another_and_else_is_told(rig: Rig) -> None:
    one = rig.open()
    first = one.at
    rig.schedulers[first].send(Rejected(one.id, "OverloadedError", "full here", 2.0))
    one.find(rig)
    assert one.at == 1 - first
    assert one.submit.num_moves == 0, "the other one may turn it away too"
    rig.schedulers[one.at].send(Rejected(one.id, "OverloadedError", "full there", 3.0))
    error = one.deliveries.get(timeout=5)
    assert isinstance(error, OverloadedError)
    assert "full there" in str(error)
    assert rig.links._places._router.num_open == 0


def test_one_that_ends_engine_after_engine_fails_alone(rig: Rig) -> None:
    one, other = rig.open(), rig.open()
    assert one.at != other.at
    for num_losses in range(1, MAX_LOSSES + 1):
        at = one.at
        other_was_here = other.at == at
        rig.lose(at)
        if num_losses < MAX_LOSSES:
            one.find(rig)
            assert one.submit.num_deaths == num_losses
        if other_was_here:
            other.find(rig)
        other.hear(rig, [2])  # which clears it
        rig.serve(at)
    error = one.deliveries.get(timeout=5)
    assert isinstance(error, PoisonedRequestError)
    other.end(rig)


@pytest.mark.parametrize(("num_tokens", "num_deaths"), [(0, 3), (1, 1)])
def test_deaths_of_workers_go_along_unless_a_token_came_after_them(rig: Rig, num_tokens: int, num_deaths: int) -> None:
    one = rig.open()
    one.hear(rig, [1])
    rig.schedulers[one.at].send(Blamed((one.id, 777), (2, 1)))
    for _ in range(num_tokens):
        one.hear(rig, [2])
    rig.lose(one.at)
    one.find(rig)
    assert one.submit.num_deaths == num_deaths
    one.end(rig)


def test_a_new_token_clears_it(rig: Rig) -> None:
    one = rig.open()
    for _ in range(2 * MAX_LOSSES):
        at = one.at
        rig.lose(at)
        one.find(rig)
        assert one.submit.num_deaths == 1
        one.hear(rig, [1])
        rig.serve(at)
    one.end(rig)


def test_an_engine_that_drains_finishes_what_it_has_and_gets_nothing_new(rig: Rig) -> None:
    going, staying = rig.open_at(0), rig.open_at(1)
    drained = threading.Event()
    rig.links.drain(0, 60.0, lambda _: drained.set())
    assert [rig.open().at for _ in range(4)] == [1] * 4
    rig.links.tick()
    assert not drained.wait(0.2)
    going.hear(rig, [1])
    going.end(rig)
    rig.links.tick()
    assert drained.wait(5)
    assert not rig.links.serves(0)
    rig.schedulers[0].send(READY)  # its answer to being left: it is about to end
    with pytest.raises(queue.Empty):
        rig.served.get(timeout=0.3)
    rig.expect_at(0, Attach)
    staying.end(rig)
    with pytest.raises(EngineDeadError, match="only one that serves"):
        rig.links.drain(1, 1.0, lambda _: None)
    with pytest.raises(EngineDeadError, match="nothing to drain"):
        rig.links.drain(0, 1.0, lambda _: None)
    rig.links.expect(0)
    rig.serve(0)
    assert rig.open_at(0)


def test_an_engine_is_kept_after_all_while_it_drains_and_after_it(rig: Rig) -> None:
    """As when another router to the same engines cannot drain it."""
    one = rig.open_at(0)
    rig.links.drain(0, 60.0, lambda _: None)
    assert rig.links.is_draining(0)
    rig.links.expect(0)
    assert not rig.links.is_draining(0)
    one.end(rig)
    rig.open_at(0).end(rig)
    drained = threading.Event()
    rig.links.drain(0, 60.0, lambda _: drained.set())
    while not drained.wait(0.05):
        rig.links.tick()
    rig.expect_at(0, Attach)
    rig.links.expect(0)
    rig.expect_at(0, Attach)
    rig.serve(0)
    rig.open_at(0).end(rig)


def test_what_an_engine_has_left_when_its_time_to_drain_is_over_goes_on_elsewhere(rig: Rig) -> None:
    one = rig.open_at(0)
    one.hear(rig, [1, 2])
    drained = threading.Event()
    rig.links.drain(0, 0.0, lambda _: drained.set())
    rig.links.tick()
    assert drained.wait(5)
    rig.expect_at(0, Attach)
    one.find(rig)
    assert one.at == 1
    assert one.submit.output_token_ids == pack_int32([1, 2])
    one.end(rig)


def test_requests_do_not_wait_for_a_worker_that_is_being_replaced_while_another_engine_serves(rig: Rig) -> None:
    one, other = rig.open(), rig.open()
    assert one.at != other.at
    one.hear(rig, [1])
    paused, here = make_report(is_serving=False), one.at
    rig.links.tick()
    for number in (0, 1):
        rig.expect_at(number, ReportRequest)
        rig.schedulers[number].send(paused if number == here else make_report())
    deadline_s = time.monotonic() + 5.0
    while not any(isinstance(message, Cancel) for _, message in rig.unread):
        rig.links.tick()
        time.sleep(0.05)
        rig.read()
        assert time.monotonic() < deadline_s
    assert rig.expect_at(here, Cancel).request_id == one.id
    one.find(rig)
    assert one.at != here
    assert one.submit.output_token_ids == pack_int32([1])
    one.end(rig)
    other.end(rig)


def make_report(is_serving: bool = True) -> EngineReport:
    return EngineReport(
        epoch=0,
        is_serving=is_serving,
        num_open=1,
        num_tenants=1,
        prompt_tokens=3,
        output_tokens=9,
        num_others=0,
        others_prompt_tokens=0,
        others_output_tokens=0,
        num_steps=int(time.monotonic() * 1000),
        pages_free=8,
        prompt_token_s=0.0,
        output_token_s=0.0,
        step_s=0.0,
    )


def test_statistics_are_sums_and_each_engines_own(rig: Rig) -> None:
    answer = rig.links.ask_stats()
    for number in (0, 1):
        rig.expect_at(number, StatsRequest)
    rig.schedulers[0].send(STATS)
    rig.schedulers[1].send(msgspec.structs.replace(STATS, running=5, step_ms_p99=9.0))
    found = answer.result(5)
    assert (found.running, found.waiting, found.step_ms_p99, found.finished) == (6, 4, 9.0, 0)
    assert [one and one.running for one in found.engines] == [1, 5]
    rig.lose(0)
    answer = rig.links.ask_stats()
    rig.expect_at(1, StatsRequest)
    rig.schedulers[1].send(STATS)
    found = answer.result(5)
    assert (found.running, found.engines) == (1, (None, STATS))


def test_one_live_engine_is_enough_for_a_probe(rig: Rig) -> None:
    answer = rig.links.ask_probe()
    rig.expect_at(0, Probe)
    assert not answer.done()
    probe = rig.expect_at(1, Probe)
    rig.schedulers[1].send(probe)
    answer.result(5)
    both_die = rig.links.ask_probe()
    rig.links.lose(0)
    rig.links.lose(1)
    with pytest.raises(EngineDeadError):
        both_die.result(5)
    with pytest.raises(EngineDeadError, match="no engine serves"):
        rig.links.ask_probe().result(5)


def test_a_link_that_fails_takes_its_own_requests_along_and_gets_no_others(rig: Rig) -> None:
    """What is no message comes of no engine of this build: nobody can know what else it says."""
    one, other = rig.open(), rig.open()
    rig.schedulers[one.at].send_raw(b"\xc1")
    assert isinstance(one.deliveries.get(timeout=5), EngineDeadError)
    other.hear(rig, [1])
    failed = 0
    for request_id in range(500, 506):
        try:
            rig.links.submit([open_request(request_id, lambda _: None)])
        except EngineDeadError:
            failed += 1
    assert failed <= 1
    assert rig.links.num_serving == 1
    other.end(rig)


def test_notices_say_which_engine_speaks(rig: Rig) -> None:
    rig.schedulers[1].send(Notice("a new worker serves"))
    assert rig.noticed.get(timeout=5).text == "engine 1: a new worker serves"


def test_when_the_last_engine_is_given_up_all_ends(rig: Rig) -> None:
    one = rig.open()
    other = 1 - one.at
    rig.links.lose(other, "it fell")
    rig.links.lose(one.at, "it fell too")
    error = one.deliveries.get(timeout=5)
    assert isinstance(error, EngineDeadError)
    assert "it fell" in str(error)
    with pytest.raises(EngineDeadError, match="no engine is left"):
        rig.links.submit([open_request(99, lambda _: None)])


def test_a_close_reaches_those_that_no_engine_has(rig: Rig) -> None:
    one, other = rig.open(), rig.open()
    rig.lose(one.at)
    rig.lose(other.at)
    rig.links.close()
    for opened in (one, other):
        assert isinstance(opened.deliveries.get(timeout=5), EngineClosedError)
