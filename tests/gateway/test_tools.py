"""Tool calls and reasoning of chats, as OpenAI's API has them."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphgen import Chat, SamplingParams
from graphgen.calls.outputs import Mark, StreamPiece
from graphgen.calls.structured import JsonSchema
from graphgen.gateway.chat_output import ChatOutput, join_deltas
from graphgen.gateway.output_parsers.formats import OutputFormat, ParserMaker, choose_format
from graphgen.gateway.tools import ToolUse, calls_schema
from tests.gateway.asgi import GatewayCore, call, piece, says

CHATS = "/v1/chat/completions"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASKED: dict[str, Any] = {
    "model": "fake",
    "messages": [{"role": "user", "content": "How warm is it in Paris?"}],
    "tools": [WEATHER],
}
HERMES = choose_format("hermes", "think", "", {})


def hermes(city: str) -> str:
    return f'<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'


def ends(*texts: str) -> Any:
    """As `says`, with a token that ends the output."""

    def answer(sinks: Sequence[Any], num_samples: int) -> None:
        for sample in range(num_samples):
            for text in texts:
                sinks[0](piece(text, None, sample))
            sinks[0](piece("", "stop", sample))

    return answer


def ask(*texts: str, output_format: OutputFormat = HERMES, **body: Any) -> Any:
    reply = call(GatewayCore(ends(*texts)), CHATS, {**ASKED, **body}, output_format=output_format)
    assert reply.status == 200, reply.body
    return reply


def test_a_call_is_no_content() -> None:
    (choice,) = ask("<think>\nHm.\n</think>\n\n", hermes("Paris")).json["choices"]
    (called,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning_content": "Hm.",
        "reasoning": "Hm.",
    }
    assert choice["finish_reason"] == "tool_calls"
    assert re.fullmatch("[a-zA-Z0-9]{9}", called.pop("id"))
    assert called == {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}


def test_a_stream_names_each_call_once_and_numbers_them_from_0() -> None:
    """Programs join what repeats, names and ids too."""
    texts = ["I look.\n", *re.findall(".{1,7}", hermes("Paris") + "\n" + hermes("Rome"), re.DOTALL)]
    *chunks, done = ask(*texts, stream=True).events
    assert done == "[DONE]"
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    deltas = [choice["delta"] for choice in choices]
    assert "".join(delta.get("content") or "" for delta in deltas) == "I look."
    calls = [one for delta in deltas for one in delta.get("tool_calls", ())]
    heads = [one for one in calls if "id" in one]
    assert [(one["index"], one["type"], one["function"]) for one in heads] == [
        (index, "function", {"name": "get_weather", "arguments": ""}) for index in (0, 1)
    ]
    rest = [one for one in calls if "id" not in one]
    assert all(one.keys() == {"index", "function"} and one["function"].keys() == {"arguments"} for one in rest)
    arguments = ["".join(one["function"]["arguments"] for one in rest if one["index"] == index) for index in (0, 1)]
    assert arguments == ['{"city": "Paris"}', '{"city": "Rome"}']
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["tool_calls"]


def test_one_call_at_most_where_the_request_says_so() -> None:
    (choice,) = ask(hermes("Paris"), hermes("Rome"), parallel_tool_calls=False).json["choices"]
    assert [json.loads(one["function"]["arguments"]) for one in choice["message"]["tool_calls"]] == [{"city": "Paris"}]


def test_samples_are_parsed_each_by_itself() -> None:
    reply = ask(hermes("Paris")[:20], hermes("Paris")[20:], n=2)
    assert [len(choice["message"]["tool_calls"]) for choice in reply.json["choices"]] == [1, 1]
    reply = ask(hermes("Paris")[:20], hermes("Paris")[20:], n=2, stream=True)
    events = [choice for chunk in reply.events[:-1] for choice in chunk["choices"]]
    heads = [choice["index"] for choice in events for one in choice["delta"].get("tool_calls", ()) if "id" in one]
    assert sorted(heads) == [0, 1]


def test_what_is_no_call_stays_content() -> None:
    text = "<tool_call>get_weather(Paris)</tool_call>"
    (choice,) = ask(text).json["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    assert "tool_calls" not in choice["message"]


def test_a_call_that_was_cut_ends_as_outputs_do_that_are_too_long() -> None:
    reply = call(GatewayCore(says(hermes("Par")[:-20])), CHATS, ASKED, output_format=HERMES)
    (choice,) = reply.json["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"city"')


def test_without_tools_a_call_is_text_and_thoughts_are_still_told_apart() -> None:
    for body in ({"tools": None}, {"tool_choice": "none"}):
        (choice,) = ask("<think>a</think>", hermes("Paris"), **body).json["choices"]
        assert choice["message"]["content"] == hermes("Paris")
        assert (choice["message"]["reasoning_content"], choice["finish_reason"]) == ("a", "stop")


def test_the_template_gets_the_tools_unless_none_may_be_called() -> None:
    for body, tools in (({}, [WEATHER]), ({"tool_choice": "auto"}, [WEATHER]), ({"tool_choice": "none"}, None)):
        core = GatewayCore(ends("x"))
        call(core, CHATS, {**ASKED, **body}, output_format=HERMES)
        assert core.prompts == [Chat([{"role": "user", "content": "How warm is it in Paris?"}], tools)]


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [WEATHER, {"type": "function", "function": {"name": 3}}]}, "tools[1]"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]}, "tools[0]"),
        ({"tools": [WEATHER, {"type": "function", "function": {"name": "get_weather"}}]}, "tools[1]"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
    ],
)
def test_wrong_tools_are_refused_with_their_place(wrong: dict[str, Any], param: str) -> None:
    reply = call(GatewayCore(ends("x")), CHATS, {**ASKED, **wrong}, output_format=HERMES)
    assert (reply.status, reply.error["param"]) == (400, param)


@pytest.mark.parametrize("depth", [30, 450, 600])
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_parameters_that_are_nested_too_deep_are_refused_with_their_field(choice: str, depth: int) -> None:
    nested = json.loads("[" * depth + "]" * depth)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"enum": nested}}}
    body = {**ASKED, "tools": [tool], "tool_choice": choice}
    reply = call(GatewayCore(ends("x")), CHATS, body, output_format=HERMES)
    assert (reply.status, reply.error["code"]) == (400, "invalid_request")
    assert "tools" in reply.error["message"]
    assert "nested more than 24 deep" in reply.error["message"]


@pytest.mark.parametrize("schema", [{"anyOf": 5}, {"oneOf": {"type": "string"}}, {"type": {}}, {"type": [[]]}, 5])
def test_what_is_no_schema_of_an_argument_says_nothing_of_its_type(schema: Any) -> None:
    function = {"name": "get_weather", "parameters": {"properties": {"days": schema}}}
    text = "<tool_call>\n<function=get_weather>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
    coder = choose_format("qwen3_coder", "none", "", {})
    (choice,) = ask(text, tools=[{"function": function}], output_format=coder).json["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"days": 2}'


def test_what_the_prompt_has_begun_is_part_of_the_thoughts() -> None:
    """Some templates write the opening marker themselves."""

    def answer(sinks: Sequence[Any], _: int) -> None:
        sinks[0](StreamPiece("Hm.\n</think>\n\nGood.", (1,), "stop", prompt_tail="<|im_start|>assistant\n<think>\n"))

    core = GatewayCore(answer)
    (choice,) = call(core, CHATS, ASKED, output_format=HERMES).json["choices"]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("Hm.", "Good.")
    assert core.parsing.tail_len > 0


def test_special_tokens_are_known_by_their_ids() -> None:
    """The text leaves them out."""
    harmony = choose_format(
        "harmony", "harmony", "", {"<|channel|>": 7, "<|message|>": 8, "<|end|>": 9, "<|start|>": 6}
    )

    def answer(sinks: Sequence[Any], _: int) -> None:
        marks = Mark(7, 0, 0), Mark(8, 8, 8), Mark(9, 11, 11), Mark(6, 11, 11), Mark(7, 20, 20), Mark(8, 25, 25)
        text = "analysisHm.assistantfinalGood."
        sinks[0](StreamPiece(text[:15], (1,), None, marks=marks[:3]))
        sinks[0](StreamPiece(text[15:], (1,), "stop", marks=marks[3:]))

    core = GatewayCore(answer)
    (choice,) = call(core, CHATS, ASKED, output_format=harmony).json["choices"]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("Hm.", "Good.")
    assert {6, 7, 8, 9} == set(core.parsing.marked_ids)


@given(st.data())
def test_a_stream_joined_is_the_message(data: st.DataObject) -> None:
    parts = [hermes("Paris"), "<think>", "</think>", "<tool_call>", " ", "\n", "Well.", "\n\n"]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=8)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def message_of(texts: Sequence[str]) -> Any:
        output = ChatOutput(ParserMaker(HERMES), ToolUse([WEATHER], {"get_weather": {}}, one_call=False))
        deltas = [delta for one in texts for delta in output.take([piece(one)])[0]]
        last, finish = output.take([piece("", "stop")])
        message = join_deltas([*deltas, *last])
        calls = [] if not message.tool_calls else [one.function for one in message.tool_calls]
        return message.content, message.reasoning, calls, finish

    assert message_of(pieces) == message_of([text])


NAMED = {"type": "function", "function": {"name": "get_weather"}}
LIST = '[{"name": "get_weather", "arguments": {"city": "Paris"}}]'


@pytest.mark.parametrize(
    ("body", "most", "finish"),
    [
        ({"tool_choice": "required"}, 32, "tool_calls"),
        ({"tool_choice": "required", "parallel_tool_calls": False}, 1, "tool_calls"),
        ({"tool_choice": NAMED}, 1, "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_is_a_list_that_the_sampling_follows(body: Any, most: int, finish: str, stream: bool) -> None:
    """Whatever form the model would have chosen."""
    core = GatewayCore(ends(LIST[:30], LIST[30:]))
    reply = call(core, CHATS, {**ASKED, **body, "stream": stream}, output_format=HERMES)
    assert isinstance(core.sampling, SamplingParams)
    assert isinstance(core.sampling.structured, JsonSchema)
    asked = json.loads(core.sampling.structured.text)
    assert (asked["minItems"], asked["maxItems"]) == (1, most)
    assert core.prompts[-1] == Chat([{"role": "user", "content": ASKED["messages"][0]["content"]}], [WEATHER])
    if stream:
        choices = [choice for chunk in reply.events[:-1] for choice in chunk["choices"]]
        calls = [one["function"] for choice in choices for one in choice["delta"].get("tool_calls", ())]
        assert "".join(one["arguments"] for one in calls) == '{"city": "Paris"}'
        assert not any(choice["delta"].get("content") for choice in choices)
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == [finish]
    else:
        (choice,) = reply.json["choices"]
        (called,) = choice["message"]["tool_calls"]
        assert called["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
        assert (choice["message"]["content"], choice["finish_reason"]) == (None, finish)


JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}


@pytest.mark.parametrize(
    ("body", "said"), [({"tool_choice": "required"}, LIST), ({"response_format": JSON_SCHEMA}, "{}")]
)
@pytest.mark.parametrize(
    ("end", "thoughts"),
    [("<think>\n", "Hm.</think>"), ("<think>\n\n</think>\n\n", ""), ("", ""), ("", "<think>Hm.</think>\n\n")],
)
def test_a_structure_comes_behind_the_thoughts(body: dict[str, Any], said: str, end: str, thoughts: str) -> None:
    """Those that the prompt has begun, or those that the output begins with, if it does."""
    prompt = f"<|im_start|>assistant\n{end}"  # as the stand-in for a frontend renders a chat

    def answer(sinks: Sequence[Any], _: int) -> None:
        sinks[0](StreamPiece(thoughts + said, (1,), "stop", prompt_tail=prompt))

    core = GatewayCore(answer)
    body = {**ASKED, "messages": [{"role": "user", "content": prompt}], **body}
    (choice,) = call(core, CHATS, body, output_format=HERMES).json["choices"]
    assert isinstance(core.sampling, SamplingParams)
    assert isinstance(core.sampling.structured, JsonSchema)
    structured, is_begun = core.sampling.structured, end == "<think>\n"
    assert (structured.after, structured.opening) == ("</think>", "" if is_begun else "<think>")
    assert choice["message"].get("reasoning_content") == ("Hm." if thoughts else None)
    assert (len(choice["message"].get("tool_calls", ())), choice["message"]["content"]) == (
        (1, None) if said == LIST else (0, said)
    )


def test_a_forced_call_and_another_structure_are_one_too_many() -> None:
    core = GatewayCore(ends("x"))
    reply = call(
        core, CHATS, {**ASKED, "tool_choice": "required", "response_format": JSON_SCHEMA}, output_format=HERMES
    )
    assert (reply.status, reply.error["param"]) == (400, "tool_choice")
    assert not core.prompts


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('[{"name": "f", "arguments": {"p": {"x": 1}, "city": "a"}}]', True),
        ('[{"name": "f", "arguments": {"p": {"next": {"p": {}}}}}, {"name": "g", "arguments": {}}]', True),
        ("[]", False),
        ('[{"name": "h", "arguments": {}}]', False),
        ('[{"name": "f", "arguments": {"city": "a"}}]', False),
        ('[{"arguments": {}, "name": "g"}]', False),
    ],
)
def test_the_grammar_of_forced_calls_is_that_of_the_tools(text: str, fits: bool) -> None:
    """Schemas with references too: each tool's begin at its own root. The name comes first, so that a call can be
    passed on while it is written."""
    llguidance = pytest.importorskip("llguidance")
    definitions = {"P": {"type": "object", "properties": {"x": {"type": "integer"}, "next": {"$ref": "#"}}}}
    properties = {"p": {"$ref": "#/$defs/P"}, "city": {"type": "string"}}
    tool = {"type": "object", "properties": properties, "required": ["p"], "$defs": definitions}
    schema = json.dumps(calls_schema({"f": tool, "g": {"type": "object"}}, one_call=False))
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_json_schema(schema))
    tokens = tokenizer.tokenize_str(text)
    assert (matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()) == fits
