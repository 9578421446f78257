"""A server and its clients: conversations, refusals, and what happens when either side is gone."""

import contextlib
import struct
import threading
import time

import msgspec
import pytest
import zmq

from graphgen.frontend.server import SMALL_BYTES
from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.ggp.framing import client_framing
from graphgen.ipc.ggp.messages import (
    Accepted,
    Bye,
    Cancel,
    ChatMessage,
    Delta,
    Done,
    Draining,
    Error,
    Generate,
    Health,
    HealthRequest,
    Hello,
    Ping,
    Pong,
    Sampling,
    Stats,
    StatsRequest,
    Welcome,
)
from graphgen.ipc.messages import Cancel as SchedulerCancel
from graphgen.ipc.messages import (
    Drain,
    EngineLost,
    Failed,
    Probe,
    Rejected,
    Submit,
)
from graphgen.ipc.messages import StatsRequest as SchedulerStatsRequest
from graphgen.portable_tokenizer import PortableTokenizer, RustTokenizer
from tests.fakes import STATS
from tests.frontend.conftest import MakeFrontend
from tests.frontend.harness import Frontend, RawClient, wait_until

IDS = Generate(id=1, prompt_ids=[5, 6, 7])


def open_request(frontend: Frontend, client: RawClient, message: Generate = IDS) -> int:
    """Its name at the scheduler."""
    client.send(message)
    submit = frontend.scheduler.expect(Submit)
    client.expect(Accepted)
    return submit.request_id


