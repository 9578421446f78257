"""A server and its sessions: how they end, slow and silent and hostile clients, draining, and a lost engine."""

import contextlib
import logging
import secrets
import threading
import time

import pytest
import zmq

from graphgen.base.logs import RepeatedLines
from graphgen.ipc.engine_messages import Cancel as SchedulerCancel
from graphgen.ipc.engine_messages import Submit
from graphgen.ipc.ggp.framing import client_framing
from graphgen.ipc.ggp.messages import (
    Bye,
    Delta,
    Done,
    Draining,
    Error,
    Generate,
    Hello,
    Ping,
    Pong,
    Welcome,
)
from graphgen.ipc.server_messages import Drain, EngineLost
from graphgen.ipc.worker_messages import Failed
from graphgen.server.frontend.sessions import Session, Sessions, session_limits
from tests.frontend.conftest import MakeFrontend
from tests.frontend.harness import Frontend, open_request, wait_until


def test_who_comes_when_another_has_left_finds_room(make_frontend: MakeFrontend) -> None:
    """Also soon after it was refused, and before the server has looked after its sessions."""
    frontend = make_frontend(max_sessions=1)
    first, second = frontend.welcome(), frontend.connect()
    second.send(Hello())
    assert second.expect(Error).code == "overloaded"
    go_on = frontend.hold()
    first.close()
    assert wait_until(lambda: len(frontend.gate) == 1)
    second.send(Hello())
    time.sleep(0.02)  # until it is there
    go_on.set()
    second.expect(Welcome)


def test_requests_of_a_closed_connection_are_cancelled(frontend: Frontend) -> None:
    client = frontend.welcome()
    request_id = open_request(frontend, client)
    client.close()
    assert frontend.scheduler.expect(SchedulerCancel, timeout_s=3.0).request_id == request_id


def test_bye_ends_the_session(frontend: Frontend) -> None:
    client = frontend.welcome()
    request_id = open_request(frontend, client)
    client.send(Bye())
    assert frontend.scheduler.expect(SchedulerCancel).request_id == request_id
    client.send(Ping())
    assert client.expect(Error).code == "no_session"


def test_a_second_hello_ends_the_first_session(frontend: Frontend) -> None:
    client = frontend.welcome()
    request_id = open_request(frontend, client)
    client.send(Hello())
    assert frontend.scheduler.expect(SchedulerCancel).request_id == request_id
    assert client.expect(Welcome).session != client.session


def test_a_slow_reader_gets_every_token_and_holds_nobody_up(make_frontend: MakeFrontend) -> None:
    frontend = make_frontend()
    slow, quick = frontend.welcome(RCVHWM=10, RCVBUF=4096), frontend.welcome()
    slow_id, quick_id = open_request(frontend, slow), open_request(frontend, quick)
    num_tokens = 40_000  # more than the queues and the kernel's buffers hold
    for token in range(num_tokens):
        frontend.scheduler.send_tokens(slow_id, [token % 1000], "length" if token == num_tokens - 1 else None)
    begun_s = time.monotonic()
    frontend.scheduler.send_tokens(quick_id, [5], "stop")
    assert quick.expect(Delta, timeout_s=20).ids == [5]
    assert time.monotonic() - begun_s < 20
    received: list[int] = []
    num_deltas = 0
    while not isinstance(message := slow.receive(), Done):
        assert isinstance(message, Delta)
        assert message.seq == len(received)
        received += message.ids
        num_deltas += 1
    assert received == [token % 1000 for token in range(num_tokens)]
    assert num_deltas < num_tokens, "tokens that waited were joined"


def test_a_flood_waits_in_its_own_connection(make_frontend: MakeFrontend) -> None:
    frontend = make_frontend(open_requests=1)
    flooder, client = frontend.welcome(), frontend.welcome()
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            for message in (Generate(id=1, prompt_ids=[1]), Ping()):
                with contextlib.suppress(zmq.Again):
                    flooder.socket.send_multipart(client_framing().encode(message), zmq.NOBLOCK)
            while flooder.socket.poll(0):
                flooder.socket.recv_multipart()

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        frontend.scheduler.expect(Submit)  # the one that the flooder may have
        time.sleep(0.5)
        slowest_s = 0.0
        for number in range(20):
            begun_s = time.monotonic()
            request_id = open_request(frontend, client, Generate(id=number, prompt_ids=[1]))
            frontend.scheduler.send_tokens(request_id, [1], "stop")
            client.expect(Delta)
            client.expect(Done)
            slowest_s = max(slowest_s, time.monotonic() - begun_s)
    finally:
        stop.set()
        thread.join()
    assert slowest_s < 0.5


