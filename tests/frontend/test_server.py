"""A server and the requests of its clients: conversations, refusals, and whose turn it is."""

import struct
import time
from pathlib import Path

import msgspec
import pytest

from graphgen import GraphgenError, NumericalError, PoisonedRequestError
from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.ggp.messages import (
    Accepted,
    Bye,
    Cancel,
    ChatMessage,
    Delta,
    Deltas,
    Done,
    Error,
    Generate,
    Health,
    HealthRequest,
    Hello,
    Notice,
    Ping,
    Pong,
    Sampling,
    Stats,
    StatsRequest,
    Welcome,
)
from graphgen.ipc.messages import (
    Attach,
    EngineLost,
    EngineServes,
    FinishReason,
    Outputs,
    Probe,
    Rejected,
    Submit,
    TokenOutput,
)
from graphgen.ipc.messages import Cancel as SchedulerCancel
from graphgen.ipc.messages import Notice as EngineNotice
from graphgen.ipc.messages import StatsRequest as SchedulerStatsRequest
from graphgen.remote.requests import exception_of
from graphgen.requests.tokenizer import Tokenizer
from graphgen.server.frontend import outbox
from graphgen.server.frontend.keys import Keys
from graphgen.server.frontend.monitor import FRESH_S
from graphgen.server.frontend.server import SMALL_BYTES
from tests.fakes import READY, STATS
from tests.frontend.conftest import MakeFrontend
from tests.frontend.harness import IDS, Frontend, RawClient, open_request, wait_until


