"""Text and chats at a server: what a template or a tokenizer that cannot be used costs, and what ends an output."""

from typing import Any

import pytest

from graphgen.ipc.engine_messages import Submit
from graphgen.ipc.ggp.messages import Accepted, ChatMessage, Error, Generate, Hello, Sampling, Welcome
from graphgen.requests.chat_template import ChatSource
from graphgen.requests.tokenizer import Tokenizer, TokenizerData
from tests.frontend.conftest import MakeFrontend
from tests.frontend.harness import demo_tokenizer

CHAT = [ChatMessage(role="user", content="hi")]


def test_a_template_that_does_not_parse_costs_chat_and_not_the_server(make_frontend: MakeFrontend) -> None:
    frontend = make_frontend(tokenizer=demo_tokenizer("{% nonsense %}"))
    client = frontend.connect()
    client.send(Hello(client="test"))
    features = client.expect(Welcome).features
    assert "text" in features
    assert "chat" not in features
    client.send(Generate(id=1, messages=CHAT))
    error = client.expect(Error)
    assert error.code == "bad_request"
    assert "the chat template (a test) cannot be read" in error.message
    assert "role" not in error.message
    client.send(Generate(id=2, text="hi"))
    client.expect(Accepted)


def test_a_template_without_fault_is_a_feature(make_frontend: MakeFrontend) -> None:
    client = make_frontend().connect()
    client.send(Hello(client="test"))
    assert {"text", "chat"} <= set(client.expect(Welcome).features)


TOOL_TEMPLATE = (
    "{{ tools|tojson }}{% for m in messages %}{{ m.role }}:{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.arguments.a }}{% endfor %}{% endfor %}{{ documents }}{{ enable_thinking }}"
)


def test_what_a_client_gives_a_template_reaches_it(make_frontend: MakeFrontend) -> None:
    tokenizer = demo_tokenizer(TOOL_TEMPLATE)
    client = make_frontend(tokenizer=tokenizer).connect()
    client.send(Hello(client="test"))
    assert "template_arguments" in client.expect(Welcome).features
    call = {"function": {"name": "add", "arguments": '{"a": 7}'}}
    messages = [*CHAT, ChatMessage(role="assistant", content="", tool_calls=[call])]
    arguments: dict[str, Any] = {
        "tools": [{"type": "function", "n": 1}],
        "documents": [{"title": "t"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    client.send(Generate(id=1, messages=messages, echo_ids=True, **arguments))
    ids = client.expect(Accepted).prompt_ids
    assert ids is not None
    text = '[{"type": "function", "n": 1}]user:hiassistant:7[{\'title\': \'t\'}]False'
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer.encode(text)


def test_the_end_of_a_rendered_chat_comes_back_where_it_is_asked_for(make_frontend: MakeFrontend) -> None:
    client = make_frontend(tokenizer=demo_tokenizer("{{ messages[0].content }}é<think>")).connect()
    client.send(Hello(client="test"))
    assert "marks" in client.expect(Welcome).features
    for request_id, tail_len, tail in ((1, 0, ""), (2, 8, "é<think>"), (3, 4096, "hié<think>")):
        client.send(Generate(id=request_id, messages=CHAT, tail_len=tail_len))
        assert client.expect(Accepted).tail == tail


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"text": "hi", "tools": [{}]}, "bad_request"),
        ({"prompt_ids": [1], "chat_template_kwargs": {}}, "bad_request"),
        ({"messages": CHAT, "chat_template_kwargs": {"messages": "x"}}, "bad_request"),
        ({"messages": [ChatMessage(role="a", content="", tool_calls=[{"function": 3}])]}, "bad_request"),
        ({"messages": CHAT, "tools": [{"x": "y" * 70_000}]}, "too_large"),
        ({"messages": CHAT, "tools": [{"x": "y " * 20_000}]}, "never_fits"),
    ],
)
def test_what_no_template_may_get_is_refused(make_frontend: MakeFrontend, wrong: dict[str, Any], code: str) -> None:
    client = make_frontend(tokenizer=demo_tokenizer(TOOL_TEMPLATE)).welcome()
    client.send(Generate(id=1, **wrong))
    assert client.expect(Error).code == code


@pytest.mark.parametrize("prompt", [Generate(id=1, text="hi"), Generate(id=1, messages=CHAT)])
def test_without_a_tokenizer_ids_are_served_and_text_is_refused(make_frontend: MakeFrontend, prompt: Generate) -> None:
    client = make_frontend(tokenizer=None).connect()
    client.send(Hello(client="test"))
    assert not {"text", "chat"} & set(client.expect(Welcome).features)
    client.send(prompt)
    error = client.expect(Error)
    assert error.code == "bad_request"
    assert "give token ids" in error.message
    client.send(Generate(id=2, prompt_ids=[5, 6, 7]))
    client.expect(Accepted)


def other_eos(tokenizer: Tokenizer) -> Tokenizer:
    """One whose own end of sequence is not the model's."""
    return Tokenizer.of(TokenizerData(tokenizer.data.backend, {"eos_token": "the"}, ChatSource("x", "a test")))


def test_the_tokenizers_own_end_of_sequence_ends_a_chat_as_well(
    make_frontend: MakeFrontend, tokenizer: Tokenizer
) -> None:
    other = other_eos(tokenizer)
    frontend = make_frontend(tokenizer=other)
    client = frontend.connect()
    client.send(Hello(client="test"))
    both = client.expect(Welcome).eos_token_ids
    assert other.eos_token_id is not None
    assert both == [tokenizer.special_token_id("<|endoftext|>"), other.eos_token_id]
    client.send(Generate(id=1, messages=CHAT))
    assert list(frontend.scheduler.expect(Submit).stop_token_ids) == both
    client.send(Generate(id=2, messages=CHAT, sampling=Sampling(ignore_eos=True)))
    assert not frontend.scheduler.expect(Submit).stop_token_ids


def test_a_stop_string_that_is_a_special_token_works_as_its_id(
    make_frontend: MakeFrontend, tokenizer: Tokenizer
) -> None:
    frontend = make_frontend()
    client = frontend.welcome()
    stops = ["<|endoftext|>", "the", "no <|endoftext|>"]
    client.send(Generate(id=1, text="hi", sampling=Sampling(stop=stops, ignore_eos=True)))
    assert list(frontend.scheduler.expect(Submit).stop_token_ids) == [tokenizer.special_token_id("<|endoftext|>")]
