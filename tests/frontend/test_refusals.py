"""What is refused, with which code, and that it ends nothing else."""

import struct
import time

import msgspec
import pytest

from graphgen import GraphgenError, NumericalError, PoisonedRequestError
from graphgen.ipc.engine_messages import Rejected
from graphgen.ipc.engine_messages import StatsRequest as SchedulerStatsRequest
from graphgen.ipc.ggp.messages import (
    Bye,
    Cancel,
    Delta,
    Done,
    Error,
    HealthRequest,
    Hello,
    Ping,
    Pong,
    Stats,
    StatsRequest,
)
from graphgen.remote.requests import exception_of
from graphgen.server.frontend.monitor import FRESH_S
from graphgen.server.frontend.server import SMALL_BYTES
from tests.fakes import STATS
from tests.frontend.harness import IDS, Frontend, RawClient, open_request

BAD_REQUESTS = [
    ({}, "bad_request", None),
    ({"id": -1}, "bad_request", None),
    ({"id": 1}, "bad_request", 1),  # no prompt
    ({"id": 1, "text": "a", "prompt_ids": [1]}, "bad_request", 1),
    ({"id": 1, "text": ""}, "bad_request", 1),
    ({"id": 1, "text": 5}, "bad_request", 1),
    ({"id": 1, "text": b"bytes"}, "bad_request", 1),
    ({"id": 1, "prompt_ids": []}, "bad_request", 1),
    ({"id": 1, "prompt_ids": [1024]}, "bad_request", 1),  # the demo model's vocabulary ends at 1023
    ({"id": 1, "prompt_ids": [2**40]}, "bad_request", 1),
    ({"id": 1, "prompt_u32": b"\x01\x00\x00"}, "bad_request", 1),
    ({"id": 1, "prompt_u32": b"\x01\x00\x00\x00\xff"}, "bad_request", 1),
    ({"id": 1, "prompt_u32": b"\xff\xff\xff\xff"}, "bad_request", 1),
    ({"id": 1, "messages": []}, "bad_request", 1),
    ({"id": 1, "messages": [{"role": "user"}]}, "bad_request", 1),
    ({"id": 1, "prompt_ids": [1], "sampling": {"temperature": -1}}, "bad_request", 1),
    ({"id": 1, "prompt_ids": [1], "sampling": {"min_tokens": 5, "max_tokens": 4}}, "bad_request", 1),
    ({"id": 1, "prompt_ids": [1], "sampling": {"stop_token_ids": [5000]}}, "bad_request", 1),
    ({"id": 1, "prompt_ids": [1], "sampling": {"n": 17}}, "bad_request", 1),
    ({"id": 1, "text": "x" * 70_000}, "too_large", 1),
    ({"id": 1, "prompt_ids": [1] * 1024}, "never_fits", 1),
    ({"id": 1, "prompt_ids": [1] * 500, "sampling": {"max_tokens": 64}}, "never_fits", 1),  # beyond the fake's pages
]


@pytest.mark.parametrize(("fields", "code", "request_id"), BAD_REQUESTS, ids=lambda value: repr(value)[:40])
def test_a_bad_request_is_refused_alone(
    frontend: Frontend, fields: dict[str, object], code: str, request_id: int | None
) -> None:
    client = frontend.welcome()
    client.send_raw(b"GG\x01G", msgspec.msgpack.encode(fields))
    error = client.expect(Error)
    assert (error.code, error.id) == (code, request_id)
    request_id = open_request(frontend, client)  # the session and the id are as good as before
    frontend.scheduler.send_tokens(request_id, [3], "length")
    client.expect(Delta)


def test_whatever_is_refused_is_counted(frontend: Frontend) -> None:
    """By the loop at once, by the threads that tokenize, and by the scheduler after `accepted`."""
    client = frontend.welcome()
    for number, (fields, _, _) in enumerate(BAD_REQUESTS, 1):
        client.send_raw(b"GG\x01G", msgspec.msgpack.encode(fields))
        client.expect(Error)
        assert messages_refused(frontend, client) == number
    request_id = open_request(frontend, client)
    frontend.scheduler.send(Rejected(request_id, "OverloadedError", "no", 1.0))
    client.expect(Error)
    client.send_raw(b"GG\x01G")
    client.expect(Error)
    assert messages_refused(frontend, client) == len(BAD_REQUESTS) + 2
    request_id = open_request(frontend, client)
    frontend.scheduler.send_tokens(request_id, [3])
    client.expect(Delta)
    frontend.scheduler.send(Rejected(request_id, "DeadlineError", "too late"))
    assert client.expect(Error).code == "deadline"
    assert messages_refused(frontend, client) == len(BAD_REQUESTS) + 2, "it was served, for a while"


