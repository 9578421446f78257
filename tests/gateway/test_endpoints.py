"""What the endpoints say to a client of OpenAI's API, over a connection that a test answers."""

import asyncio
import gzip
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest

from graphgen import (
    Chat,
    ConnectionLostError,
    DeadlineError,
    EngineDeadError,
    InvalidRequestError,
    NumericalError,
    OverloadedError,
    PoisonedRequestError,
    PromptTooLongError,
    SamplingParams,
    ServerError,
)
from graphgen.calls.outputs import Sink, StreamPiece
from graphgen.gateway import outputs
from graphgen.ipc.ggp.messages import Health
from tests.gateway.asgi import GatewayCore, acall, call, fails, piece, says

CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
ROMEO: dict[str, Any] = {"model": "fake", "prompt": "ROMEO:"}
NESTED = json.loads("[" * 30 + "]" * 30)
USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 2,
    "total_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 2},
}


def test_a_chat_has_a_message_its_end_and_its_counts() -> None:
    core = GatewayCore(says("Good ", "morrow"))
    reply = call(core, CHATS, HELLO)
    assert reply.status == 200
    assert reply.json["object"] == "chat.completion"
    assert reply.json["id"].startswith("chatcmpl-")
    assert reply.json["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Good morrow", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    assert reply.json["usage"] == USAGE
    assert core.prompts == [Chat([{"role": "user", "content": "Hi"}])]
    assert core.tenants == ["192.0.2.7"]
    assert not core.cancelled


def test_a_stream_of_a_chat_begins_with_the_role_and_has_one_end() -> None:
    reply = call(GatewayCore(says("Good ", "morrow")), CHATS, {**HELLO, "stream": True})
    assert (reply.headers["content-type"], reply.headers["cache-control"]) == (
        "text/event-stream; charset=utf-8",
        "no-cache",
    )
    *chunks, done = reply.events
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "Good morrow"
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize(("path", "body"), [(CHATS, HELLO), (COMPLETIONS, ROMEO)])
@pytest.mark.parametrize("always", [False, True])
def test_counts_of_a_stream_come_at_its_end_where_they_are_asked_for(path: str, body: Any, always: bool) -> None:
    options = {"include_usage": True, "continuous_usage_stats": always}
    reply = call(GatewayCore(says("a", "b")), path, {**body, "stream": True, "stream_options": options})
    *chunks, last, done = reply.events
    assert (last["choices"], last["usage"], done) == ([], USAGE, "[DONE]")
    counts = [None if chunk["usage"] is None else chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert all((count is not None) == always for count in counts)


def test_outputs_of_several_prompts_are_numbered_by_prompt_and_sample() -> None:
    body = {**ROMEO, "prompt": ["a", "b"], "n": 2, "max_tokens": 3}
    reply = call(GatewayCore(says("x", "y")), COMPLETIONS, body)
    assert [(choice["index"], choice["text"]) for choice in reply.json["choices"]] == [(i, "xy") for i in range(4)]
    assert reply.json["usage"]["prompt_tokens"] == 10
    streamed = call(GatewayCore(says("x", "y")), COMPLETIONS, {**body, "stream": True})
    texts = {index: "" for index in range(4)}
    for chunk in streamed.events[:-1]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {index: "xy" for index in range(4)}


def test_cached_tokens_are_those_of_the_sample_that_computed_the_prompt() -> None:
    """The other samples of a prompt find all of it in the cache: that is no saving."""

    def answer(sinks: Sequence[Sink], _: int) -> None:
        for sink, cached in zip(sinks, (2, 0), strict=True):
            sink(StreamPiece("a", (1,), "stop", cached_tokens=cached, sample_index=0, prompt_tokens=5))
            sink(StreamPiece("b", (1,), "stop", cached_tokens=4, sample_index=1, prompt_tokens=5))

    reply = call(GatewayCore(answer), COMPLETIONS, {**ROMEO, "prompt": ["a", "b"], "n": 2})
    assert reply.json["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_before_each_output(stream: bool) -> None:
    body = {**ROMEO, "prompt": [[72, 105], [33]], "n": 2, "echo": True, "stream": stream}
    reply = call(GatewayCore(says("x", "y")), COMPLETIONS, body)
    texts = [""] * 4
    for chunk in reply.events[:-1] if stream else [reply.json]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["Hixy", "Hixy", "!xy", "!xy"]
    reply = call(GatewayCore(says("x", "y")), COMPLETIONS, {**ROMEO, "echo": True})
    assert reply.json["choices"][0]["text"] == "ROMEO:xy"


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_alone_is_told_without_computing_anything(stream: bool) -> None:
    core = GatewayCore(says("x"))
    body = {**ROMEO, "prompt": [[72, 105], [33]], "n": 2, "echo": True, "max_tokens": 0, "stream": stream}
    reply = call(core, COMPLETIONS, {**body, "stream_options": {"include_usage": True}})
    chunks = reply.events[:-1] if stream else [reply.json]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    texts = {choice["index"]: "" for choice in choices}
    for choice in choices:
        texts[choice["index"]] += choice["text"]
    assert texts == {0: "Hi", 1: "Hi", 2: "!", 3: "!"}
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"] * 4
    assert (chunks[-1]["usage"]["prompt_tokens"], chunks[-1]["usage"]["completion_tokens"]) == (3, 0)
    assert core.sampling is None, "no request was made"
    text = call(core, COMPLETIONS, {**ROMEO, "echo": True, "max_tokens": 0}).json
    assert (text["choices"][0]["text"], text["usage"]["prompt_tokens"]) == ("ROMEO:", 7)


def test_a_piece_without_text_is_no_event() -> None:
    """Some tokens have text only with the next one."""

    def slowly(sinks: Sequence[Sink], _: int) -> None:
        for number, (text, finish) in enumerate((("", None), ("a", None), ("", None), ("b", "stop"))):
            asyncio.get_running_loop().call_later(0.02 * number, sinks[0], piece(text, finish))

    reply = call(GatewayCore(slowly), COMPLETIONS, {**ROMEO, "stream": True})
    texts = [chunk["choices"][0]["text"] for chunk in reply.events[:-1]]
    assert ("" in texts, "".join(texts)) == (False, "ab")


@pytest.mark.parametrize("prompt", ["text", [1, 2, 3], ["a", "b"], [[1], [2]]])
def test_prompts_of_completions_have_four_forms(prompt: Any) -> None:
    core = GatewayCore(says("x"))
    assert call(core, COMPLETIONS, {**ROMEO, "prompt": prompt}).status == 200
    assert core.prompts == (prompt if isinstance(prompt[0], (list, str)) and prompt != "text" else [prompt])


@pytest.mark.parametrize("wrong", [-1, 2**31, 2**70, 1.0, True, None, "x" * 200, {}, [], 10**200])
def test_what_is_no_token_id_is_refused_with_its_place_and_the_range(wrong: Any) -> None:
    for path, body, place in (
        (COMPLETIONS, {"prompt": [0, wrong]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": ["a", [0, 2**31 - 1, wrong]]}, "prompt[1][2]"),
        ("/detokenize", {"tokens": [wrong]}, "tokens[0]"),
    ):
        core = GatewayCore(says("x"))
        reply = call(core, path, json.dumps(body).encode())
        assert (reply.status, reply.error["param"]) == (400, place.partition("[")[0])
        assert reply.error["message"] == f"{place} is {wrong!r:.100}: token ids are whole numbers from 0 to 2147483647"
        assert not core.prompts


def test_fields_reach_the_sampling_and_null_is_absent() -> None:
    core = GatewayCore(says("x"))
    given: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.1,
        "seed": 7,
        "n": 2,
        "stop": ["\n", "X"],
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [9],
        "skip_special_tokens": False,
        "priority": 3,
        "cache_salt": "s",
        "deadline_ms": 1000.0,
    }
    ignored = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "verbosity": "low", "new": 1}
    assert call(core, CHATS, {**HELLO, **given, **ignored, "max_completion_tokens": 11, "max_tokens": 5}).status == 200
    assert core.sampling == SamplingParams(max_tokens=11, **given)
    assert call(core, COMPLETIONS, {**ROMEO, "logit_bias": {"5": -100, "07": 2.5}}).status == 200
    assert core.sampling == SamplingParams(max_tokens=16, logit_bias={5: -100.0, 7: 2.5})
    nothing = dict.fromkeys([*given, "logit_bias", "max_tokens", "stream", "stream_options", "tools", "logprobs"])
    assert call(core, CHATS, {**HELLO, **nothing}).status == 200
    assert core.sampling == SamplingParams(max_tokens=None)
    assert call(core, COMPLETIONS, ROMEO).status == 200
    assert core.sampling == SamplingParams(max_tokens=16)


def test_messages_that_a_program_sends_back_are_taken_as_they_came() -> None:
    core = GatewayCore(says("x"))
    answer = {
        "role": "assistant",
        "content": None,
        "reasoning": "Hm.",
        "refusal": None,
        "annotations": [],
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
    }
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {
        **HELLO,
        "messages": [{"role": "user", "content": parts}, answer, {"role": "user", "content": "x", "tool_calls": []}],
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "low",
        "documents": [{"title": "t"}],
    }
    assert call(core, CHATS, body).status == 200
    (chat,) = core.prompts
    assert isinstance(chat, Chat)
    assert chat.messages[0] == {"role": "user", "content": "a\nb"}
    assert chat.messages[1]["reasoning_content"] == "Hm."
    assert chat.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert chat.messages[2] == {"role": "user", "content": "x"}
    assert chat.chat_template_kwargs == {"enable_thinking": False, "reasoning_effort": "low"}
    assert chat.documents == [{"title": "t"}]


@pytest.mark.parametrize(
    ("path", "wrong", "param"),
    [
        (CHATS, {"temperature": -1}, "temperature"),
        (CHATS, {"temperature": "hot"}, "temperature"),
        (CHATS, {"n": 17}, "n"),
        (CHATS, {"stop": [""]}, "stop"),
        (CHATS, {"stop_token_ids": [-1]}, "stop_token_ids"),
        (CHATS, {"max_tokens": 0}, "max_tokens"),
        (CHATS, {"max_completion_tokens": 0}, "max_completion_tokens"),
        (CHATS, {"min_tokens": 5, "max_tokens": 3}, "min_tokens"),
        (CHATS, {"cache_salt": "x" * 257}, "cache_salt"),
        (CHATS, {"documents": [{"a": NESTED}]}, "documents"),
        (CHATS, {"chat_template_kwargs": {"a": []}}, "chat_template_kwargs"),
        (CHATS, {"messages": []}, "messages"),
        (CHATS, {"messages": "Hi"}, "messages"),
        (CHATS, {"messages": HELLO["messages"] * 1025}, "messages"),
        (CHATS, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        (CHATS, {"messages": [{"content": "x"}]}, "messages"),
        (CHATS, {"top_logprobs": 3}, "top_logprobs"),
        (CHATS, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHATS, {"response_format": {"type": "structural_tag"}}, "response_format"),
        (CHATS, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        (CHATS, {"logit_bias": {"king": 1}}, "logit_bias"),
        (CHATS, {"logit_bias": {"5": 101}}, "logit_bias"),
        (CHATS, {"logit_bias": {"9999999999": 1}}, "logit_bias"),
        (CHATS, {"logit_bias": {"05": 1, "5": 2}}, "logit_bias"),
        (COMPLETIONS, {"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        (CHATS, {"chat_template": "{{ x }}"}, "chat_template"),
        (CHATS, {"echo": True}, "echo"),
        (CHATS, {"functions": [{"name": "f"}]}, "functions"),
        (CHATS, {"modalities": ["text", "audio"]}, "modalities"),
        (CHATS, {"add_generation_prompt": False}, "add_generation_prompt"),
        (CHATS, {"bad_words": ["x"]}, "bad_words"),
        (COMPLETIONS, {"allowed_token_ids": [5]}, "allowed_token_ids"),
        (COMPLETIONS, {"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        (COMPLETIONS, {"use_beam_search": True}, "use_beam_search"),
        (COMPLETIONS, {"prompt": {"a": 1}}, "prompt"),
        (COMPLETIONS, {"prompt": [1.5]}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", 5]}, "prompt"),
        (COMPLETIONS, {"prompt": HELLO["messages"]}, "prompt"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"logprobs": 0, "echo": True, "n": 2, "stream": True}, "n"),
        (COMPLETIONS, {"best_of": 2}, "best_of"),
        (COMPLETIONS, {"suffix": "x"}, "suffix"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_field(path: str, wrong: dict[str, Any], param: str) -> None:
    core = GatewayCore(says("x"))
    reply = call(core, path, {**(HELLO if path == CHATS else ROMEO), **wrong})
    assert (reply.status, reply.error["type"], reply.error["param"]) == (400, "invalid_request_error", param)
    assert "x-should-retry" not in reply.headers
    assert not core.prompts


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"max_completion_tokens": 0}, "max_completion_tokens is 0: "),
        ({"max_completion_tokens": 3, "min_tokens": 5}, "max_completion_tokens is 3: "),
        ({"modalities": ["text", "smell"]}, "modalities: 'smell' cannot be served"),
        ({"model": "x" * 1000}, f"the model '{'x' * 99} does not exist"),
        ({"tools": [{}], "tool_choice": "x" * 1000}, f"tool_choice: '{'x' * 99} is no choice"),
        ({"structured_outputs": {"x" * 1000: 1}}, f"it says {'x' * 100}: give"),
    ],
)
def test_a_refusal_has_the_words_of_the_request_and_few_of_them(body: dict[str, Any], said: str) -> None:
    assert said in call(GatewayCore(says("x")), CHATS, {**HELLO, **body}).error["message"]


def test_a_content_without_parts_is_an_empty_text() -> None:
    core = GatewayCore(says("x"))
    assert call(core, CHATS, {"messages": [{"role": "user", "content": []}]}).status == 200
    assert core.prompts == [Chat([{"role": "user", "content": ""}])]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [(CHATS, HELLO, "messages"), (COMPLETIONS, ROMEO, "prompt"), ("/v1/responses", {"input": "Hi"}, "input")],
)
def test_a_prompt_that_is_too_long_is_told_by_the_name_of_its_field(
    path: str, body: dict[str, Any], param: str, stream: bool
) -> None:
    reply = call(GatewayCore(fails(PromptTooLongError("9 tokens"))), path, {**body, "stream": stream})
    assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "context_length_exceeded", param)


def test_a_prompt_that_is_found_too_long_in_a_stream_is_told_so_too() -> None:
    core = GatewayCore(fails(PromptTooLongError("9 tokens"), after=["a"]))
    body = {**ROMEO, "prompt": ["a", "b"], "stream": True}
    assert call(core, COMPLETIONS, body).events[-1]["error"]["param"] == "prompt"


def test_what_asks_for_nothing_is_no_reason_to_refuse() -> None:
    nothing = {
        "bad_words": [],
        "use_beam_search": False,
        "function_call": "none",
        "modalities": ["text"],
        "echo": False,
    }
    assert call(GatewayCore(says("x")), CHATS, {**HELLO, **nothing, "add_generation_prompt": True}).status == 200
    assert call(GatewayCore(says("x")), COMPLETIONS, {**ROMEO, **nothing}).status == 200


def test_tools_that_no_model_may_call_are_left_out() -> None:
    assert call(GatewayCore(says("x")), CHATS, {**HELLO, "tools": [{"a": 1}], "tool_choice": "none"}).status == 200
    assert (
        call(GatewayCore(says("x")), CHATS, {**HELLO, "response_format": {"type": "text"}, "tools": []}).status == 200
    )


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"", 400, "invalid_json"),
        (b"[]", 400, "invalid_request"),
        (b'{"messages": [{"a": "\xff"}]}', 400, "invalid_json"),
        (b'{"messages": [{"a": ' + b"[" * 100_000, 400, "invalid_json"),
        (b" " * (2 << 20), 413, "too_large"),
    ],
)
def test_a_body_that_is_none_is_refused(body: bytes, status: int, code: str) -> None:
    reply = call(GatewayCore(says("x")), CHATS, body)
    assert (reply.status, reply.error["code"]) == (status, code)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": ["a"] * 7}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 4, "n": 2, "echo": True}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "n": 7}, "n"),
        (CHATS, {"n": 7}, "n"),
    ],
)
def test_more_at_once_than_a_client_may_ever_have_is_refused_before_anything_is_sent(
    path: str, body: dict[str, Any], param: str, stream: bool
) -> None:
    """Clients would repeat a 429, and some would have begun each time."""
    core = GatewayCore(says("x"))
    reply = call(core, path, {**(HELLO if path == CHATS else ROMEO), **body, "stream": stream}, open_requests=6)
    assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "invalid_request", param)
    assert re.search("are [78] requests, a client may have 6 open: .* --open-requests", reply.error["message"])
    assert not core.prompts
    assert not core.tenants


