"""What each parser makes of what its models write, whole and cut anywhere."""

import json
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphgen.gateway.output_parsers import deepseek, harmony
from graphgen.gateway.output_parsers.events import Arguments, Call, Content, Event, Reasoning
from graphgen.gateway.output_parsers.formats import ToolParser
from tests.gateway.output_parsers.outputs import Model

PARIS = '{"city": "Paris"}'
ROME = '{"city": "Rome", "days": 2}'
V3 = deepseek.CALLS, deepseek.CALL, deepseek.SEPARATOR, deepseek.END_CALL, deepseek.END_CALLS
WEATHER: list[Event] = [Call("get_weather"), Arguments(PARIS)]
BOTH: list[Event] = [*WEATHER, Call("get_weather"), Arguments(ROME)]


def hermes(arguments: str) -> str:
    return f'<tool_call>\n{{"name": "get_weather", "arguments": {arguments}}}\n</tool_call>'


def coder(**values: str) -> str:
    parameters = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values.items())
    return f"<tool_call>\n<function=get_weather>\n{parameters}</function>\n</tool_call>"


def glm(**values: str) -> str:
    pairs = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in values.items())
    return f"<tool_call>get_weather\n{pairs}</tool_call>"


def minimax(**values: str) -> str:
    pairs = "".join(f'<parameter name="{key}">{value}</parameter>\n' for key, value in values.items())
    return f'<minimax:tool_call>\n<invoke name="get_weather">\n{pairs}</invoke>\n</minimax:tool_call>'


def v3(arguments: str) -> str:
    return f"{V3[1]}function{V3[2]}get_weather\n```json\n{arguments}\n```{V3[3]}"


def gpt(channel: str, text: str, end: str = harmony.END) -> str:
    return f"{harmony.CHANNEL}{channel}{harmony.MESSAGE}{text}{end}"


NEXT = f"{harmony.START}assistant"
CALL = "commentary to=functions.get_weather <|constrain|>json"


class Case(NamedTuple):
    """An output of a format, and its events."""

    calls: ToolParser
    output: str
    events: list[Event]


NESTED = '{"city": "}\\"</tool_call>"}'
SINGLE_QUOTES = "<tool_call>\n{'name': get_weather}\n</tool_call> Well."
LIST = f'[{{"name": "get_weather", "arguments": {PARIS}}}, {{"name": "get_weather", "arguments": {ROME}}}]'
LLAMA = f'{{"name": "get_weather", "parameters": {PARIS}}}'
LLAMAS = f'<|python_tag|>{LLAMA}; {{"name": "get_weather", "parameters": {ROME}}}'
NAMES = f"Well.[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]get_weather[CALL_ID]abc[ARGS]{ROME}"
FINAL = gpt("final", "Good morrow.", harmony.RETURN)
PREAMBLE = gpt("commentary", "I look.")
CASES = [
    Case("hermes", "Good morrow.", [Content("Good morrow.")]),
    Case("hermes", hermes(PARIS), WEATHER),
    Case("hermes", f"See.{hermes(PARIS)}\n{hermes(ROME)}", [Content("See."), *WEATHER, Content("\n"), *BOTH[2:]]),
    Case("hermes", SINGLE_QUOTES, [Content(SINGLE_QUOTES)]),
    Case("hermes", f'<tool_call>{{"arguments": {PARIS}, "name": "get_weather"}}</tool_call>', WEATHER),
    Case("hermes", hermes(json.dumps(PARIS)), WEATHER),
    Case("hermes", '<tool_call>{"name": "now"}</tool_call>', [Call("now"), Arguments("{}")]),
    Case("hermes", hermes(NESTED), [Call("get_weather"), Arguments(NESTED)]),
    Case("hermes", hermes('{"city": "Pa')[:-14], [Call("get_weather"), Arguments('{"city": "Pa')]),
    Case("hermes", hermes(PARIS + ', "id": 3') + "Done.", [*WEATHER, Content("Done.")]),
    Case("llama3_json", LLAMA, WEATHER),
    Case("llama3_json", LLAMAS, BOTH),
    Case("llama3_json", PARIS, [Content(PARIS)]),
    Case("llama3_json", "<|python_tag|>print(1)", [Content("<|python_tag|>print(1)")]),
    Case("llama3_json", "A; B <", [Content("A; B <")]),
    Case("mistral", f"[TOOL_CALLS] {LIST}", BOTH),
    Case("mistral", NAMES, [Content("Well."), *BOTH]),
    Case("mistral", "[TOOL_CALLS]no call", [Content("[TOOL_CALLS]no call")]),
    Case("mistral", '[TOOL_CALLS][{"broken": 1}]', [Content('{"broken": 1}')]),
    Case("qwen3_coder", coder(city="Paris"), WEATHER),
    Case("qwen3_coder", coder(city="Paris") + coder(city="Rome", days="2"), BOTH),
    Case("qwen3_coder", coder(city="1\n<b>\n"), [Call("get_weather"), Arguments(json.dumps({"city": "1\n<b>\n"}))]),
    Case("qwen3_coder", "<tool_call>now</tool_call>", [Content("<tool_call>now</tool_call>")]),
    Case("qwen3_coder", "<function=now></function>Done.", [Call("now"), Arguments("{}"), Content("Done.")]),
    Case("qwen3_coder", coder(city="Paris")[:56], [Call("get_weather"), Arguments('{"city": "Pari')]),
    Case("glm", f"Well.{glm(city='Paris')}\n{glm(city='Rome', days='2')}", [Content("Well."), *BOTH]),
    Case("glm", "<tool_call>now\n</tool_call>", [Call("now"), Arguments("{}")]),
    Case("glm", "<tool_call>what is now</tool_call>", [Content("<tool_call>what is now</tool_call>")]),
    Case("minimax", minimax(city="Paris"), WEATHER),
    Case(
        "minimax", minimax(city="Paris").replace("</minimax:tool_call>", "") + minimax(city="Rome", days="2")[20:], BOTH
    ),
    Case("minimax", '<invoke name="now">', [Content('<invoke name="now">')]),
    Case("deepseek", f"Well.{V3[0]}{v3(PARIS)}\n{v3(ROME)}{V3[4]}", [Content("Well."), *BOTH]),
    Case("deepseek", f"{V3[0]}{V3[1]}get_weather{V3[2]}{PARIS}{V3[3]}{V3[4]}", WEATHER),
    Case("deepseek", f"{V3[0]}{V3[1]}?{V3[3]}{V3[4]}", [Content(f"{V3[1]}?{V3[3]}")]),
    Case("harmony", gpt("analysis", "Hm.") + NEXT + FINAL, [Reasoning("Hm."), Content("Good morrow.")]),
    Case("harmony", gpt("analysis", "Hm.") + NEXT + gpt(CALL, PARIS, harmony.CALL), [Reasoning("Hm."), *WEATHER]),
    Case("harmony", f" to=functions.get_weather{gpt('commentary', PARIS, harmony.CALL)}", WEATHER),
    Case("harmony", PREAMBLE + NEXT + gpt(CALL, PARIS) + NEXT + gpt(CALL, ROME), [Content("I look."), *BOTH]),
    Case("harmony", "No channel.", [Content("No channel.")]),
    Case("harmony", gpt("analysis", "Hm", ""), [Reasoning("Hm")]),
]
TOKENS: dict[ToolParser, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3_json": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    "qwen3_coder": ("<tool_call>", "</tool_call>"),
    "glm": ("<tool_call>", "</tool_call>"),
    "minimax": ("<minimax:tool_call>", "</minimax:tool_call>"),
    "deepseek": V3,
    "harmony": harmony.MARKERS,
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.calls}: {case.output[:40]}")
@pytest.mark.parametrize("is_tokens", [False, True], ids=["markers are text", "markers are tokens"])
def test_outputs_have_the_events_of_their_format(case: Case, is_tokens: bool) -> None:
    model = Model(case.calls, tokens=TOKENS[case.calls] if is_tokens else ())
    assert model.parse(case.output) == case.events
    assert model.parse(case.output, cuts=range(len(case.output))) == case.events, "a token at a time"


