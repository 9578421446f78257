"""Calls whose arguments are written between tags, one tag for each parameter: those of Qwen3-Coder.

Their values are text, and what the schema of the function says of a parameter decides what they are in JSON.
"""

import json
from typing import Any, NoReturn

from graphgen.gateway.output_parsers.events import Arguments, Content
from graphgen.gateway.output_parsers.json_calls import Markers, Tools
from graphgen.gateway.output_parsers.reading import Reader, Reading

_FUNCTION, _END_FUNCTION = "<function=", "</function>"
_PYTHON_NAMES = {"True": True, "False": False, "None": None}
_PARAMETER = "<parameter="
_ENDS = "\n</parameter>", "</parameter>"
"""The newline before the tag is not part of the value."""


def read_qwen3_coder(reader: Reader, markers: Markers, tools: Tools) -> Reading[None]:
    """`<tool_call><function=f><parameter=a>1</parameter></function></tool_call>`; the outer tags may be missing."""
    opening, closing = markers["<tool_call>"], markers["</tool_call>"]
    while (marker := (yield from reader.copy_until(Content, opening, _FUNCTION))) is not None:
        reader.record()
        has_function = marker == _FUNCTION
        if not has_function:
            yield from reader.read_space()
            has_function = yield from reader.reads(_FUNCTION)
        name = (yield from reader.read_name()) if has_function else ""
        if not name or not (yield from reader.reads(">")):
            reader.rewind()
            reader.say(Content, marker)
            continue
        reader.keep()
        reader.begin_call(name)
        yield from _read_parameters(reader, closing, _types_of(tools, name))
        yield from reader.read_space()
        yield from reader.reads(closing)


def _read_parameters(reader: Reader, closing: str, types: dict[str, tuple[str, ...]]) -> Reading[None]:
    """The arguments, whose JSON ends only where the call does."""
    reader.say(Arguments, "{")
    comma = ""
    while True:
        _, marker = yield from reader.read_until(_PARAMETER, _END_FUNCTION, closing)
        if marker is None:
            return
        if marker != _PARAMETER:
            reader.say(Arguments, "}")
            return
        key, _ = yield from reader.read_until(">")
        yield from reader.reads("\n")
        head = f"{comma}{json.dumps(key, ensure_ascii=False)}: "
        if types.get(key) == ("string",):
            reader.say(Arguments, f'{head}"')
            if (yield from reader.copy_until(_inside_string, *_ENDS)) is None:
                return
            reader.say(Arguments, '"')
        else:
            value, end = yield from reader.read_until(*_ENDS)
            if end is None:
                return
            reader.say(Arguments, head + to_json(value, types.get(key, ())))
        comma = ", "


def _inside_string(text: str) -> Arguments:
    """Text of a parameter as a string of JSON has it: a file that a model writes is passed on while it comes."""
    return Arguments(json.dumps(text, ensure_ascii=False)[1:-1])


def _types_of(tools: Tools, name: str) -> dict[str, tuple[str, ...]]:
    properties = tools.get(name, {}).get("properties")
    return {key: types_in(one) for key, one in properties.items()} if isinstance(properties, dict) else {}


def types_in(schema: Any) -> tuple[str, ...]:
    """The types that a schema names for a value, those of its alternatives too."""
    if not isinstance(schema, dict):
        return ()
    stated = schema.get("type")
    types = [stated] if isinstance(stated, str) else stated if isinstance(stated, list) else []
    for word in ("anyOf", "oneOf"):
        for choice in schema.get(word) or ():
            types = [*types, *types_in(choice)]
    return tuple(one for one in types if isinstance(one, str))


def to_json(value: str, types: tuple[str, ...]) -> str:
    """The JSON of a value that was written as text. Without a type it is what it reads as; what does not fit is
    text."""
    try:
        found = json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError):
        found = _PYTHON_NAMES.get(value.strip(), value)
    if types and (isinstance(found, str) or not any(_is_a(found, one) for one in types)):
        found = value
    return json.dumps(found, ensure_ascii=False)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _is_a(value: object, name: str) -> bool:
    match name:
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "object":
            return isinstance(value, dict)
        case "array":
            return isinstance(value, list)
        case _:
            return False
