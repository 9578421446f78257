"""Models that say themselves how their outputs are to be read."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphgen.gateway.output_parsers.events import Arguments, Call, Content, Reasoning
from graphgen.gateway.output_parsers.formats import choose_format
from graphgen.requests.tokenizer_files import load_tokenizer
from tests.gateway.output_parsers.outputs import Model
from tests.requests.tokenizers_for_tests import byte_level

pytest.importorskip("transformers.utils.chat_parsing", reason="transformers can since 5.13")

TEMPLATE: dict[str, Any] = {
    "version": 1,
    "start_anchor": "<bot>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"<call\|(?P<name>\w+)>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": "<end>", "optional": False},
    },
}
PARIS = '{"city": "Paris"}'
TOKENS = {text: number for number, text in enumerate(("<think>", "</think>", "</call>", "<end>", "<bot>", "<other>"))}


MODEL = Model("auto", "auto", tokens=tuple(TOKENS), shown=False, template=TEMPLATE)


@pytest.mark.parametrize(
    ("output", "events"),
    [
        ("Good.<end>", [Content("Good.")]),
        ("<think>Hm.</think>Good.", [Reasoning("Hm."), Content("Good.")]),
        (f"Well.<call|f>{PARIS}</call>", [Content("Well."), Call("f"), Arguments(PARIS)]),
        (f"<call|f>{PARIS}</call><call|g>{{}}</call>", [Call("f"), Arguments(PARIS), Call("g"), Arguments("{}")]),
        (f"a<call|f>[1</call>b<call|f>{PARIS}</call>", [Content("a[1b"), Call("f"), Arguments(PARIS)]),
        ("a<call|f>[1", [Content("a[1")]),
    ],
)
def test_regions_become_events(output: str, events: list[Any]) -> None:
    assert MODEL.parse(output) == events
    assert MODEL.parse(output, cuts=range(len(output))) == events


def test_what_the_prompt_has_opened_is_open() -> None:
    assert MODEL.parse("Hm.</think>Good.", prompt_tail="<end><bot><think>") == [Reasoning("Hm."), Content("Good.")]
    assert MODEL.parse("Hm.", prompt_tail="<think> and no anchor") == [Content("Hm.")]


def test_without_tools_a_call_is_content() -> None:
    assert MODEL.parse(f"<call|f>{PARIS}</call>", tools=None) == [Content(f"<call|f>{PARIS}</call>")]


@settings(max_examples=40)
@given(data=st.data())
def test_no_cut_changes_the_events(data: st.DataObject) -> None:
    parts = [*TOKENS, "<call|f>", PARIS, "{", "a", " ", f"<call|f>{PARIS}</call>", "<ca", "|"]
    output = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=8)))
    cuts = sorted(data.draw(st.sets(st.integers(0, max(0, len(output) - 1)))))
    assert MODEL.parse(output, cuts=cuts) == MODEL.parse(output)


def test_a_template_that_is_none_costs_a_warning_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = Model(
            "auto", "auto", template={"fields": {"content": {"color": "red"}}}, chat_template="<|channel|><|message|>"
        )
    assert "unknown keys ['color']" in caplog.text
    assert model.parse("<|channel|>analysis<|message|>Hm.") == [Reasoning("Hm.")]


def test_what_an_operator_names_goes_before_the_models_own() -> None:
    assert choose_format("auto", "auto", "", {}, TEMPLATE).template == TEMPLATE
    assert choose_format("hermes", "auto", "", {}, TEMPLATE).template is None
    assert choose_format("auto", "none", "", {}, TEMPLATE).template is None


def test_only_the_tokens_that_a_template_names_are_looked_for() -> None:
    found = choose_format("auto", "auto", "", {**TOKENS, "<call|now>": 9, "<call|": 10}, TEMPLATE).token_ids
    assert set(found) == {"<think>", "</think>", "</call>", "<end>", "<bot>", "<call|"}, "as patterns write it, too"


def test_it_is_read_with_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_level().data.backend)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"response_template": TEMPLATE}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.response_template == TEMPLATE


HERMES: dict[str, Any] = {
    "start_anchor": "<bot>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {},
    },
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40)
@given(
    thought=st.none() | st.text("ab {}\n", min_size=1, max_size=8),
    said=st.text('ab {}"\n', max_size=8),
    calls=st.lists(st.tuples(st.sampled_from(["f", "get_weather"]), st.dictionaries(st.text(max_size=4), VALUES))),
    separators=st.sampled_from([(",", ":"), (", ", ": ")]),
)
def test_what_models_write_is_to_our_parser_what_it_is_to_transformers(
    thought: str | None, said: str, calls: list[tuple[str, dict[str, Any]]], separators: tuple[str, str]
) -> None:
    written = [json.dumps({"name": name, "arguments": values}, separators=separators) for name, values in calls]
    output = ("" if thought is None else f"<think>{thought}</think>") + said
    output += "".join(f"<tool_call>\n{one}\n</tool_call>" for one in written)

    def message_of(model: Model) -> Any:
        events = model.parse(output)
        names = [event.name for event in events if isinstance(event, Call)]
        arguments = [json.loads(event.text) for event in events if isinstance(event, Arguments)]
        reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
        content = "".join(event.text for event in events if isinstance(event, Content))
        return list(zip(names, arguments, strict=True)), reasoning, content

    ours = message_of(Model("hermes", "think"))
    assert ours == message_of(Model("auto", "auto", template=HERMES))
    assert ours == (calls, thought or "", said)
