"""A client's share of a server, and whose turn it is, over the real sockets."""

from pathlib import Path

import pytest

from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.engine_messages import Cancel as SchedulerCancel
from graphgen.ipc.engine_messages import Submit
from graphgen.ipc.ggp.messages import Accepted, Cancel, Delta, Done, Error, Generate, Hello, Sampling, Welcome
from graphgen.server.frontend.keys import Keys
from tests.frontend.conftest import MakeFrontend
from tests.frontend.harness import open_request


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