@pytest.mark.parametrize("calls", TOKENS)
@given(data=st.data())
def test_no_cut_of_any_output_changes_its_events(calls: ToolParser, data: st.DataObject) -> None:
    """Of what models write and of what they should not: parts of outputs in any order."""
    whole = [case.output for case in CASES if case.calls == calls]
    parts = [*TOKENS[calls], *whole, "<think>", "</think>", '{"name": "now", ', '"arguments": {', *'"\\}] x<']
    output = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=6)))
    at = data.draw(st.integers(0, len(output)))
    output = output[at:] if data.draw(st.booleans()) else output[:at]
    tokens = TOKENS[calls] if data.draw(st.booleans()) else ()
    model = Model(calls, "think", (*tokens, "<think>"), shown=data.draw(st.booleans()))
    cuts = data.draw(st.sets(st.integers(0, max(0, len(output) - 1))))
    tail = data.draw(st.sampled_from(["", "<think>\n"]))
    whole_events = model.parse(output, prompt_tail=tail)
    assert model.parse(output, cuts=sorted(cuts), prompt_tail=tail) == whole_events
    assert model.parse(output, cuts=range(len(output)), prompt_tail=tail) == whole_events


@pytest.mark.parametrize(
    ("calls", "output"),
    [
        ("hermes", hermes('{"city": "a long')[:-14]),
        ("qwen3_coder", coder(city="a long").partition("\n</parameter>")[0]),
        ("glm", glm(city="a long").partition("</arg_value>")[0]),
        ("minimax", minimax(city="a long").partition("</parameter>")[0]),
        ("llama3_json", '{"name": "get_weather", "parameters": {"city": "a long'),
        ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "a long'),
        ("deepseek", f'{V3[0]}{V3[1]}get_weather{V3[2]}{{"city": "a long'),
        ("harmony", gpt(CALL, '{"city": "a long', "")),
    ],
)
def test_arguments_are_passed_on_while_they_come(calls: ToolParser, output: str) -> None:
    """A call may be a whole file."""
    events = Model(calls, tokens=TOKENS[calls]).parse(output, is_open=True)
    assert events == [Call("get_weather"), Arguments('{"city": "a long')]


@pytest.mark.parametrize("calls", ["hermes", "deepseek", "harmony"])
def test_text_that_spells_a_special_token_is_no_marker(calls: ToolParser) -> None:
    """A model that is told to repeat a call, letter by letter, calls nothing."""
    output = next(case.output for case in CASES if case.calls == calls and case.events == WEATHER)
    events = Model(calls, tokens=TOKENS[calls]).parse(output, is_spelled=True)
    assert not any(isinstance(event, Call) for event in events)
    assert Model(calls).parse(output) == WEATHER, "where the markers are no tokens they are text"
