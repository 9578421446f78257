"""Structures of answers over HTTP: every way in which clients ask for one, and OpenAI's client against a server."""

import json
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel

from graphgen.calls.sampling_params import SamplingParams
from graphgen.calls.structured import Choice, Grammar, JsonSchema, Regex, Structured
from tests.gateway.asgi import GatewayCore, call, says
from tests.serving import ServerProcess

CHATS, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    CHATS: {"messages": MESSAGES},
    COMPLETIONS: {"prompt": "Hi"},
    RESPONSES: {"input": "Hi"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 5, "model": "fake"},
}
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"enum": [1]}}, "required": ["b"]}
ANY_OBJECT = JsonSchema({"type": "object"})


@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        (CHATS, {"response_format": {"type": "json_object"}}, ANY_OBJECT),
        (
            CHATS,
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            JsonSchema(SCHEMA),
        ),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}, JsonSchema(SCHEMA)),
        ("/v1/messages", {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, JsonSchema(SCHEMA)),
        (COMPLETIONS, {"response_format": {"type": "json_object"}}, ANY_OBJECT),
        (COMPLETIONS, {"structured_outputs": {"json": SCHEMA, "regex": None}}, JsonSchema(SCHEMA)),
        (COMPLETIONS, {"structured_outputs": {"json_object": True, "disable_any_whitespace": False}}, ANY_OBJECT),
        (CHATS, {"structured_outputs": {"regex": "[a-z]+"}}, Regex("[a-z]+")),
        (CHATS, {"structured_outputs": {"choice": ["a", "b"]}}, Choice(["a", "b"])),
        (CHATS, {"structured_outputs": {"grammar": 'root ::= "a"'}}, Grammar('root ::= "a"')),
        (COMPLETIONS, {"guided_json": json.dumps(SCHEMA)}, JsonSchema(json.dumps(SCHEMA))),
        (COMPLETIONS, {"guided_regex": "a+"}, Regex("a+")),
        (COMPLETIONS, {"guided_choice": ["a"]}, Choice(["a"])),
        (CHATS, {"guided_grammar": 'start: "a"'}, Grammar('start: "a"')),
        (CHATS, {"guided_regex": "a+", "structured_after": "</think>"}, Regex("a+", after="</think>")),
        (CHATS, {"response_format": {"type": "text"}}, None),
        (CHATS, {"response_format": None, "guided_json": None}, None),
    ],
)
def test_every_way_to_ask_for_a_structure_reaches_the_engine(
    path: str, fields: dict[str, Any], expected: Structured | None
) -> None:
    core = GatewayCore(says("{}"))
    assert call(core, path, {**BODIES[path], **fields}).status == 200
    assert isinstance(core.sampling, SamplingParams)
    found = core.sampling.structured
    if isinstance(found, JsonSchema) and isinstance(expected, JsonSchema):
        assert json.dumps(json.loads(found.text)) == json.dumps(json.loads(expected.text)), "keys in their order"
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs"),
        ({"structured_outputs": {"choice": "abc"}}, "structured_outputs"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": [1]}, "guided_json"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_after": "</think>"}, "structured_after"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"guided_regex": "a", "min_tokens": 3}, "min_tokens"),
    ],
)
def test_what_says_nothing_clear_is_refused_with_its_field(fields: dict[str, Any], param: str) -> None:
    core = GatewayCore(says("x"))
    reply = call(core, CHATS, {**BODIES[CHATS], **fields})
    assert (reply.status, reply.error["type"], reply.error["param"]) == (400, "invalid_request_error", param)
    assert not core.prompts


class Person(BaseModel):
    mood: Literal["merry", "sad"]
    age: int
    is_king: bool


def test_openais_client_parses_what_it_asks_for(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60.0) as client:
        messages: Any = MESSAGES
        completions: Any = client.chat.completions
        answer = client.chat.completions.parse(
            model="play", messages=messages, response_format=Person, temperature=0, max_tokens=400
        )
        assert answer.choices[0].finish_reason == "stop"
        person = answer.choices[0].message.parsed
        assert person is not None
        assert person.mood in ("merry", "sad")
        stream = completions.create(
            model="play",
            messages=messages,
            temperature=1,
            seed=3,
            max_tokens=400,
            stream=True,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        jsonschema.validate(json.loads(text), SCHEMA)
        wrong: list[Any] = [{"type": "array", "uniqueItems": True}, {"type": "nonsense"}, {"$ref": "#/nowhere"}]
        for schema in wrong:
            asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            with pytest.raises(openai.BadRequestError, match="cannot be followed"):
                completions.create(model="play", messages=messages, response_format=asked)
