"""What a client may make the frontend keep or do for it is bounded, whatever it sends and does not read."""

import itertools
import time
from collections.abc import Sequence

import pytest

from graphgen.ipc.ggp.messages import Accepted, Cancel, Error, Generate, Hello, Ping, Pong, Sampling
from graphgen.requests.tokenizer import Tokenizer
from graphgen.server.frontend import prepare
from graphgen.server.frontend.sockets import Sent
from graphgen.server.frontend.turns import RateLimit
from tests.frontend.conftest import MakeFrontend
from tests.frontend.harness import Frontend, RawClient, wait_until


def test_a_text_that_cannot_fit_is_refused_without_its_tokens(
    frontend: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token takes 200 bytes while it is made: the whole text at once would cost what 64 contexts do."""
    longest = [0]
    encode = Tokenizer.encode_batch

    def counted(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        longest[0] = max(longest[0], *map(len, texts))
        return encode(tokenizer, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", counted)
    client = frontend.welcome()
    client.send(Generate(id=1, text="qzxj" * 16_000))
    error = client.expect(Error)
    assert (error.code, error.id) == ("never_fits", 1)
    assert "more than 1024 tokens, max_model_len is 1024" in error.message
    client.send(Generate(id=3, text="qzxj" * 16_000, prompt_only=True))
    assert "more than 4096 tokens, at most 4096 are told of one" in client.expect(Error).message
    assert longest[0] <= prepare.PIECE_LEN
    monkeypatch.setattr(prepare, "USUAL_BYTES_PER_TOKEN", 0)
    client.send(Generate(id=2, text=" the" * 400, sampling=Sampling(max_tokens=1)))
    assert client.expect(Accepted).prompt_tokens <= 400


def test_ends_that_nobody_reads_are_bounded(make_frontend: MakeFrontend, monkeypatch: pytest.MonkeyPatch) -> None:
    frontend = make_frontend(open_requests=4)
    client = frontend.welcome()
    session = frontend.server._sessions.all()[0]
    with monkeypatch.context() as patch:
        patch.setattr(frontend.sockets.data, "send", lambda *_: Sent.BLOCKED)
        for number in range(20):
            client.send(Generate(id=number, prompt_ids=[1]))
            client.send(Cancel(id=number))
        assert wait_until(lambda: frontend.server._monitor.messages_refused >= 12)
        assert len(session.requests) == 8
    refused = []
    while (message := client.receive(2.0)) is not None:
        refused += [message.code] if isinstance(message, Error) else []
    assert refused == ["overloaded"] * 12
    assert not session.requests


def flood_with(client: RawClient, message: Hello | Ping) -> None:
    """Returns when all were taken."""
    for _ in range(400):
        client.send(message)
    client.send(Ping(t=9))
    while not isinstance(answer := client.receive(), Pong) or answer.t != 9:
        assert answer is not None


def test_a_flood_of_hellos_is_taken_slower_than_other_messages(frontend: Frontend) -> None:
    client = frontend.welcome()
    frontend.server._rate.permits(time.monotonic())
    frontend.server._rate.spend(1000)  # no burst
    begun_s = time.monotonic()
    flood_with(client, Hello())
    assert time.monotonic() - begun_s > 0.9
    permits = [10_000.0]
    frontend.server._rate = RateLimit(0.0, 10_000, time.monotonic())  # it does not fill
    for message in (Ping(), Hello()):
        flood_with(client, message)
        permits.append(frontend.server._rate.permits(time.monotonic()))
    pings, hellos = (before - after for before, after in itertools.pairwise(permits))
    assert hellos > 6 * pings