def test_a_client_that_says_nothing_for_too_long_is_cut_off(make_frontend: MakeFrontend) -> None:
    frontend = make_frontend(slow_consumer_s=1.0, heartbeat_s=0.2)
    client = frontend.welcome()
    request_id = open_request(frontend, client)
    assert frontend.scheduler.expect(SchedulerCancel, timeout_s=3.0).request_id == request_id
    error = client.expect(Error)
    assert (error.code, error.id) == ("slow_consumer", 1)


def test_a_server_that_was_stopped_reads_before_it_judges(make_frontend: MakeFrontend) -> None:
    frontend = make_frontend(slow_consumer_s=2.0, heartbeat_s=0.2)
    client = frontend.welcome()
    request_id = open_request(frontend, client)
    frontend.server._inbox.put(lambda: time.sleep(2.2))
    frontend.server._inbox.wake()
    time.sleep(0.1)
    client.send(Pong())
    frontend.scheduler.send_tokens(request_id, [1], "stop")
    assert client.expect(Delta).ids == [1]


def test_a_client_that_answers_pings_is_not_cut_off(make_frontend: MakeFrontend) -> None:
    frontend = make_frontend(slow_consumer_s=1.0, heartbeat_s=0.2)
    client = frontend.welcome()
    request_id = open_request(frontend, client)
    for _ in range(8):
        assert client.socket.poll(1000)
        client.socket.recv_multipart()
        client.send(Pong())
    frontend.scheduler.send_tokens(request_id, [1], "stop")
    assert client.expect(Delta).ids == [1]


def test_draining_finishes_what_is_open_and_takes_nothing_new(frontend: Frontend) -> None:
    client = frontend.welcome()
    request_id = open_request(frontend, client)
    frontend.supervisor.send(Drain(10.0))
    assert client.expect(Draining).grace_ms == 10_000
    client.send(Generate(id=2, prompt_ids=[1]))
    error = client.expect(Error)
    assert (error.code, error.id, error.retryable) == ("draining", 2, True)
    frontend.scheduler.send_tokens(request_id, [1], "stop")
    client.expect(Delta)
    client.expect(Done)
    frontend.thread.join(5)
    assert frontend.num_lost == 0


def test_who_comes_while_the_server_drains_is_told_so(frontend: Frontend) -> None:
    early, late = frontend.welcome(), frontend.connect()
    open_request(frontend, early)
    frontend.supervisor.send(Drain(10.0))
    early.expect(Draining)
    late.send(Hello())
    welcome = late.expect(Welcome)
    assert welcome.draining
    assert 8_000 < late.expect(Draining).grace_ms <= 10_000
    late.send(Generate(id=1, prompt_ids=[1]))
    assert late.expect(Error).code == "draining"


def test_what_does_not_finish_within_the_grace_time_gets_an_error(frontend: Frontend) -> None:
    client = frontend.welcome()
    request_id = open_request(frontend, client)
    frontend.supervisor.send(Drain(0.3))
    client.expect(Draining)
    error = client.expect(Error)
    assert (error.code, error.id) == ("draining", 1)
    assert frontend.scheduler.expect(SchedulerCancel).request_id == request_id
    frontend.thread.join(5)
    assert frontend.num_lost == 1


def test_a_second_order_to_drain_ends_at_once(frontend: Frontend) -> None:
    client = frontend.welcome()
    open_request(frontend, client)
    frontend.supervisor.send(Drain(60.0))
    client.expect(Draining)
    frontend.supervisor.send(Drain(0.0))
    client.expect(Draining)
    assert client.expect(Error).code == "draining"
    frontend.thread.join(5)
    assert not frontend.thread.is_alive()


