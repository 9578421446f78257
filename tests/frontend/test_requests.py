"""What a client reads of a request is what its samples gave, whenever and however often it reads."""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphgen.calls.outputs import StreamPiece
from graphgen.ipc.ggp.framing import make_error
from graphgen.ipc.ggp.messages import Accepted, Delta, Done, Error
from graphgen.server.frontend.prepare import Prepared
from graphgen.server.frontend.requests import PublicRequest
from graphgen.server.frontend.sessions import Session


def make_request(num_samples: int, stream: bool = True) -> PublicRequest:
    submits = [
        SimpleNamespace(request_id=number, ttft_target_ms=None, itl_target_ms=None, tpot_target_ms=None)
        for number in range(num_samples)
    ]
    opened = [SimpleNamespace(started_s=0.5, submit=submit) for submit in submits]
    request = PublicRequest(Session(b"id", "name", "", 0.0), 9, "client", num_samples, arrived_s=0.0)
    request.accept(Prepared(cast(Any, opened), 4, None, None, 0, None, stream, ""))
    return request


def read(request: PublicRequest, most: int = 1000) -> list[Accepted | Delta | Done | Error]:
    """The next messages, as the outbox takes them."""
    messages: list[Accepted | Delta | Done | Error] = []
    while len(messages) < most and (message := request.peek()) is not None:
        request.sent(message)
        messages.append(message)
    return messages


def read_batch(request: PublicRequest) -> list[Accepted | Delta | Done | Error]:
    """All that it has, its deltas as one message."""
    accepted = [message] if isinstance(message := request.peek(), Accepted) else []
    for message in accepted:
        request.sent(message)
    deltas = list(request.deltas())
    for delta in deltas:
        request.sent(delta)
    return [*accepted, *deltas, *read(request)]


@dataclasses.dataclass
class Reading:
    """A client that checks what it is told."""

    ids: dict[int, list[int]]
    texts: dict[int, str]
    finish: dict[int, str]

    def take(self, messages: list[Any]) -> None:
        for message in messages:
            if isinstance(message, Delta):
                assert message.sample not in self.finish, "nothing follows a sample's last delta"
                assert message.seq == len(self.ids[message.sample])
                self.ids[message.sample] += message.ids
                self.texts[message.sample] += message.text
                if message.finish is not None:
                    self.finish[message.sample] = message.finish


steps = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 3), st.text("xyz", max_size=2), st.integers(0, 3)), max_size=40
)


@given(steps, st.booleans(), st.booleans(), st.sampled_from(["finish", "cancel", "error"]))
def test_readings_of_any_size_add_up(
    steps: list[tuple[int, int, str, int]], stream: bool, batches: bool, end: str
) -> None:
    request = make_request(3, stream)
    given_ids: dict[int, list[int]] = {0: [], 1: [], 2: []}
    given_texts = {0: "", 1: "", 2: ""}
    reading = Reading({0: [], 1: [], 2: []}, {0: "", 1: "", 2: ""}, {})
    messages = []
    for number, (sample, num_tokens, text, most) in enumerate(steps):
        ids = tuple(range(number, number + num_tokens))
        request.take(StreamPiece(text, ids, None, sample_index=sample), float(number))
        given_ids[sample] += ids
        given_texts[sample] += text
        messages += read_batch(request) if batches else read(request, most)
    if end == "finish":
        for sample in range(3):
            request.take(StreamPiece("", (), "length", sample_index=sample), 99.0)
    elif end == "cancel":
        request.cancel()
    else:
        request.fail(make_error("internal", "no", 9))
    messages += read(request)
    reading.take(messages)
    assert (reading.ids, reading.texts) == (given_ids, given_texts)
    assert read(request) == []
    assert [type(message) for message in messages].count(Accepted) == 1
    assert isinstance(messages[0], Accepted)
    last = messages[-1]
    if end == "error":
        assert isinstance(last, Error)
        assert reading.finish == {}
    else:
        assert isinstance(last, Done)
        assert last.finish == [reading.finish[sample] for sample in range(3)]
        assert last.usage.output_tokens == sum(map(len, given_ids.values()))


def test_a_sample_that_ended_keeps_its_reason_when_the_rest_is_cancelled() -> None:
    request = make_request(2)
    request.take(StreamPiece("a", (1,), "stop", sample_index=1), 1.0)
    assert request.internal_ids == [0]
    request.cancel()
    done = read(request)[-1]
    assert isinstance(done, Done)
    assert done.finish == ["aborted", "stop"]


def test_nothing_is_taken_after_the_end() -> None:
    request = make_request(1)
    request.take(StreamPiece("a", (1,), "stop"), 1.0)
    request.cancel()
    request.fail(make_error("internal", "no", 9))
    request.take(StreamPiece("b", (2,), None), 2.0)
    messages = read(request)
    assert [type(message) for message in messages] == [Accepted, Delta, Done]


def test_a_request_cancelled_before_it_was_checked_has_an_end() -> None:
    request = PublicRequest(Session(b"id", "name", "", 0.0), 9, "client", 3, arrived_s=0.0)
    assert request.peek() is None
    request.cancel()
    (done,) = read(request)
    assert isinstance(done, Done)
    assert done.finish == ["aborted"] * 3, "one for each sample, as of a request cancelled later"


def test_times_count_from_the_requests_arrival() -> None:
    request = make_request(1)
    request.take(StreamPiece("a", (1,), None), 2.0)
    request.take(StreamPiece("a", (1,), "stop"), 3.0)
    done = read(request)[-1]
    assert isinstance(done, Done)
    timing = (done.timing.queued_ms, done.timing.first_token_ms, done.timing.total_ms)
    assert timing == pytest.approx((500.0, 2000.0, 3000.0))