def test_a_conversation(frontend: Frontend, tokenizer: Tokenizer) -> None:
    client = frontend.welcome()
    client.send(Generate(id=7, text="ROMEO:", sampling=Sampling(max_tokens=9, temperature=0.0)))
    accepted = client.expect(Accepted)
    submit = frontend.scheduler.expect(Submit)
    assert list(unpack_int32(submit.prompt_token_ids)) == tokenizer.encode("ROMEO:")
    assert (submit.max_tokens, submit.sampler.temperature) == (9, 0.0)
    assert accepted == Accepted(id=7, prompt_tokens=len(submit.prompt_token_ids) // 4)

    answer = tokenizer.encode(" But soft, what light")
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


def test_the_same_prompt_in_every_form(frontend: Frontend, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a: b\nmodel:")
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


def test_a_request_cancelled_before_it_is_checked_ends_each_of_its_samples(frontend: Frontend) -> None:
    client = frontend.welcome()
    read_on = frontend.hold()
    client.send(Generate(id=1, prompt_ids=[1], sampling=Sampling(n=3)))
    client.send(Cancel(id=1))
    time.sleep(0.2)
    read_on.set()
    done = client.expect(Done)
    assert (done.finish, done.usage.output_tokens) == (["aborted"] * 3, 0)
    open_request(frontend, client)


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
    monkeypatch.setattr("graphgen.server.frontend.monitor.TIMEOUT_S", 0.3)
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


def test_statistics_tell_what_went_wrong_in_the_engine(frontend: Frontend) -> None:
    faults = {"worker_restarts": 3, "worker_loss": "the worker hung", "poisoned": 2, "numerical_errors": 5}
    client = frontend.welcome()
    client.send(StatsRequest())
    frontend.scheduler.expect(SchedulerStatsRequest)
    frontend.scheduler.send(msgspec.structs.replace(STATS, **faults))
    found = msgspec.structs.asdict(client.expect(Stats))
    assert {name: found[name] for name in faults} == faults


def test_who_asks_for_notices_gets_them_and_nobody_else(frontend: Frontend) -> None:
    """Of the worker and of the engine; the operator gets the worker's as well."""
    asks, other = frontend.connect(), frontend.welcome()
    asks.send(Hello(notices=True))
    assert "notices" in asks.expect(Welcome).features
    frontend.scheduler.send(EngineNotice("the worker hung"))
    assert asks.expect(Notice).text == "the worker hung"
    assert frontend.supervisor.receive(5) == EngineNotice("the worker hung")
    frontend.supervisor.send(EngineLost("the engine ended", restarts=True))
    assert asks.expect(Notice).text.startswith("the engine ended; it is started again")
    frontend.scheduler.expect(Attach)
    frontend.scheduler.send(READY)
    assert asks.expect(Notice).text == "the engine serves again"
    other.send(Ping(t=1))
    assert other.expect(Pong).t == 1, "the first that it hears"
    frontend.supervisor.send(EngineLost("the engine ended once more"))
    assert asks.expect(Notice).text == "the engine ended once more; the server ends"


def send_step(frontend: Frontend, tokens: dict[int, list[int]], finish: FinishReason | None = None) -> None:
    """The tokens of these requests, of one step."""
    frontend.scheduler.send(Outputs(tuple(TokenOutput(one, tuple(ids), finish, 0.0) for one, ids in tokens.items())))


def test_what_a_step_gives_comes_in_one_message_to_who_asked_for_that(frontend: Frontend, tokenizer: Tokenizer) -> None:
    asks, other = frontend.connect(), frontend.welcome()
    asks.send(Hello(batches=True))
    assert "batches" in asks.expect(Welcome).features
    asks.send(Generate(id=1, prompt_ids=[5], sampling=Sampling(n=2)))
    first, second = (frontend.scheduler.expect(Submit).request_id for _ in range(2))
    asks.expect(Accepted)
    third, alone = open_request(frontend, asks, Generate(id=2, prompt_ids=[5])), open_request(frontend, other)
    send_step(frontend, {first: [7], third: [9, 10], alone: [3], second: [8]})
    assert asks.expect(Deltas).items == [
        Delta(id=1, ids=[7], text=tokenizer.decode([7])),
        Delta(id=1, sample=1, ids=[8], text=tokenizer.decode([8])),
        Delta(id=2, ids=[9, 10], text=tokenizer.decode([9, 10])),
    ]
    assert other.expect(Delta).ids == [3]
    frontend.scheduler.send_tokens(third, [11])
    assert asks.expect(Delta).seq == 2, "one alone is a delta"
    send_step(frontend, {first: [12], second: [13], third: [14]}, finish="length")
    ends = asks.expect(Deltas).items
    assert [(item.id, item.sample, item.seq) for item in ends] == [(1, 0, 1), (1, 1, 1), (2, 0, 3)]
    assert {item.finish for item in ends} == {"length"}
    assert {asks.expect(Done).id for _ in range(2)} == {1, 2}


def test_a_samples_first_delta_says_what_of_its_prompt_was_cached(frontend: Frontend) -> None:
    client = frontend.welcome()
    request = open_request(frontend, client)
    for token_id in (7, 8):
        frontend.scheduler.send(Outputs((TokenOutput(request, (token_id,), None, 0.0, cached_tokens=2),)))
        assert client.expect(Delta).cached_tokens == (2 if token_id == 7 else 0)


def test_a_batch_of_a_reader_that_was_behind_has_an_end(frontend: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "BATCH_TOKENS", 4)
    client = frontend.connect()
    client.send(Hello(batches=True))
    client.expect(Welcome)
    requests = [open_request(frontend, client, Generate(id=number, prompt_ids=[5])) for number in range(4)]
    send_step(frontend, {request: [7, 8] for request in requests})
    for _ in range(2):
        assert [len(item.ids) for item in client.expect(Deltas).items] == [2, 2]


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


def test_samples_count_and_not_requests(make_frontend: MakeFrontend) -> None:
    """A request of n samples is n requests to the scheduler: it takes as much of its client's share and turn."""
    frontend = make_frontend(max_unstarted=4, open_requests=8)
    greedy, modest = frontend.welcome(), frontend.welcome()
    for number in (0, 1):
        greedy.send(Generate(id=number, prompt_ids=[100 + number], sampling=Sampling(n=3)))
        greedy.expect(Accepted)
    submits = [frontend.scheduler.expect(Submit) for _ in range(3)]
    greedy.send(Generate(id=2, prompt_ids=[1], sampling=Sampling(n=3)))
    error = greedy.expect(Error)
    assert (error.code, error.id, error.retryable) == ("overloaded", 2, True)
    greedy.send(Generate(id=2, prompt_ids=[1], sampling=Sampling(n=9)))
    error = greedy.expect(Error)
    assert (error.code, error.id, error.retryable) == ("bad_request", 2, False)
    frontend.scheduler.send_tokens(submits[0].request_id, [1])
    greedy.expect(Delta)
    assert frontend.scheduler._channel.receive(0.1) is None, "two of the first and three of the second are too many"
    open_request(frontend, modest, Generate(id=0, prompt_ids=[200]))
    frontend.scheduler.send_tokens(submits[1].request_id, [1])
    assert [unpack_int32(frontend.scheduler.expect(Submit).prompt_token_ids)[0] for _ in range(3)] == [101] * 3


@pytest.mark.parametrize("has_keys", [True, False])
def test_who_comes_by_the_private_address_acts_for_tenants(
    make_frontend: MakeFrontend, tmp_path: Path, has_keys: bool
) -> None:
    """Each has the share and the turns of a client. Elsewhere nobody may, and without a key nobody is let in."""
    private = f"ipc://{tmp_path / 'private'}"
    if has_keys:
        Keys(tmp_path / "keys").make(None)
    frontend = make_frontend(
        open_requests=1, max_unstarted=1, private=private, keys=str(tmp_path / "keys") if has_keys else None
    )
    gateway = frontend.connect(address=private)
    gateway.send(Hello())
    welcome = gateway.expect(Welcome)
    assert "tenants" in welcome.features
    assert welcome.limits.open_requests > 1000
    for number, tenant in enumerate(("ann", "bob", "ann")):
        gateway.send(Generate(id=number, prompt_ids=[5], tenant=tenant, sampling=Sampling(cache_salt="s")))
    answers = [gateway.receive() for _ in range(3)]
    (error,) = (answer for answer in answers if isinstance(answer, Error))
    assert (error.id, error.code) == (2, "overloaded"), "of Ann's one request one is open"
    submits = [frontend.scheduler.expect(Submit) for _ in range(2)]
    assert [submit.tenant for submit in submits] == ["tenant ann", "tenant bob"]
    assert submits[0].cache_salt == submits[1].cache_salt, "tenants are kept apart by salts of the gateway's own"
    if has_keys:
        assert frontend.connect().receive(0.1) is None
        return
    other = frontend.connect()
    other.send(Hello())
    assert "tenants" not in other.expect(Welcome).features
    other.send(Generate(id=1, prompt_ids=[5], tenant="ann"))
    assert other.expect(Error).code == "forbidden"


def test_a_held_request_ends_at_its_deadline(make_frontend: MakeFrontend) -> None:
    frontend = make_frontend(max_unstarted=1)
    client = frontend.welcome()
    open_request(frontend, client)
    client.send(Generate(id=2, prompt_ids=[1], sampling=Sampling(deadline_ms=200.0)))
    client.expect(Accepted)
    error = client.expect(Error)
    assert (error.code, error.id) == ("deadline", 2)


def test_an_engine_that_is_started_again_costs_the_open_requests_and_no_session(frontend: Frontend) -> None:
    client = frontend.welcome()
    open_request(frontend, client)
    frontend.supervisor.send(EngineLost("the engine ended", restarts=True))
    error = client.expect(Error)
    assert (error.code, error.id, error.retryable) == ("engine_lost", 1, True)
    assert frontend.scheduler.expect(Attach), "what still waits for the old engine is void"
    client.send(HealthRequest())
    assert not client.expect(Health).ready, "at once, without asking anybody"
    client.send(msgspec.structs.replace(IDS, id=2))
    refused = client.expect(Error)
    assert (refused.code, refused.id, refused.retryable) == ("engine_lost", 2, True)
    assert refused.retry_after_ms
    frontend.scheduler.send(Outputs(()))  # of the old one, late
    frontend.scheduler.send(READY)
    while not isinstance(frontend.supervisor.receive(5), EngineServes):
        pass
    client.send(msgspec.structs.replace(IDS, id=3, sampling=Sampling(max_tokens=8)))
    assert client.expect(Accepted).id == 3
    submit = frontend.scheduler.expect(Submit)
    frontend.scheduler.send_tokens(submit.request_id, [3])
    assert client.expect(Delta).id == 3