@pytest.mark.parametrize("teller", ["supervisor", "scheduler"])
def test_a_lost_engine_ends_every_request_with_an_error(frontend: Frontend, teller: str) -> None:
    clients = [frontend.welcome() for _ in range(3)]
    for client in clients:
        open_request(frontend, client)
    if teller == "supervisor":
        frontend.supervisor.send(EngineLost("the worker ended"))
    else:
        frontend.scheduler.send(Failed("worker", "RuntimeError", "out of luck"))
    for client in clients:
        error = client.expect(Error)
        assert (error.code, error.id, error.retryable) == ("engine_lost", 1, True)


def test_more_sessions_than_allowed_are_refused(make_frontend: MakeFrontend) -> None:
    frontend = make_frontend(max_sessions=3)
    staying = [frontend.welcome(), frontend.welcome()]
    gone = frontend.welcome()
    late = frontend.connect()
    late.send(Hello())
    assert late.expect(Error).code == "overloaded"
    gone.close()

    def is_let_in() -> bool:
        late.send(Hello())
        return isinstance(late.receive(), Welcome)

    assert wait_until(is_let_in), "the place of a client that is gone is free"
    for client in staying:
        client.send(Ping())
        client.expect(Pong)


def test_no_key_and_no_address_takes_all_sessions() -> None:
    limits = session_limits(8, 100)
    assert limits == (8, 4, 6)
    sessions = Sessions(limits)

    def add(key: str, address: str) -> str | None:
        refusal = sessions.refusal(key, address)
        if refusal is None:
            session = Session(secrets.token_bytes(5), secrets.token_hex(16), key, 0.0)
            session.address = address
            sessions.add(session)
        return refusal

    assert [add("greedy", f"10.0.0.{number}") for number in range(4)] == [None] * 4
    assert "your key has 4 sessions, the limit is 4" in str(add("greedy", "10.0.0.9"))
    assert [add("", "10.0.0.9") for _ in range(4)] == [None] * 4
    assert "there are 8 sessions, the limit is 8" in str(add("other", "10.0.0.10"))
    sessions.remove(next(one for one in sessions.all() if one.key == "greedy"))
    assert add("greedy", "10.0.0.10") is None

    sessions = Sessions(limits)
    assert [add(f"key {number}", "10.0.0.1") for number in range(6)] == [None] * 6
    assert "your address has 6 sessions, the limit is 6" in str(add("another", "10.0.0.1"))
    assert add("another", "10.0.0.2") is None


def test_one_address_leaves_sessions_for_others(make_frontend: MakeFrontend) -> None:
    frontend = make_frontend(max_sessions=4)
    address = frontend.sockets.data.address
    greedy = [frontend.welcome(address=address.replace("//", "//127.0.0.9:0;")) for _ in range(3)]
    late = frontend.connect(address=address.replace("//", "//127.0.0.9:0;"))
    late.send(Hello())
    assert "your address has 3 sessions" in late.expect(Error).message
    frontend.welcome()
    for client in greedy:
        client.send(Ping())
        client.expect(Pong)


def test_a_flood_of_hellos_writes_a_line_a_second(frontend: Frontend, caplog: pytest.LogCaptureFixture) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.addFilter(RepeatedLines())
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]  # a test's handler
    logger = logging.getLogger("graphgen.server.frontend")
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, logger.name):
            client = frontend.connect()
            for _ in range(500):
                client.send(Hello())
            client.send(Ping(t=7))
            while not isinstance(client.receive(), Pong):
                pass
    finally:
        logger.removeHandler(handler)
    assert 1 <= len(lines) <= 5
    assert len(caplog.records) >= 500
    assert len(frontend.server._sessions) == 1


def test_a_frame_above_the_limit_closes_that_connection_only(frontend: Frontend) -> None:
    client, other = frontend.welcome(), frontend.welcome()
    client.send_raw(b"GG\x01G", b"\x00" * (2 << 20))
    assert client.receive(0.5) is None
    open_request(frontend, other)


def test_a_message_of_many_frames_is_refused_and_not_kept(frontend: Frontend) -> None:
    client = frontend.welcome()
    client.send_raw(*[b"x" * 1000] * 500)
    assert client.expect(Error).code == "bad_frame"
