"""JSON schemas of the kinds that services send: written by hand, and made at random from the same parts.

Every one has a bound on the length of what it allows, so that a small model comes to the end of it.
"""

import random
from typing import Any

Schema = dict[str, Any]  # JSON


def closed(properties: Schema, required: list[str] | None = None) -> Schema:
    """An object of these properties, all of them required unless it is said which."""
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


WORD = {"type": "string", "pattern": "^[a-z]{1,8}$"}
TEXT = {"type": "string", "maxLength": 12}

BY_HAND: list[Schema] = [
    closed({"name": TEXT, "age": {"type": "integer", "minimum": 0, "maximum": 130}}),
    closed(
        {"city": {"enum": ["Rome", "Verona", "Padua"]}, "celsius": {"type": "integer", "minimum": -50, "maximum": 60}}
    ),
    closed({"answer": {"type": "boolean"}}),
    closed({"nothing": {"type": "null"}}),
    closed({"always": {"const": {"a": [1, 2]}}}),
    closed({"either": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 9}, {"enum": ["many", "few"]}]}}),
    closed({"a": WORD, "b": WORD, "c": WORD}, ["b"]),
    closed({"date": {"type": "string", "format": "date"}}),
    closed({"time": {"type": "string", "format": "time"}}),
    closed({"id": {"type": "string", "format": "uuid"}}),
    closed({"address": {"type": "string", "format": "ipv4"}}),
    closed({"code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}}),
    closed({"phone": {"type": "string", "pattern": "^\\+[1-9][0-9]{6,9}$"}}),
    closed({"exact": {"type": "string", "minLength": 3, "maxLength": 3}}),
    closed(
        {
            "list": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": 9},
                "minItems": 2,
                "maxItems": 4,
            }
        }
    ),
    closed({"pair": {"type": "array", "prefixItems": [WORD, {"type": "boolean"}], "items": False, "minItems": 2}}),
    closed({"open": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}}),
    closed({"steps": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 50}}),
    closed({"outer": closed({"inner": closed({"leaf": {"enum": [1, 2, 3]}})})}),
    {"type": "array", "items": closed({"k": {"enum": ["x", "y"]}}), "minItems": 1, "maxItems": 3},
    {"type": "integer", "minimum": -7, "maximum": 7},
    {"enum": ["red", "green", "blue", 3, None, True]},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 20},
    {"const": "fixed"},
    {"allOf": [closed({"a": {"type": "integer"}}), {"properties": {"a": {"minimum": 3, "maximum": 5}}}]},
    {
        "oneOf": [
            closed({"kind": {"const": "a"}, "x": {"type": "boolean"}}),
            closed({"kind": {"const": "b"}, "y": WORD}),
        ]
    },
    {
        "$defs": {"point": closed({"x": {"type": "integer", "minimum": 0, "maximum": 9}, "y": {"enum": [0, 1]}})},
        **closed({"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}}),
    },
    {
        "$defs": {"leaf": closed({"value": {"type": "integer", "minimum": 0, "maximum": 9}})},
        "type": "array",
        "items": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]},
        "maxItems": 3,
    },
    closed({"flags": closed({"on": {"type": "boolean"}, "off": {"type": "boolean"}}, [])}),
    {
        "type": "object",
        "patternProperties": {"^k[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    closed({"tool": {"const": "search"}, "arguments": closed({"query": TEXT, "limit": {"enum": [5, 10]}})}),
    closed({"über": {"enum": ["ähnlich", "größer", "日本"]}, 'with "quotes"': {"enum": ["a\nb", "tab\t"]}}),
]


def at_random(seed: int) -> Schema:
    """One of a few levels."""
    return _object(random.Random(seed), 3)


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(
        ["id", "name", "kind", "size", "tags", "owner", "note", "next", "is_new", "x"], rng.randint(1, 3)
    )
    properties = {name: _any(rng, depth - 1) for name in names}
    required = [name for name in names if rng.random() < 0.8]
    schema = closed(properties, required)
    if rng.random() < 0.2:
        name = rng.choice(names)
        schema["$defs"] = {"shared": schema["properties"][name]}
        schema["properties"][name] = {"$ref": "#/$defs/shared"}
        if "$defs" in schema["$defs"]["shared"]:
            del schema["$defs"], schema["properties"][name]
            schema["required"] = [one for one in required if one != name]
    return schema


def _any(rng: random.Random, depth: int) -> Schema:
    kinds = [_string, _integer, _number, _enum, _boolean] + [_array, _object_without_defs, _union] * (depth > 0)
    return rng.choice(kinds)(rng, depth)


def _object_without_defs(rng: random.Random, depth: int) -> Schema:
    """References are to the root."""
    names = rng.sample(["a", "b", "c", "d"], rng.randint(1, 2))
    return closed({name: _any(rng, depth - 1) for name in names})


def _string(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(0, 3)
    return rng.choice(
        [
            {"type": "string", "minLength": least, "maxLength": least + rng.randint(1, 8)},
            {"type": "string", "pattern": rng.choice(["^[a-f0-9]{4}$", "^(yes|no|maybe)$", "^[A-Z][a-z]{1,5}$"])},
            {"type": "string", "format": "date"},
        ]
    )


def _integer(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(-1000, 1000)
    return {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 5000)}


def _number(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(-10, 10)
    return {"enum": [least / 4, least / 2 + 0.125]} if rng.random() < 0.5 else _integer(rng, depth)


def _enum(rng: random.Random, depth: int) -> Schema:
    return {"enum": rng.sample(["to", "be", "or not", "", 1, 2.5, None, False, "Ω"], rng.randint(1, 4))}


def _boolean(rng: random.Random, depth: int) -> Schema:
    return {"type": rng.choice(["boolean", "null"])}


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth - 1), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _union(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth - 1), _any(rng, depth - 1)]}
