"""Structures that a real model's outputs follow: what ends by itself is valid."""

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from graphgen import Engine, JsonSchema, SamplingParams
from tests import schemas

SCHEMAS = [*schemas.BY_HAND, *(schemas.at_random(seed) for seed in range(200 - len(schemas.BY_HAND)))]
FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[Engine]:
    with Engine(str(smollm2), device="cpu", dtype="float32", max_model_len=1024, max_num_seqs=64) as engine:
        yield engine


def test_every_output_that_ends_by_itself_is_valid_json_of_its_schema(engine: Engine) -> None:
    """Two hundred schemas, asked for in words, greedy and drawn."""
    chats = [
        [{"role": "user", "content": f"Invent an example. Answer in JSON of this schema:\n{json.dumps(schema)[:600]}"}]
        for schema in SCHEMAS
    ]
    sampling = [
        SamplingParams(structured=JsonSchema(schema), max_tokens=150, temperature=number % 2 * 0.8, seed=number)
        for number, schema in enumerate(SCHEMAS)
    ]
    outputs = engine.chat(chats, sampling)
    ended = [(schema, one) for schema, one in zip(SCHEMAS, outputs, strict=True) if one.finish_reason == "stop"]
    for schema, output in ended:
        value = json.loads(output.text)
        jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(value)
    assert len(ended) > 0.85 * len(SCHEMAS), "the others were cut at max_tokens"
