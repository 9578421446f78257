"""The embedded model, which knows no tools, calls one where it must."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serving import serving

pytest.importorskip("llguidance")

TEMPLATE = "{{ tools | tojson }}{% for message in messages %}{{ message.content }}{% endfor %}"
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("get_weather", "get_time")
]
ASKED: Any = {"model": "demo", "messages": [{"role": "user", "content": "Paris?"}], "tools": TOOLS, "max_tokens": 400}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "template.jinja").write_text(TEMPLATE)
    arguments = ("--http", "127.0.0.1:0", "--chat-template", str(folder / "template.jinja"))
    with serving(folder, *arguments) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60.0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_function_is_called_with_arguments_of_its_schema(client: openai.OpenAI, stream: bool) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_time"}}
    for seed in range(3):
        if stream:
            with client.chat.completions.stream(**ASKED, tool_choice=choice, seed=seed) as events:
                answer: Any = events.get_final_completion().choices[0]
        else:
            answer = client.chat.completions.create(**ASKED, tool_choice=choice, seed=seed).choices[0]
        assert answer.finish_reason == "stop"
        (call,) = answer.message.tool_calls
        assert call.function.name == "get_time"
        assert json.loads(call.function.arguments) in ({"city": "Paris"}, {"city": "Rome"})


def test_a_required_call_is_one_of_the_tools(client: openai.OpenAI) -> None:
    completion: Any = client.chat.completions.create(**ASKED, tool_choice="required", parallel_tool_calls=False)
    (answer,) = completion.choices
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls
    assert call.function.name in ("get_weather", "get_time")


def test_a_schema_that_cannot_be_followed_is_refused_with_its_reason(client: openai.OpenAI) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        client.chat.completions.create(**{**ASKED, "tools": tools}, tool_choice="required")


def test_calls_that_are_not_forced_need_a_known_form(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="--tool-parser"):
        client.chat.completions.create(**ASKED)
