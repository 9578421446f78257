"""Reasoning and calls as the Responses API and Anthropic's have them: items and blocks, each whole and in order."""

import json
import re
from typing import Any

import anthropic
import openai
import pytest

from graphgen import SamplingParams
from tests.gateway.asgi import GatewayCore, Reply, call
from tests.gateway.test_tools import HERMES, WEATHER, ends, hermes

TEXTS = ["<think>\nHm, ", "Paris.\n</think>\n\n", "I look.\n", *re.findall(".{1,9}", hermes("Paris"), re.DOTALL)]
FUNCTION: dict[str, Any] = WEATHER["function"]
RESPONSES: dict[str, Any] = {"input": "How warm?", "tools": [{"type": "function", **FUNCTION}]}
MESSAGES: dict[str, Any] = {
    "max_tokens": 99,
    "messages": [{"role": "user", "content": "How warm?"}],
    "tools": [{"name": "get_weather", "input_schema": FUNCTION["parameters"]}],
}


def ask(path: str, body: dict[str, Any]) -> tuple[GatewayCore, Reply]:
    core = GatewayCore(ends(*TEXTS))
    reply = call(core, path, body, output_format=HERMES)
    assert reply.status == 200, reply.body
    return core, reply


def test_a_response_has_an_item_for_each_part_of_an_output() -> None:
    core, reply = ask("/v1/responses", RESPONSES)
    thought, said, called = reply.json["output"]
    assert (thought["type"], thought["content"]) == ("reasoning", [{"type": "reasoning_text", "text": "Hm, Paris."}])
    assert (said["type"], said["content"][0]["text"]) == ("message", "I look.")
    assert (called["type"], called["name"], json.loads(called["arguments"])) == (
        "function_call",
        "get_weather",
        {"city": "Paris"},
    )
    assert (reply.json["status"], core.prompts[0].tools) == ("completed", [WEATHER])  # type: ignore[union-attr]  # a chat
    openai.types.responses.Response.model_validate(reply.json)


def test_events_of_a_response_begin_and_end_each_item_before_the_next() -> None:
    _, reply = ask("/v1/responses", {**RESPONSES, "stream": True})
    assert [event["sequence_number"] for event in reply.events] == list(range(len(reply.events)))
    kinds = list(dict.fromkeys((event.get("output_index"), event["type"]) for event in reply.events))

    def part(index: int, name: str) -> list[tuple[int, str]]:
        names = ("output_item.added", "content_part.added", f"{name}.delta", f"{name}.done", "content_part.done")
        return [(index, f"response.{one}") for one in (*names, "output_item.done")]

    assert kinds == [
        (None, "response.created"),
        (None, "response.in_progress"),
        *part(0, "reasoning_text"),
        *part(1, "output_text"),
        (2, "response.output_item.added"),
        (2, "response.function_call_arguments.delta"),
        (2, "response.function_call_arguments.done"),
        (2, "response.output_item.done"),
        (None, "response.completed"),
    ]
    last = reply.events[-1]["response"]["output"]
    ends_of = [event["item"] for event in reply.events if event["type"] == "response.output_item.done"]
    assert ends_of == last
    deltas = ["", "", ""]
    for event in reply.events:
        if event["type"].endswith(".delta"):
            deltas[event["output_index"]] += event["delta"]
    assert deltas == ["Hm, Paris.", "I look.", last[2]["arguments"]]
    done = next(event for event in reply.events if event["type"] == "response.function_call_arguments.done")
    assert (done["name"], done["arguments"]) == ("get_weather", last[2]["arguments"])


def test_a_message_has_a_block_for_each_part_of_an_output() -> None:
    core, reply = ask("/v1/messages", MESSAGES)
    thought, said, called = reply.json["content"]
    assert (thought["type"], thought["thinking"], said["text"]) == ("thinking", "Hm, Paris.", "I look.")
    assert (called["type"], called["name"], called["input"]) == ("tool_use", "get_weather", {"city": "Paris"})
    assert reply.json["stop_reason"] == "tool_use"
    assert core.prompts[0].tools == [WEATHER]  # type: ignore[union-attr]  # a chat
    anthropic.types.Message.model_validate(reply.json)


def test_events_of_a_message_begin_and_end_each_block_before_the_next() -> None:
    _, reply = ask("/v1/messages", {**MESSAGES, "stream": True})
    kinds = list(dict.fromkeys((event.get("index"), event["type"]) for event in reply.events))
    blocks = [(index, f"content_block_{name}") for index in range(3) for name in ("start", "delta", "stop")]
    assert kinds == [(None, "message_start"), *blocks, (None, "message_delta"), (None, "message_stop")]
    starts = [event["content_block"] for event in reply.events if event["type"] == "content_block_start"]
    assert [start["type"] for start in starts] == ["thinking", "text", "tool_use"]
    assert starts[2]["input"] == {}
    deltas = ["", "", ""]
    for event in reply.events:
        if event["type"] == "content_block_delta":
            (text,) = [value for name, value in event["delta"].items() if name != "type"]
            deltas[event["index"]] += text
    assert (deltas[:2], json.loads(deltas[2])) == (["Hm, Paris.", "I look."], {"city": "Paris"})
    assert reply.events[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("path", "body", "choice"),
    [("/v1/responses", RESPONSES, "none"), ("/v1/messages", MESSAGES, {"type": "none"})],
)
def test_calls_are_text_where_the_request_wants_none(path: str, body: dict[str, Any], choice: Any) -> None:
    core, reply = ask(path, {**body, "tool_choice": choice})
    assert "<tool_call>" in reply.body.decode()
    assert core.prompts[0].tools is None  # type: ignore[union-attr]  # a chat


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "x", "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}}),
        (
            "/v1/messages",
            {**MESSAGES, "tools": None, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        ),
    ],
)
def test_a_schema_reaches_the_sampling_as_that_of_a_chat_does(path: str, body: dict[str, Any]) -> None:
    core, _ = ask(path, body)
    chats = GatewayCore(ends(*TEXTS))
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    chat = {"messages": MESSAGES["messages"], "response_format": form}
    call(chats, "/v1/chat/completions", chat, output_format=HERMES)
    assert isinstance(core.sampling, SamplingParams)
    assert isinstance(chats.sampling, SamplingParams)
    assert core.sampling.structured is not None
    assert core.sampling.structured == chats.sampling.structured


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {**RESPONSES, "tool_choice": {"type": "function", "name": "get_weather"}}),
        ("/v1/responses", {**RESPONSES, "tool_choice": "required"}),
        ("/v1/messages", {**MESSAGES, "tool_choice": {"type": "tool", "name": "get_weather"}}),
        ("/v1/messages", {**MESSAGES, "tool_choice": {"type": "any"}}),
    ],
)
def test_a_call_can_be_forced(path: str, body: dict[str, Any]) -> None:
    core, _ = ask(path, body)
    assert isinstance(core.sampling, SamplingParams)
    assert core.sampling.structured is not None
