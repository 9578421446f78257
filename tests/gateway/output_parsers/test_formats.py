"""Which format a model is taken to write, by its chat template and its tokens."""

from typing import get_args

import pytest

from graphgen.gateway.output_parsers import deepseek
from graphgen.gateway.output_parsers.formats import PLAIN, ReasoningParser, ToolParser, choose_format

QWEN = (
    "For each function call, return a json object within <tool_call></tool_call> XML tags:\\n<tool_call>\\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>'
)
TEMPLATES = [
    (QWEN, [], "hermes", None),
    (QWEN + "{% if '</think>' in content %}<think>{% endif %}", [], "hermes", "think"),
    (QWEN + "{% if '</think>' in content %}", ["<think>", "</think>"], "hermes", "think"),
    ("<tool_call>\\n<function=example>\\n<parameter=a>{{ tool_call.arguments }}", [], "qwen3_coder", None),
    ("<tool_call>{{ name }}<arg_key>{{ k }}</arg_key>{{ tool_call.arguments }}", [], "glm", None),
    ('<minimax:tool_call><invoke name="{{ name }}">', [], "minimax", None),
    ("<|tool_calls_section_begin|><tool_call>{{ tool_call.arguments }}", [], None, None),
    ("{%- if '<|start_header_id|>' %}{{- '\"parameters\": ' }}", [], "llama3_json", None),
    ("{{ '[TOOL_CALLS]' }}", ["[THINK]", "[/THINK]"], "mistral", "mistral"),
    (f"{deepseek.CALLS}{deepseek.SEPARATOR}<think></think>", [], "deepseek", "think"),
    ("<|start|>assistant<|channel|>analysis<|message|>", [], "harmony", "harmony"),
    ("{{ messages }}", [], None, None),
    ("", [], None, None),
]


@pytest.mark.parametrize(("template", "tokens", "calls", "reasoning"), TEMPLATES)
def test_a_template_shows_the_format(
    template: str, tokens: list[str], calls: str | None, reasoning: str | None
) -> None:
    ids = {token: number for number, token in enumerate(tokens)}
    found = choose_format("auto", "auto", template, ids)
    assert (found.calls, found.reasoning) == (calls, reasoning)


@pytest.mark.parametrize("calls", get_args(ToolParser)[2:])
@pytest.mark.parametrize("reasoning", get_args(ReasoningParser)[2:])
def test_what_an_operator_names_is_taken(calls: ToolParser, reasoning: ReasoningParser) -> None:
    tokens = {"<think>": 1, "<tool_call>": 2, "other": 3}
    found = choose_format(calls, reasoning, QWEN, tokens)
    assert (found.calls, found.reasoning) == (calls, reasoning)
    assert ("<think>" in found.token_ids) == (reasoning == "think"), "the markers of these parsers alone"
    assert "other" not in found.token_ids
    assert choose_format("none", "none", QWEN, tokens) == PLAIN
