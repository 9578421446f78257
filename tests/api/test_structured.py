"""Structured output end to end, on the embedded model: what ends by itself is valid, whatever happens meanwhile."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from graphgen import Choice, Engine, Grammar, InvalidRequestError, JsonSchema, Regex, RequestOutput, SamplingParams
from graphgen.calls.structured import Structured
from tests import schemas

SCHEMAS = [*schemas.BY_HAND, *(schemas.at_random(seed) for seed in range(200 - len(schemas.BY_HAND)))]
PROMPT = "To be, or not to be: "


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(device="cpu", dtype="float32", cpu_threads=1, max_num_seqs=64, num_pages=2000) as engine:
        yield engine


def check(schema: schemas.Schema, output: RequestOutput) -> None:
    try:
        value = json.loads(output.text)
    except ValueError as error:
        pytest.fail(f"{schema}: {output.text!r} is no JSON: {error}")
    formats = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=formats).validate(value)


def test_every_output_that_ends_by_itself_is_valid(engine: Engine) -> None:
    """Two hundred schemas; greedy ones and draws of every kind, all together."""
    rules: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 1.0, "top_k": 10, "seed": 2},
        {"temperature": 1.3, "top_p": 0.9, "frequency_penalty": 0.3, "seed": 3},
    ]
    sampling = [
        SamplingParams(structured=JsonSchema(schema), max_tokens=300, **rules[number % len(rules)])
        for number, schema in enumerate(SCHEMAS)
    ]
    outputs = engine.generate([PROMPT] * len(SCHEMAS), sampling)
    ended = [
        (schema, output) for schema, output in zip(SCHEMAS, outputs, strict=True) if output.finish_reason == "stop"
    ]
    assert len(ended) > 0.95 * len(SCHEMAS)
    for schema, output in ended:
        check(schema, output)
        assert not re.search(r"\s{9}", output.text), "white space is bounded"


def test_each_kind_of_structure_is_followed_and_cut_at_max_tokens(engine: Engine) -> None:
    cases: list[tuple[Structured, str]] = [
        (Regex("[0-9]{3}-(ab|cd){2,4}"), r"[0-9]{3}-(ab|cd){2,4}"),
        (Choice(["perhaps so", "never", 'a "quote"']), 'perhaps so|never|a "quote"'),
        (Grammar('start: "(" start ")" | /[xy]{1,3}/'), r"\(*[xy]{1,3}\)*"),
        (Grammar('root ::= "<" [a-c]+ ">" | "none"'), "<[a-c]+>|none"),
        (Regex("[0-9]{2}", after=" I"), r"(?s:.*?) I[0-9]{2}"),
    ]
    for structured, pattern in cases:
        for seed in range(3):
            drawn = SamplingParams(structured=structured, temperature=1.0, seed=seed, max_tokens=80)
            (output,) = engine.generate(PROMPT, drawn)
            if output.finish_reason == "stop":
                assert re.fullmatch(pattern, output.text), output.text
    (cut,) = engine.generate(PROMPT, SamplingParams(structured=Regex("[a-z]{50,60}"), max_tokens=3))
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 3)
    assert re.fullmatch("[a-z]{3,50}", cut.text)
    (stopped,) = engine.generate(PROMPT, SamplingParams(structured=Regex("ab{50}c"), stop="bbb", max_tokens=80))
    assert (stopped.finish_reason, stopped.text) == ("stop", "a")


def test_samples_of_one_prompt_follow_it_each_for_itself(engine: Engine) -> None:
    schema = schemas.BY_HAND[0]
    sampling = SamplingParams(structured=JsonSchema(json.dumps(schema)), n=4, seed=5, max_tokens=300)
    outputs = engine.generate(PROMPT, sampling)
    assert len({output.text for output in outputs}) > 1
    for output in outputs:
        check(schema, output)


@pytest.mark.parametrize(
    ("structured", "words"),
    [
        (JsonSchema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (JsonSchema({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}), "uniqueItems"),
        (JsonSchema({"$ref": "https://example.org/schema"}), "https://example.org/schema"),
        (JsonSchema("{"), "no JSON"),
        (JsonSchema(False), "no object"),
        (JsonSchema({"enum": []}), "empty"),
        (Regex("(a"), "unclosed group"),
        (Grammar("start: nobody"), "nobody"),
        (
            JsonSchema({"allOf": [{"type": "string", "pattern": f".*a{i}.*"} for i in range(40)]}),
            "does not compile within",
        ),
        (JsonSchema('{"items":' * 5000 + "{}" + "}" * 5000), "recursion"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_its_reason_and_harms_nobody(
    engine: Engine, structured: Any, words: str
) -> None:
    with engine.stream(PROMPT, SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)) as stream:
        next(stream)
        with pytest.raises(InvalidRequestError, match="structured: ") as caught:
            engine.generate(PROMPT, SamplingParams(structured=structured))
        assert words in str(caught.value)
        assert len(str(caught.value)) < 2000
        assert sum(len(piece.token_ids) for piece in stream) == 199
    (output,) = engine.generate(PROMPT, SamplingParams(structured=Choice(["yes"]), max_tokens=9))
    assert output.text == "yes"


def test_a_worker_that_is_killed_in_the_middle_of_an_object_is_replaced_and_the_object_goes_on(engine: Engine) -> None:
    greedy = [SamplingParams(structured=JsonSchema(one), temperature=0, max_tokens=300) for one in schemas.BY_HAND[:8]]
    wanted = [output.token_ids for output in engine.generate([PROMPT] * 8, greedy)]
    streams = [engine.stream(PROMPT, one) for one in greedy]
    begun = [next(stream) for stream in streams]
    begun += [next(streams[0]) for _ in range(3)]
    restarts = engine.stats().worker_restarts
    os.kill(engine.pids["worker-0"], signal.SIGKILL)
    found = [list(piece.token_ids) for piece in begun[:8]]
    for piece in begun[8:]:
        found[0] += piece.token_ids
    for tokens, stream in zip(found, streams, strict=True):
        for piece in stream:
            tokens += piece.token_ids
    assert [tuple(tokens) for tokens in found] == wanted
    deadline_s = time.monotonic() + 5
    while engine.stats().worker_restarts == restarts and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert engine.stats().worker_restarts == restarts + 1


def test_requests_that_contradict_a_structure_are_refused() -> None:
    for more in ({"ignore_eos": True}, {"min_tokens": 1}, {"structured": "yes"}):
        with pytest.raises(InvalidRequestError, match=next(iter(more))):
            SamplingParams(**{"structured": Choice(["a"]), **more})  # type: ignore[arg-type]  # wrong types are a point
    for bad in (
        lambda: Choice([]),
        lambda: Choice("abc"),
        lambda: Choice(["a", ""]),
        lambda: Regex(""),
        lambda: Regex("a" * (1 << 18)),
    ):
        with pytest.raises(InvalidRequestError, match="structured: "):
            bad()
    with pytest.raises(InvalidRequestError, match="no JSON"):
        JsonSchema({"const": float("nan")})
