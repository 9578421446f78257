"""Structures over the protocol: what is written is what is read, and a server that has none is not asked."""

import pytest

from graphgen import Choice, Grammar, InvalidRequestError, JsonSchema, Regex, SamplingParams
from graphgen.calls.structured import Structured, of_wire, to_wire
from graphgen.ipc.ggp import messages
from graphgen.remote.requests import wire_sampling
from graphgen.server.frontend.prepare import sampling_params

KINDS: list[Structured] = [
    JsonSchema('{"type": "object"}'),
    Regex("[a-z]+", after="</think>"),
    Choice(("yes", "no")),
    Grammar('start: "a"'),
]


@pytest.mark.parametrize("structured", KINDS, ids=lambda one: type(one).__name__)
def test_a_structure_arrives_as_it_was_sent(structured: Structured) -> None:
    assert of_wire(to_wire(structured)) == structured
    assert sampling_params(wire_sampling(SamplingParams(structured=structured)), "").structured == structured


def test_a_schema_of_a_program_arrives_as_its_text_with_its_keys_in_order() -> None:
    schema = {"type": "object", "properties": {"z": {"const": "ä"}, "a": {}}}
    sent = to_wire(JsonSchema(schema))
    assert (sent.kind, sent.text.index('"z"') < sent.text.index('"a"')) == ("json_schema", True)


@pytest.mark.parametrize(
    "wire",
    [
        messages.Structured(kind="choice"),
        messages.Structured(kind="choice", options=["a"], text="a"),
        messages.Structured(kind="regex", text="a", options=["a"]),
        messages.Structured(kind="grammar"),
    ],
)
def test_what_does_not_belong_to_a_kind_is_refused(wire: messages.Structured) -> None:
    with pytest.raises(InvalidRequestError, match="structured: "):
        of_wire(wire)
