"""OpenAI's Responses API: what of a conversation reaches the model, and in which order events come."""

import itertools
import struct
from collections.abc import Sequence
from typing import Any

import pytest

from graphgen import Chat, NumericalError, SamplingParams
from graphgen.calls.logprobs import Logprobs
from graphgen.calls.outputs import StreamPiece
from graphgen.gateway.output_parsers.formats import OutputFormat
from tests.gateway.asgi import GatewayCore, call, fails, piece, says

PATH = "/v1/responses"
HI: dict[str, Any] = {"input": "Hi"}
STREAM = {**HI, "stream": True}
FUNCTION = {"type": "function", "name": "f"}
MAX_TOKENS = {"type": "function", "name": "max_tokens"}
THINKS = OutputFormat(calls=None, reasoning="think", token_ids={})
CODEX: dict[str, Any] = {
    "instructions": "Be brief.",
    "input": [
        {"role": "developer", "content": "Mind the gap."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "How cold?"}]},
        {"type": "reasoning", "id": "rs_0", "summary": [], "encrypted_content": "gAAA"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
        },
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"where": "out"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "-3"},
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "gAAA"},
        {"role": "user", "content": "So?"},
    ],
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "k",
    "client_metadata": {"a": "b"},
    "parallel_tool_calls": True,
    "reasoning": {"effort": "low", "summary": "auto"},
    "text": {"verbosity": "low"},
}


def test_a_conversation_becomes_a_chat() -> None:
    core = GatewayCore(says("x"))
    assert call(core, PATH, CODEX).status == 200
    (chat,) = core.prompts
    assert isinstance(chat, Chat)
    call_of = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"where": "out"}}}
    assert list(chat.messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Mind the gap."},
        {"role": "user", "content": "How cold?"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [call_of]},
        {"role": "tool", "tool_call_id": "c1", "content": "-3"},
        {"role": "user", "content": "So?"},
    ]
    assert chat.chat_template_kwargs == {"reasoning_effort": "low"}


def test_calls_behind_another_answer_are_another_turn() -> None:
    core = GatewayCore(says("x"))
    items = [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert call(core, PATH, {"input": items}).status == 200
    (chat,) = core.prompts
    assert isinstance(chat, Chat)
    assert [message["content"] for message in chat.messages] == ["a", "b"]


def test_a_response_says_what_was_said_and_what_was_asked_for() -> None:
    core = GatewayCore(says("Good ", "morrow"))
    asked = {"temperature": 0.5, "top_p": 0.9, "max_output_tokens": 9, "metadata": {"a": "b"}, "user": "u", "seed": 3}
    reply = call(core, PATH, {**HI, **asked})
    assert core.sampling == SamplingParams(max_tokens=9, temperature=0.5, top_p=0.9, seed=3)
    response = reply.json
    assert response["id"].startswith("resp")
    (item,) = response["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "incomplete")
    assert item["content"] == [{"type": "output_text", "text": "Good morrow", "annotations": [], "logprobs": []}]
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["usage"] == {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 7,
    }
    for name in ("temperature", "top_p", "max_output_tokens", "metadata", "user"):
        assert response[name] == asked[name]


def test_events_of_a_response_come_in_openais_order() -> None:
    reply = call(GatewayCore(says("a", "b", finish="stop")), PATH, STREAM)
    kinds = [kind for kind, _ in itertools.groupby(event["type"] for event in reply.events)]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event["sequence_number"] for event in reply.events] == list(range(len(reply.events)))
    names = [line.removeprefix("event: ") for line in reply.body.decode().splitlines() if line.startswith("event")]
    assert names == [event["type"] for event in reply.events]
    first, last = reply.events[0]["response"], reply.events[-1]["response"]
    assert (first["status"], first["output"], last["status"]) == ("in_progress", [], "completed")
    assert "".join(event.get("delta", "") for event in reply.events) == last["output"][0]["content"][0]["text"] == "ab"
    places = {event["item_id"] for event in reply.events if "item_id" in event}
    assert places == {last["output"][0]["id"]}


def test_log_probabilities_of_thoughts_and_markers_are_not_told() -> None:
    def one(token: bytes) -> Logprobs:
        return Logprobs(0, (1,), struct.pack("<fi", -0.5, 1), (token,), b"")

    def answer(sinks: Sequence[Any], _: int) -> None:
        for text in ("<think>", "Hm.", "</think>", "Well"):
            sinks[0](StreamPiece(text, (1,), None, logprobs=one(text.encode())))
        sinks[0](StreamPiece(" met", (1,), "stop", logprobs=one(b" met")))

    asked = {"include": ["message.output_text.logprobs"]}
    reply = call(GatewayCore(answer), PATH, {**STREAM, **asked}, output_format=THINKS)
    told = [one["token"] for event in reply.events for one in event.get("logprobs", ()) if "delta" in event]
    assert told == ["Well", " met"]


def test_a_response_without_text_has_an_item_all_the_same() -> None:
    reply = call(GatewayCore(lambda sinks, _: sinks[0](piece("", "stop"))), PATH, STREAM)
    kinds = [event["type"] for event in reply.events]
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 1
    assert "response.output_text.delta" not in kinds


def test_what_fails_behind_the_first_event_is_a_failed_response() -> None:
    reply = call(GatewayCore(fails(NumericalError("NaN"), after=["a"])), PATH, STREAM)
    last = reply.events[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"] == {"code": "numerical", "message": "NaN"}
    assert call(GatewayCore(fails(NumericalError("NaN"))), PATH, STREAM).status == 500


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"n": 2}, "n"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": [], "text": "x"}]}]}, "input"),
        ({"input": [{"role": "user", "content": 5}]}, "input"),
        ({"input": 5}, "input"),
        ({"max_output_tokens": "many"}, "max_output_tokens"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_field(wrong: dict[str, Any], param: str) -> None:
    core = GatewayCore(says("x"))
    reply = call(core, PATH, {**HI, **wrong})
    assert (reply.status, reply.error["param"]) == (400, param)
    assert not core.prompts


@pytest.mark.parametrize(
    ("wrong", "param", "said"),
    [
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0: "),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0: "),
        ({"input": [{"role": "user", "content": "x"}] * 1025}, "input", "input has 1025 items, the limit is 1024"),
        ({"background": True}, "background", "fetched later"),
        ({"prompt": {"id": "p"}}, "prompt", "a prompt that OpenAI keeps"),
        ({"conversation": "c"}, "conversation", "send the whole conversation"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "text.format: its type is 'xml'"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", '"name": ..., "schema": {...}}'),
        ({"text": {"format": {"type": "json_schema", "schema": 5}}}, "text.format", "text.format: json is 5"),
        (
            {"tools": [FUNCTION], "tool_choice": {"type": "function"}},
            "tool_choice",
            '{"type": "function", "name": ...}',
        ),
        ({"max_output_tokens": 5, "tools": [MAX_TOKENS] * 2}, "tools[1]", "there is a tool 'max_tokens' before"),
        ({"input": [{"type": "x" * 1000}]}, "input", f"of type '{'x' * 99}: give"),
        ({"input": [{"content": [{"type": "x" * 1000}]}]}, "input", f"of type '{'x' * 99}: this"),
    ],
)
def test_a_refusal_speaks_of_the_fields_of_a_response(wrong: dict[str, Any], param: str, said: str) -> None:
    error = call(GatewayCore(says("x")), PATH, {**HI, **wrong}).error
    assert (error["param"], said in error["message"]) == (param, True), error
