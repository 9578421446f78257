"""What a step gives to several requests of a client comes in one message, to who asked for that."""

import pytest

from graphgen.ipc.engine_messages import FinishReason, Outputs, Submit, TokenOutput
from graphgen.ipc.ggp.messages import Accepted, Delta, Deltas, Done, Generate, Hello, Sampling, Welcome
from graphgen.requests.tokenizer import Tokenizer
from graphgen.server.frontend import outbox
from tests.frontend.harness import Frontend, open_request


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


def test_a_batch_of_a_reader_that_was_behind_has_an_end(frontend: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "BATCH_TOKENS", 4)
    client = frontend.connect()
    client.send(Hello(batches=True))
    client.expect(Welcome)
    requests = [open_request(frontend, client, Generate(id=number, prompt_ids=[5])) for number in range(4)]
    send_step(frontend, {request: [7, 8] for request in requests})
    for _ in range(2):
        assert [len(item.ids) for item in client.expect(Deltas).items] == [2, 2]
