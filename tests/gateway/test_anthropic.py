"""Anthropic's own Python client, unchanged, against `graphgen serve --http`."""

import time
from typing import Any

import anthropic
import pytest

from graphgen import Client, SamplingParams
from tests.serving import ServerProcess

HELLO: Any = [{"role": "user", "content": "Good morrow"}]
GREEDY: Any = {"temperature": 0}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=30.0)


def test_a_message_is_that_of_a_chat_streamed_or_not(client: anthropic.Anthropic, ours: Client) -> None:
    (want,) = ours.chat(HELLO, SamplingParams(max_tokens=24, temperature=0.0))
    asked: Any = {"model": "play", "messages": HELLO, "max_tokens": 24, "extra_body": GREEDY}
    got = client.messages.create(**asked)
    (block,) = got.content
    assert (block.type, block.text if block.type == "text" else "", got.stop_reason) == (
        "text",
        want.text,
        "max_tokens",
    )
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == want.text
        last = stream.get_final_message()
    assert last.usage.input_tokens + (last.usage.cache_read_input_tokens or 0) == len(want.prompt_token_ids)
    assert last.usage.output_tokens == 24
    counted = client.messages.count_tokens(model="play", messages=HELLO)
    assert counted.input_tokens == len(want.prompt_token_ids)


def test_the_stop_sequence_that_ended_a_message_is_told(client: anthropic.Anthropic, ours: Client) -> None:
    (want,) = ours.chat(HELLO, SamplingParams(max_tokens=24, temperature=0.0))
    stops = ["no such text", want.text[6:10], "nor this"]
    asked: Any = {"model": "play", "messages": HELLO, "max_tokens": 24, "extra_body": GREEDY}
    got = client.messages.create(stop_sequences=stops, **asked)
    assert (got.stop_reason, got.stop_sequence) == ("stop_sequence", stops[1])


def test_errors_are_those_of_the_package(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(model="play", messages=HELLO, max_tokens=4, extra_body={"temperature": -1})
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.create(model="claude", messages=HELLO, max_tokens=4)
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        client.messages.create(model="play", messages=[{"role": "user", "content": "ah " * 1500}], max_tokens=4)


def test_a_client_that_leaves_a_stream_ends_its_request(client: anthropic.Anthropic, ours: Client) -> None:
    asked: Any = {"model": "play", "messages": HELLO, "max_tokens": 600, "extra_body": {"ignore_eos": True}}
    with client.messages.stream(**asked) as stream:
        next(iter(stream.text_stream))
        assert ours.stats().open_requests == 1
    deadline_s = time.monotonic() + 5
    while ours.stats().open_requests and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert ours.stats().open_requests == 0