@pytest.mark.parametrize("body", [{"prompt": ["a"] * 3, "n": 2}, {"prompt": ["a"] * 7, "echo": True, "max_tokens": 0}])
def test_as_much_as_a_client_may_have_is_served_and_an_echo_has_nothing_open(body: dict[str, Any]) -> None:
    assert call(GatewayCore(says("x")), COMPLETIONS, {**ROMEO, **body}, open_requests=6).status == 200


def test_no_depth_of_a_body_is_the_servers_fault() -> None:
    """What is read may be too deep to be shown."""
    for depth in range(900, 1000):
        body = b'{"messages": [{"role": "user", "content": %b%b}]}' % (b"[" * depth, b"]" * depth)
        reply = call(GatewayCore(says("x")), CHATS, body)
        assert (reply.status, reply.error["type"]) == (400, "invalid_request_error"), depth


@pytest.mark.parametrize("encoding", ["gzip", "identity"])
def test_a_body_that_is_encoded_is_told_so(encoding: str) -> None:
    zipped = gzip.compress(json.dumps(HELLO).encode())
    reply = call(GatewayCore(says("x")), CHATS, zipped, headers={"content-encoding": encoding})
    assert reply.status == (400 if encoding == "identity" else 415)
    assert ("content-encoding is 'gzip'" in reply.error["message"]) == (encoding == "gzip")