def test_a_conversation(frontend: Frontend, portable: PortableTokenizer) -> None:
    tokenizer = RustTokenizer(portable)
    client = frontend.welcome()
    client.send(Generate(id=7, text="ROMEO:", sampling=Sampling(max_tokens=9, temperature=0.0)))
    accepted = client.expect(Accepted)
    submit = frontend.scheduler.expect(Submit)
    assert list(unpack_int32(submit.prompt_token_ids)) == tokenizer.encode(["ROMEO:"])[0]
    assert (submit.max_tokens, submit.sampler.temperature) == (9, 0.0)
    assert accepted == Accepted(id=7, prompt_tokens=len(submit.prompt_token_ids) // 4)

    answer = tokenizer.encode([" But soft, what light"])[0]
    text = ""
    for seq, token_id in enumerate(answer):
        is_last = seq == len(answer) - 1
        frontend.scheduler.send_tokens(submit.request_id, [token_id], "length" if is_last else None)
        delta = client.expect(Delta)
        assert (delta.id, delta.seq, delta.ids) == (7, seq, [token_id])
        assert delta.finish == ("length" if is_last else None)
        text += delta.text
    assert text == " But soft, what light"
    done = client.expect(Done)
    assert (done.id, done.finish) == (7, ["length"])
    assert (done.usage.prompt_tokens, done.usage.output_tokens) == (accepted.prompt_tokens, len(answer))


def test_the_same_prompt_in_every_form(frontend: Frontend, portable: PortableTokenizer) -> None:
    ids = RustTokenizer(portable).encode(["a: b\nmodel:"])[0]
    client = frontend.welcome()
    packed = struct.pack(f"<{len(ids)}I", *ids)
    forms = [
        Generate(id=1, text="a: b\nmodel:"),
        Generate(id=2, messages=[ChatMessage(role="a", content="b")]),
        Generate(id=3, prompt_ids=ids),
        Generate(id=4, prompt_u32=packed),
    ]
    for form in forms:
        client.send(msgspec.structs.replace(form, echo_ids=True))
        assert client.expect(Accepted).prompt_ids == ids
        assert frontend.scheduler.expect(Submit).prompt_token_ids == packed


def test_samples_have_seeds_and_ends_of_their_own(frontend: Frontend) -> None:
    client = frontend.welcome()
    client.send(Generate(id=1, prompt_ids=[1], sampling=Sampling(n=3, seed=10)))
    submits = [frontend.scheduler.expect(Submit) for _ in range(3)]
    client.expect(Accepted)
    assert [submit.sampler.seed for submit in submits] == [10, 11, 12]
    for sample in (2, 0, 1):
        frontend.scheduler.send_tokens(submits[sample].request_id, [9], "length" if sample else "stop")
        delta = client.expect(Delta)
        assert (delta.sample, delta.seq) == (sample, 0)
    assert client.expect(Done).finish == ["stop", "length", "length"]


def test_without_streaming_a_sample_comes_whole(frontend: Frontend) -> None:
    client = frontend.welcome()
    request_id = open_request(frontend, client, Generate(id=1, prompt_ids=[1], stream=False))
    for token_id in (10, 11):
        frontend.scheduler.send_tokens(request_id, [token_id])
    assert client.receive(0.2) is None
    frontend.scheduler.send_tokens(request_id, [12], "stop")
    assert client.expect(Delta).ids == [10, 11, 12]
    client.expect(Done)


def test_cancel_frees_the_request_at_once_and_says_so(frontend: Frontend) -> None:
    client = frontend.welcome()
    request_id = open_request(frontend, client)
    frontend.scheduler.send_tokens(request_id, [3])
    client.expect(Delta)
    client.send(Cancel(id=1))
    assert frontend.scheduler.expect(SchedulerCancel).request_id == request_id
    frontend.scheduler.send_tokens(request_id, [4])  # was in flight: it is dropped
    delta = client.expect(Delta)
    assert (delta.ids, delta.finish) == ([], "aborted")
    assert client.expect(Done).usage.output_tokens == 1
    client.send(Cancel(id=1))
    assert client.receive(0.2) is None


def test_the_control_socket_cancels_by_session(frontend: Frontend) -> None:
    client, control = frontend.welcome(), frontend.connect(control=True)
    request_id = open_request(frontend, client)
    control.send(Cancel(id=1, session="another"))
    assert control.expect(Error).code == "no_session"
    control.send(Cancel(id=1, session=client.session))
    assert frontend.scheduler.expect(SchedulerCancel).request_id == request_id


def test_health_asks_the_worker(frontend: Frontend) -> None:
    control = frontend.connect(control=True)
    control.send(HealthRequest())
    frontend.scheduler.send(frontend.scheduler.expect(Probe))
    health = control.expect(Health)
    assert (health.status, health.ready) == ("ok", True)


def test_health_of_a_worker_that_does_not_answer(frontend: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphgen.frontend.monitor.TIMEOUT_S", 0.3)
    monkeypatch.setattr(frontend.server._monitor._health, "_timeout_s", 0.3)
    control = frontend.connect(control=True)
    for _ in range(2):  # the second finds the question on its way
        control.send(HealthRequest())
        health = control.expect(Health)
        assert (health.status, health.ready) == ("stalled", False)
    probe = frontend.scheduler.expect(Probe)
    assert frontend.scheduler._channel.receive(0.1) is None, "a question is not repeated"
    frontend.scheduler.send(probe)
    assert wait_until(lambda: frontend.server._monitor._health.waited_s(time.monotonic()) == 0)


def test_one_question_serves_all_who_ask_for_statistics(frontend: Frontend) -> None:
    clients = [frontend.connect(control=True) for _ in range(5)]
    for client in clients:
        client.send(StatsRequest())
    frontend.scheduler.expect(SchedulerStatsRequest)
    time.sleep(0.1)
    frontend.scheduler.send(STATS)
    for client in clients:
        stats = client.expect(Stats)
        assert (stats.running, stats.waiting, stats.pages_free) == (STATS.running, STATS.waiting, STATS.pages_free)


def test_a_ping_is_answered_on_both_sockets(frontend: Frontend) -> None:
    for client in (frontend.welcome(), frontend.connect(control=True)):
        client.send(Ping(t=77))
        assert client.expect(Pong).t == 77


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


def test_an_open_id_is_not_opened_twice(frontend: Frontend) -> None:
    client = frontend.welcome()
    request_id = open_request(frontend, client)
    client.send(IDS)
    error = client.expect(Error)
    assert (error.code, error.id) == ("duplicate_id", None)
    frontend.scheduler.send_tokens(request_id, [3], "length")
    client.expect(Delta)
    client.expect(Done)
    open_request(frontend, client)  # after its end the id is free


def test_an_id_belongs_to_its_session(frontend: Frontend) -> None:
    one, other = frontend.welcome(), frontend.welcome()
    first, second = open_request(frontend, one), open_request(frontend, other)
    other.send(Cancel(id=1))
    assert frontend.scheduler.expect(SchedulerCancel).request_id == second
    frontend.scheduler.send_tokens(first, [3], "stop")
    assert one.expect(Delta).ids == [3]


def test_the_schedulers_refusal_reaches_its_client(frontend: Frontend) -> None:
    client = frontend.welcome()
    request_id = open_request(frontend, client)
    frontend.scheduler.send(Rejected(request_id, "InvalidRequestError", "no"))
    error = client.expect(Error)
    assert (error.code, error.id, error.message) == ("bad_request", 1, "no")


def test_a_client_has_its_share_and_no_more(make_frontend: MakeFrontend) -> None:
    frontend = make_frontend(open_requests=2, open_prompt_tokens=100)
    client, other = frontend.welcome(), frontend.welcome()
    for number in (1, 2):
        open_request(frontend, client, Generate(id=number, prompt_ids=[1] * 40))
    client.send(Generate(id=3, prompt_ids=[1]))
    error = client.expect(Error)
    assert (error.code, error.id, error.retryable) == ("overloaded", 3, True)
    assert error.retry_after_ms is not None
    assert error.retry_after_ms > 0
    open_request(frontend, other, Generate(id=3, prompt_ids=[1] * 40))
    other.send(Generate(id=4, prompt_ids=[1] * 61))
    assert other.expect(Error).code == "overloaded"
    client.send(Cancel(id=1))
    assert client.expect(Delta).finish == "aborted"
    client.expect(Done)
    frontend.scheduler.expect(SchedulerCancel)
    open_request(frontend, client, Generate(id=3, prompt_ids=[1]))


def test_clients_take_turns_and_within_one_the_higher_class_goes_first(make_frontend: MakeFrontend) -> None:
    frontend = make_frontend(max_unstarted=1)
    greedy, modest = frontend.welcome(), frontend.welcome()
    first = open_request(frontend, greedy, Generate(id=0, prompt_ids=[100]))
    for number in (1, 2, 3):
        greedy.send(Generate(id=number, prompt_ids=[100 + number], sampling=Sampling(priority=int(number == 3))))
        greedy.expect(Accepted)
    modest_first = open_request(frontend, modest, Generate(id=0, prompt_ids=[200]))
    modest.send(Generate(id=1, prompt_ids=[201]))
    modest.expect(Accepted)
    assert frontend.scheduler._channel.receive(0.1) is None, "each has one in the scheduler's queue"
    order = []
    for started in (first, modest_first):
        frontend.scheduler.send_tokens(started, [1])
        submit = frontend.scheduler.expect(Submit)
        order.append(unpack_int32(submit.prompt_token_ids)[0])
    assert order == [103, 201]


def test_a_held_request_ends_at_its_deadline(make_frontend: MakeFrontend) -> None:
    frontend = make_frontend(max_unstarted=1)
    client = frontend.welcome()
    open_request(frontend, client)
    client.send(Generate(id=2, prompt_ids=[1], sampling=Sampling(deadline_ms=200.0)))
    client.expect(Accepted)
    error = client.expect(Error)
    assert (error.code, error.id) == ("deadline", 2)


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


def test_a_frame_above_the_limit_closes_that_connection_only(frontend: Frontend) -> None:
    client, other = frontend.welcome(), frontend.welcome()
    client.send_raw(b"GG\x01G", b"\x00" * (2 << 20))
    assert client.receive(0.5) is None
    open_request(frontend, other)


def test_a_message_of_many_frames_is_refused_and_not_kept(frontend: Frontend) -> None:
    client = frontend.welcome()
    client.send_raw(*[b"x" * 1000] * 1000)
    assert client.expect(Error).code == "bad_frame"


def test_clients_cannot_take_each_others_names(frontend: Frontend) -> None:
    """A routing id that a client chooses is of no use: the second with the same one gets no session of the first."""
    one = frontend.connect(IDENTITY=b"same")
    one.send(Hello())
    first = one.expect(Welcome)
    other = frontend.connect(IDENTITY=b"same")
    other.send(Hello())
    assert other.receive(0.3) is None
    open_request(frontend, one)
    assert first.session
