"""Anthropic's Messages API: what of a conversation reaches the model, and in which order events come."""

from typing import Any

import pytest
from msgspec.structs import replace

from graphgen import Chat, NumericalError, OverloadedError, SamplingParams
from graphgen.ipc.ggp.messages import Welcome
from tests.gateway.asgi import GatewayCore, call, fails, piece, says

PATH = "/v1/messages"
HI: dict[str, Any] = {"model": "fake", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
STREAM = {**HI, "stream": True}
CLAUDE_CODE: dict[str, Any] = {
    **HI,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=1234"},
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "How cold?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                {"type": "redacted_thinking", "data": "gAAA"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "look", "input": {"where": "out"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "-3"}]},
                {"type": "text", "text": "So?"},
            ],
        },
        {"role": "system", "content": "Mind the gap."},
    ],
    "metadata": {"user_id": "u"},
    "thinking": {"type": "disabled"},
    "output_config": {"effort": "low"},
}


class EosCore(GatewayCore):
    """Token 7 is the model's end of sequence."""

    welcome: Welcome = replace(GatewayCore.welcome, eos_token_ids=[7])


def test_blocks_become_a_chat_and_the_header_that_changes_is_left_out() -> None:
    core = GatewayCore(says("x"))
    assert call(core, PATH, CLAUDE_CODE).status == 200
    (chat,) = core.prompts
    assert isinstance(chat, Chat)
    look = {"id": "t1", "type": "function", "function": {"name": "look", "arguments": {"where": "out"}}}
    assert list(chat.messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How cold?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [look], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "t1", "content": "-3"},
        {"role": "user", "content": "So?"},
        {"role": "system", "content": "Mind the gap."},
    ]
    assert chat.chat_template_kwargs == {"enable_thinking": False, "reasoning_effort": "low"}
    assert core.sampling == SamplingParams(max_tokens=9)


def test_a_message_says_what_was_said_and_counts_cached_tokens_apart() -> None:
    core = GatewayCore(says("Good ", "morrow"))
    asked = {"temperature": 0.5, "top_p": 0.9, "top_k": 4, "stop_sequences": ["X"], "seed": 3, "priority": 2}
    message = call(core, PATH, {**HI, **asked}).json
    stops = asked.pop("stop_sequences")
    assert core.sampling == SamplingParams(max_tokens=9, stop=stops, **asked)  # type: ignore[arg-type]  # of any field
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "fake")
    assert message["content"] == [{"type": "text", "text": "Good morrow", "citations": None}]
    assert message["stop_reason"] == "max_tokens"
    assert message["usage"] == {
        "input_tokens": 3,
        "cache_read_input_tokens": 2,
        "cache_creation_input_tokens": 0,
        "output_tokens": 2,
    }


def test_events_of_a_message_come_in_anthropics_order() -> None:
    reply = call(GatewayCore(says("a", "b")), PATH, STREAM)
    kinds = [event["type"] for event in reply.events]
    assert list(dict.fromkeys(kinds)) == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    names = [line.removeprefix("event: ") for line in reply.body.decode().splitlines() if line.startswith("event")]
    assert names == kinds
    assert "".join(event["delta"]["text"] for event in reply.events if event["type"] == "content_block_delta") == "ab"
    first, last = reply.events[0]["message"], reply.events[-2]
    assert (first["content"], first["stop_reason"], first["usage"]["input_tokens"]) == ([], None, 3)
    assert last["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert last["usage"]["output_tokens"] == 2


@pytest.mark.parametrize(
    ("stops", "token_ids", "reason", "stop"),
    [
        (["X"], (65, 7), "end_turn", None),
        (["X"], (65, 88), "stop_sequence", "X"),
        (["Y", "X", "Z"], (65, 88), "stop_sequence", "X"),
        (["X", "ABX"], (65, 66, 88), "stop_sequence", "ABX"),
        ([], (65, 88), "end_turn", None),
    ],
)
def test_a_message_says_by_which_stop_sequence_it_ended(
    stops: list[str], token_ids: tuple[int, ...], reason: str, stop: str | None
) -> None:
    core = EosCore(lambda sinks, _: sinks[0](piece("A", "stop", token_ids=token_ids)))
    message = call(core, PATH, {**HI, "stop_sequences": stops}).json
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, stop)


def test_tokens_of_a_message_are_counted_without_an_answer() -> None:
    core = GatewayCore(says("x"))
    assert call(core, f"{PATH}/count_tokens", {**HI, "system": "Be."}).json == {"input_tokens": 6}
    assert not core.prompts


def test_errors_have_anthropics_form() -> None:
    late = call(GatewayCore(fails(NumericalError("NaN"), after=["a"])), PATH, STREAM)
    assert late.events[-1] == {"type": "error", "error": {"type": "api_error", "message": "NaN"}}
    reply = call(GatewayCore(fails(OverloadedError("full", 2.0))), PATH, HI)
    assert (reply.status, reply.json) == (
        429,
        {"type": "error", "error": {"type": "rate_limit_error", "message": "full"}},
    )
    assert reply.headers["retry-after"] == "2"
    reply = call(GatewayCore(says("x")), PATH, {**HI, "model": "other"})
    assert (reply.status, reply.error["type"]) == (404, "not_found_error")


IMAGE = {"type": "image", "source": {"type": "base64", "data": "x"}}


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": None},
        {"messages": []},
        {"messages": [{"role": "user", "content": [IMAGE]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}]}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"system": [IMAGE]},
        {"tools": [{"name": "f"}], "tool_choice": {"type": "some"}},
        {"stop_sequences": [""]},
    ],
)
def test_what_cannot_be_served_is_refused(wrong: dict[str, Any]) -> None:
    core = GatewayCore(says("x"))
    reply = call(core, PATH, {**HI, **wrong})
    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")
    assert not core.prompts


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tools": [{"name": "f"}], "tool_choice": {"type": "tool"}}, 'give {"type": "tool", "name": ...}'),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format is {'type': 'json_schema'}: "),
        ({"output_config": {"format": {"type": "xml", "schema": {}}}}, 'give {"type": "json_schema", "schema": {...}}'),
        ({"output_config": {"format": {"type": "json_schema", "schema": 5}}}, "output_config.format: json is 5"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences has 17 strings"),
    ],
)
def test_a_refusal_speaks_of_the_fields_of_a_message(wrong: dict[str, Any], said: str) -> None:
    reply = call(GatewayCore(says("x")), PATH, {**HI, **wrong})
    assert (reply.status, said in reply.error["message"]) == (400, True), reply.error


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", PATH, "invalid_request_error"),
        ("GET", f"{PATH}/count_tokens", "invalid_request_error"),
        ("POST", f"{PATH}/batches", "not_found_error"),
    ],
)
def test_what_is_no_endpoint_below_messages_has_anthropics_form(method: str, path: str, kind: str) -> None:
    reply = call(GatewayCore(says("x")), path, method=method)
    assert (reply.json["type"], reply.error["type"]) == ("error", kind)
