"""How many tokens of a structured output does its grammar leave no choice of? So many could be appended undrawn.

    python -m benchmarks.forced_tokens tokenizer.json [...]

Outputs of common schemas are followed token by token, with the white space that Python writes, with none, and over
lines. A run is a row of forced tokens: one chunk in their place would save a step for each token of the run but the
last. The grammars are those of the engine, in which white space is free up to eight characters, and the same with none.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from benchmarks.options import make_parser, run_script
from benchmarks.report import Row, machine, show
from graphgen.calls.structured import JsonSchema
from graphgen.requests.grammar_builder import Job, build

TEXT = {"type": "string"}


def closed(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "tool call": (
        closed(name={"const": "get_weather"}, arguments=closed(city=TEXT, unit={"enum": ["celsius", "fahrenheit"]})),
        {"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}},
    ),
    "record": (
        closed(
            first_name=TEXT,
            last_name=TEXT,
            age={"type": "integer"},
            email=TEXT,
            is_active={"type": "boolean"},
            address=closed(street=TEXT, city=TEXT, postal_code=TEXT),
        ),
        {
            "first_name": "Juliet",
            "last_name": "Capulet",
            "age": 13,
            "email": "juliet@capulet.it",
            "is_active": True,
            "address": {"street": "Via Cappello 23", "city": "Verona", "postal_code": "37121"},
        },
    ),
    "list of items": (
        closed(items={"type": "array", "items": closed(product_name=TEXT, quantity={"type": "integer"})}),
        {"items": [{"product_name": f"Rose water, {size} ml", "quantity": size // 10} for size in (50, 100, 200)]},
    ),
    "a judgement": (
        closed(label={"enum": ["positive", "negative", "neutral"]}, reason=TEXT),
        {"label": "negative", "reason": "The guest waited an hour for a cold soup and was not asked how it was."},
    ),
}
WRITTEN: dict[str, dict[str, Any]] = {
    "a space": {},
    "none": {"separators": (",", ":")},
    "over lines": {"indent": 2},
}


def forced_runs(tokenizer: LLTokenizer, grammar: str, token_ids: Sequence[int]) -> list[int]:
    """How long each is. Raises SystemExit where the grammar does not take the tokens."""
    matcher = LLMatcher(tokenizer, grammar)
    runs: list[int] = []
    at = 0
    while at < len(token_ids):
        forced = matcher.compute_ff_tokens()
        length = len(forced) if list(token_ids[at : at + len(forced)]) == forced else 0
        if length:
            runs.append(length)
        if not matcher.consume_tokens(list(token_ids[at : at + max(1, length)])):
            raise SystemExit(f"the grammar does not take token {at}: {matcher.get_error()}")
        at += max(1, length)
    return runs


def rows_of(path: str) -> list[Row]:
    backend = Tokenizer.from_file(path)
    tokenizer = LLTokenizer(backend.to_str())
    rows: list[Row] = []
    for space, written in WRITTEN.items():
        for name, (schema, value) in CASES.items():
            token_ids = backend.encode(json.dumps(value, **written), add_special_tokens=False).ids
            grammar = json.loads(build(Job(JsonSchema(schema))))
            runs = forced_runs(tokenizer, json.dumps(grammar), token_ids)
            row: dict[str, object] = {
                "output": name,
                "white space": space,
                "tokens": len(token_ids),
                "forced": sum(runs),
                "steps saved": sum(runs) - len(runs),
            }
            if space == "none":
                grammar["grammars"][1]["json_schema"]["x-guidance"] = {"whitespace_flexible": False}
                runs = forced_runs(tokenizer, json.dumps(grammar), token_ids)
                row["forced, were it asked for"] = sum(runs)
                row["saved"] = sum(runs) - len(runs)
            rows.append(row)
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("tokenizers", nargs="+", help="tokenizer.json files")
    for path in parser.parse_args().tokenizers:
        show(f"Forced tokens, {Path(path).name}", rows_of(path), machine("cpu"))


if __name__ == "__main__":
    run_script(main)
