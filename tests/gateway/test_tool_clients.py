"""Programs that serve a model's tools, with the packages of OpenAI and Anthropic: they ask, call and tell."""

import json
import re
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from graphgen.gateway.service import Service
from graphgen.gateway.settings import ModelFacts
from graphgen.mock_server.script import Reply, Say, Script
from graphgen.remote.core import RemoteCore
from tests import ROOT
from tests.gateway.over_http import serving_http
from tests.gateway.test_tools import HERMES, WEATHER, hermes
from tests.ipc.raw_client import running_mock

QUESTION = "How warm is it in Paris?"
CITIES = ["Paris", "Rome"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of a gateway before a server whose model calls a function, and then says what it gave."""
    called = re.findall(".{1,9}", "<think>Hm.</think>\n" + hermes("Paris") + "\n" + hermes("Rome"), re.DOTALL)
    replies = [
        Reply(QUESTION, (Say(tuple(called), every_ms=0),)),
        Reply("18 C", (Say(("It is ", "18 C."), 0),)),
    ]
    with running_mock(Script(replies=tuple(replies))) as server:
        core = RemoteCore(server.address, {})
        with serving_http(Service(core, ["fake"], ModelFacts(HERMES, {}))) as port:
            yield f"http://127.0.0.1:{port}"
        core.close()


@pytest.mark.parametrize("stream", [False, True])
def test_the_loop_of_a_program_that_serves_its_tools(url: str, stream: bool) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30.0)
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    while True:
        common: Any = {"model": "fake", "messages": messages, "tools": [WEATHER]}
        if stream:
            with client.chat.completions.stream(**common) as events:
                choice: Any = events.get_final_completion().choices[0]
        else:
            choice = client.chat.completions.create(**common).choices[0]
        if choice.finish_reason != "tool_calls":
            break
        messages.append(choice.message.model_dump())
        for one in choice.message.tool_calls:
            assert json.loads(one.function.arguments)["city"] in ("Paris", "Rome")
            messages.append({"role": "tool", "tool_call_id": one.id, "content": "18 C"})
    assert choice.message.content == "It is 18 C."
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool"]
    assert messages[1]["reasoning_content"] == "Hm."


def test_the_program_of_the_docs_runs(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "http.md").read_text()
    _, program = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(program.replace("http://127.0.0.1:8000", url).replace('"qwen3"', '"fake"'), names)
    assert capsys.readouterr().out == 'get_weather {"city": "Paris"}\nget_weather {"city": "Rome"}\n'
    assert names["answer"].message.content == "It is 18 C."


@pytest.mark.parametrize("stream", [False, True])
def test_the_loop_over_responses(url: str, stream: bool) -> None:
    """The package holds the order of the events of a stream to what it knows."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30.0)
    tools: Any = [{"type": "function", **WEATHER["function"], "strict": False}]
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    while True:
        common: Any = {"model": "fake", "input": items, "tools": tools, "store": False}
        if stream:
            with client.responses.stream(**common) as events:
                kinds = [event.type for event in events]
                response: Any = events.get_final_response()
            assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
        else:
            response = client.responses.create(**common)
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            break
        assert [item.type for item in response.output] == ["reasoning", "function_call", "function_call"]
        (thought,) = response.output[0].content
        assert thought.text == "Hm."
        assert [json.loads(one.arguments)["city"] for one in calls] == CITIES
        items += [item.model_dump(exclude_none=True) for item in response.output]
        items += [{"type": "function_call_output", "call_id": one.call_id, "output": "18 C"} for one in calls]
    assert response.output_text == "It is 18 C."


@pytest.mark.parametrize("stream", [False, True])
def test_the_loop_over_messages(url: str, stream: bool) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=30.0)
    function = WEATHER["function"]
    tools: Any = [{"name": function["name"], "input_schema": function["parameters"]}]
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    while True:
        common: Any = {"model": "fake", "messages": messages, "tools": tools, "max_tokens": 500}
        if stream:
            with client.messages.stream(**common) as events:
                message: Any = events.get_final_message()
        else:
            message = client.messages.create(**common)
        if message.stop_reason != "tool_use":
            break
        thought, *calls = message.content
        assert (thought.type, thought.thinking) == ("thinking", "Hm.")
        assert [(one.type, one.input) for one in calls] == [("tool_use", {"city": city}) for city in CITIES]
        messages.append({"role": "assistant", "content": [block.model_dump() for block in message.content]})
        results = [{"type": "tool_result", "tool_use_id": one.id, "content": "18 C"} for one in calls]
        messages.append({"role": "user", "content": results})
    assert message.stop_reason == "end_turn"
    assert [block.text for block in message.content] == ["It is 18 C."]