@pytest.mark.parametrize(
    ("error", "status", "code", "headers"),
    [
        (InvalidRequestError("no"), 400, "invalid_request", {}),
        (PromptTooLongError("9 tokens"), 400, "context_length_exceeded", {}),
        (OverloadedError("full", 1.5), 429, "overloaded", {"retry-after": "2", "retry-after-ms": "1500"}),
        (DeadlineError("late"), 408, "deadline", {"x-should-retry": "false"}),
        (PoisonedRequestError("x"), 500, "poisoned", {"x-should-retry": "false"}),
        (NumericalError("x"), 500, "numerical", {"x-should-retry": "false"}),
        (EngineDeadError("x"), 503, "engine_lost", {"retry-after": "1"}),
        (ConnectionLostError("x"), 503, "engine_lost", {"retry-after": "1"}),
        (ServerError("x", "draining", True), 503, "draining", {"retry-after": "1"}),
        (ServerError("x", "duplicate_id", False), 409, "duplicate_id", {"x-should-retry": "false"}),
        (ServerError("x", "of the future", False), 500, "internal", {"x-should-retry": "false"}),
        (RuntimeError("secret"), 500, "internal", {"x-should-retry": "false"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_has_the_status_that_clients_know(
    error: Exception, status: int, code: str, headers: dict[str, str], stream: bool
) -> None:
    """Also of a stream, as long as nothing of it was sent."""
    reply = call(GatewayCore(fails(error)), CHATS, {**HELLO, "stream": stream})
    assert (reply.status, reply.error["code"]) == (status, code)
    assert headers.items() <= reply.headers.items()
    if code == "context_length_exceeded":
        assert "maximum context length is" in reply.error["message"]
    assert "secret" not in reply.error["message"]


def test_an_error_in_a_stream_is_its_last_event() -> None:
    core = GatewayCore(fails(OverloadedError("full", 1.0), after=["a"]))
    reply = call(core, CHATS, {**HELLO, "stream": True})
    assert reply.status == 200
    *_, text, error = reply.events
    assert text["choices"][0]["delta"]["content"] == "a"
    assert (error["error"]["code"], error["error"]["type"]) == ("overloaded", "rate_limit_error")


def test_characters_that_end_a_line_to_some_clients_are_escaped() -> None:
    text = "a\u2028b\u2029c\x85d\ne"
    reply = call(GatewayCore(says(text)), CHATS, {**HELLO, "stream": True})
    texts = [one["choices"][0]["delta"].get("content") for one in reply.events[:-1]]  # by str.splitlines
    assert "".join(one or "" for one in texts) == text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(stream: bool) -> None:
    async def scenario() -> GatewayCore:
        core = GatewayCore(lambda sinks, _: sinks[0](piece("a")))  # and no end
        leaves = asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, leaves.set)
        async with asyncio.timeout(5):
            await acall(core, CHATS, {**HELLO, "stream": stream}, leaves=leaves)
        return core

    assert asyncio.run(scenario()).cancelled == [0]


def test_a_silent_stream_sends_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "TICK_S", 0.02)

    def slowly(sinks: Sequence[Sink], _: int) -> None:
        asyncio.get_running_loop().call_later(0.1, sinks[0], piece("a", "stop"))

    reply = call(GatewayCore(slowly), CHATS, {**HELLO, "stream": True})
    assert reply.body.count(b": keep-alive\n\n") >= 2
    assert reply.events[-2]["choices"][0]["finish_reason"] == "stop"
    whole = call(GatewayCore(slowly), CHATS, HELLO)
    assert whole.json["choices"][0]["message"]["content"] == "a"


def test_models_are_listed_by_the_names_they_are_asked_for() -> None:
    core, names = GatewayCore(says("x")), ("small", "org/small")
    listed = call(core, "/v1/models", method="GET", names=names).json
    assert [model["id"] for model in listed["data"]] == list(names)
    assert listed["data"][0]["max_model_len"] == 100
    assert call(core, "/v1/models/org/small", method="GET", names=names).json["id"] == "org/small"
    assert call(core, CHATS, {**HELLO, "model": "org/small"}, names=names).json["model"] == "org/small"
    assert call(core, CHATS, {"messages": HELLO["messages"]}, names=names).json["model"] == "small"
    for path, body in ((CHATS, HELLO), ("/v1/models/other", None)):
        reply = call(core, path, body, "GET" if body is None else "POST", names=names)
        assert (reply.status, reply.error["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("status", "is_ready", "health", "ready"),
    [("ok", True, 200, 200), ("draining", False, 200, 503), ("stalled", False, 503, 503)],
)
def test_health_is_that_something_lives_and_ready_that_it_takes_requests(
    status: str, is_ready: bool, health: int, ready: int
) -> None:
    core = GatewayCore(says("x"))
    core.status = Health(status=status, ready=is_ready, worker_ms=1.0)
    assert call(core, "/health", method="GET").status == health
    reply = call(core, "/ready", method="GET")
    assert (reply.status, reply.json) == (ready, {"status": status})


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", CHATS, 405), ("POST", "/v1/chat", 404), ("GET", "/v1//models", 404)]
)
def test_what_is_no_endpoint_is_told_in_the_same_form(method: str, path: str, status: int) -> None:
    reply = call(GatewayCore(says("x")), path, method=method)
    assert reply.status == status
    assert path in reply.error["message"]


def test_a_path_that_is_none_is_told_in_part() -> None:
    path = "/" + "x" * 1000
    message = call(GatewayCore(says("x")), path).error["message"]
    assert path[:100] in message
    assert path[:101] not in message