def messages_refused(frontend: Frontend, client: RawClient) -> int:
    time.sleep(FRESH_S)
    client.send(StatsRequest())
    frontend.scheduler.expect(SchedulerStatsRequest)
    frontend.scheduler.send(STATS)
    return client.expect(Stats).messages_refused


def test_a_large_message_is_refused_with_the_code_that_a_small_one_has(frontend: Frontend) -> None:
    client = frontend.welcome()
    padding = b"\xa1x\xc6" + struct.pack(">I", 2 * SMALL_BYTES) + bytes(2 * SMALL_BYTES)
    for body, code in (
        (b"\x82\xa2id\x01\xa1x" + b"\x91" * 2 * SMALL_BYTES, "bad_frame"),  # arrays within each other, without an end
        (b"\x82\xa2id\x01" + padding[:-1], "bad_frame"),
        (b"\x81" + padding, "bad_request"),  # no id
    ):
        client.send_raw(b"GG\x01G", body)
        error = client.expect(Error)
        assert (error.code, error.id) == (code, None)


def test_a_malformed_message_about_an_open_request_does_not_end_it(frontend: Frontend) -> None:
    client = frontend.welcome()
    request_id = open_request(frontend, client)
    client.send_raw(b"GG\x01X", msgspec.msgpack.encode({"id": 1, "session": 17}))
    client.send_raw(b"GG\x01G", msgspec.msgpack.encode({"id": 1, "text": 17}))
    errors = [client.expect(Error), client.expect(Error)]
    assert [(error.code, error.id) for error in errors] == [("bad_request", None), ("duplicate_id", None)]
    frontend.scheduler.send_tokens(request_id, [3], "length")
    client.expect(Delta)
    client.expect(Done)


def test_everything_but_hello_needs_a_session(frontend: Frontend) -> None:
    client = frontend.connect()
    for message in (IDS, Cancel(id=1), Ping(), StatsRequest(), HealthRequest(), Bye(), Pong()):
        client.send(message)
        error = client.expect(Error)
        assert (error.code, error.retryable) == ("no_session", True)
        assert error.id == (1 if message is IDS else None)


def test_the_control_socket_takes_no_requests(frontend: Frontend) -> None:
    control = frontend.connect(control=True)
    for message in (IDS, Hello()):
        control.send(message)
        assert control.expect(Error).code == "bad_request"


def test_a_client_of_another_version_is_told_so(frontend: Frontend) -> None:
    client = frontend.connect()
    client.send(Hello(versions=(2, 3)))
    error = client.expect(Error)
    assert (error.code, error.versions) == ("unsupported_version", (1, 1))
    client.send_raw(b"GG\x02H", b"\x80")
    assert client.expect(Error).code == "unsupported_version"


def test_the_schedulers_refusal_reaches_its_client(frontend: Frontend) -> None:
    client = frontend.welcome()
    request_id = open_request(frontend, client)
    frontend.scheduler.send(Rejected(request_id, "InvalidRequestError", "no"))
    error = client.expect(Error)
    assert (error.code, error.id, error.message) == ("bad_request", 1, "no")


@pytest.mark.parametrize(
    ("name", "kind", "code"),
    [("NumericalError", NumericalError, "numerical"), ("PoisonedRequestError", PoisonedRequestError, "poisoned")],
)
def test_a_request_that_failed_in_the_engine_fails_at_its_client_as_it_would_in_process(
    frontend: Frontend, name: str, kind: type[GraphgenError], code: str
) -> None:
    client = frontend.welcome()
    request_id = open_request(frontend, client)
    frontend.scheduler.send_tokens(request_id, [3])
    client.expect(Delta)
    frontend.scheduler.send(Rejected(request_id, name, "the reason"))
    error = client.expect(Error)
    assert (error.code, error.id, error.retryable) == (code, 1, False)
    failure = exception_of(error)
    assert (type(failure), str(failure)) == (kind, "the reason")
