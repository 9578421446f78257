"""A server and the requests of its clients: conversations, samples, cancelling, and whose id is whose."""

import struct
import time

import msgspec

from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.engine_messages import Cancel as SchedulerCancel
from graphgen.ipc.engine_messages import Outputs, Submit, TokenOutput
from graphgen.ipc.ggp.messages import Accepted, Cancel, ChatMessage, Delta, Done, Error, Generate, Ping, Pong, Sampling
from graphgen.requests.tokenizer import Tokenizer
from tests.frontend.harness import IDS, Frontend, open_request


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


def test_a_samples_first_delta_says_what_of_its_prompt_was_cached(frontend: Frontend) -> None:
    client = frontend.welcome()
    request = open_request(frontend, client)
    for token_id in (7, 8):
        frontend.scheduler.send(Outputs((TokenOutput(request, (token_id,), None, 0.0, cached_tokens=2),)))
        assert client.expect(Delta).cached_tokens == (2 if token_id == 7 else 0)


def test_a_ping_is_answered_on_both_sockets(frontend: Frontend) -> None:
    for client in (frontend.welcome(), frontend.connect(control=True)):
        client.send(Ping(t=77))
        assert client.expect(Pong).t == 77


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
