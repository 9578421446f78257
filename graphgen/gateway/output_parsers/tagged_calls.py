"""Calls whose arguments are written between tags, a pair for each parameter: Qwen3-Coder, GLM, MiniMax.

Their values are text, and what the schema of the function says of a parameter decides what they are in JSON.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from graphgen.gateway.output_parsers.events import Arguments, Content
from graphgen.gateway.output_parsers.json_calls import Markers, Read, Tools
from graphgen.gateway.output_parsers.reading import Reader, Reading

_PYTHON_NAMES = {"True": True, "False": False, "None": None}


class Tags(NamedTuple):
    """How a format writes a call. What is before a name or a key may be empty."""

    opening: str
    closing: str
    """Around one call or several, and a special token of most models."""
    calls: tuple[str, str]
    """Before and behind the name of a function."""
    end_call: str
    keys: tuple[str, str]
    """Before and behind the name of a parameter."""
    value: str
    """Between that and the value, behind spaces; may be empty."""
    end_values: tuple[str, ...]

    may_lack_outer: bool = False
    """Models forget the outer tags."""

    @property
    def has_own_tags(self) -> bool:
        """Whether a call is told by more than the outer tags: there may be several in these."""
        return self.calls[0] != ""


QWEN3_CODER = Tags(
    opening="<tool_call>",
    closing="</tool_call>",
    calls=("<function=", ">"),
    end_call="</function>",
    keys=("<parameter=", ">"),
    value="",
    end_values=("\n</parameter>", "</parameter>"),  # the newline before the tag is not part of the value
    may_lack_outer=True,
)
MINIMAX = Tags(
    opening="<minimax:tool_call>",
    closing="</minimax:tool_call>",
    calls=('<invoke name="', '">'),
    end_call="</invoke>",
    keys=('<parameter name="', '">'),
    value="",
    end_values=("\n</parameter>", "</parameter>"),
)
GLM = Tags(
    opening="<tool_call>",
    closing="</tool_call>",
    calls=("", ""),
    end_call="</tool_call>",
    keys=("<arg_key>", "</arg_key>"),
    value="<arg_value>",
    end_values=("</arg_value>",),
)


def reader_of(tags: Tags) -> Read:
    """The parser of a format."""

    def read(reader: Reader, markers: Markers, tools: Tools) -> Reading[None]:
        opening, closing = markers[tags.opening], markers[tags.closing]
        begins = (opening, tags.calls[0]) if tags.may_lack_outer else (opening,)
        while (marker := (yield from reader.copy_until(Content, *begins))) is not None:
            name = yield from _read_name(reader, tags, closing, is_inside=marker == tags.calls[0])
            if not name:
                reader.say(Content, marker)
            while name:
                reader.begin_call(name)
                yield from _read_arguments(reader, tags, closing, types_of(tools, name))
                name = (yield from _read_name(reader, tags, closing)) if tags.has_own_tags else ""
            yield from reader.read_space()
            yield from reader.reads(closing)

    return read


def _read_name(reader: Reader, tags: Tags, closing: str, is_inside: bool = False) -> Reading[str]:
    """The name of a call, read up to its parameters; empty: something else comes, and nothing was read.

    is_inside: what stands before the name is read already.
    """
    reader.record()
    if not is_inside:
        yield from reader.read_space()
        if not (yield from reader.reads(tags.calls[0])):
            reader.rewind()
            return ""
    name = yield from reader.read_name()
    if not name or not (yield from reader.reads(tags.calls[1])):
        reader.rewind()
        return ""
    yield from reader.read_space()
    if not tags.has_own_tags and not (yield from reader.comes(tags.keys[0], closing)):
        reader.rewind()
        return ""
    reader.keep()
    return name


def _read_arguments(reader: Reader, tags: Tags, closing: str, types: Mapping[str, tuple[str, ...]]) -> Reading[None]:
    """The arguments, whose JSON ends only where the call does."""
    reader.say(Arguments, "{")
    comma = ""
    while True:
        _, marker = yield from reader.read_until(tags.keys[0], tags.end_call, closing)
        if marker is None:
            return
        if marker != tags.keys[0]:
            reader.say(Arguments, "}")
            return
        key, _ = yield from reader.read_until(tags.keys[1])
        if tags.value:
            yield from reader.read_until(tags.value)
        else:
            yield from reader.reads("\n")
        head = f"{comma}{json.dumps(key, ensure_ascii=False)}: "
        if types.get(key) == ("string",):
            reader.say(Arguments, f'{head}"')
            if (yield from reader.copy_until(_inside_string, *tags.end_values)) is None:
                return
            reader.say(Arguments, '"')
        else:
            value, end = yield from reader.read_until(*tags.end_values)
            if end is None:
                return
            reader.say(Arguments, head + to_json(value, types.get(key, ())))
        comma = ", "


def _inside_string(text: str) -> Arguments:
    """Text of a parameter as a string of JSON has it: a file that a model writes is passed on while it comes."""
    return Arguments(json.dumps(text, ensure_ascii=False)[1:-1])


def types_of(tools: Tools, name: str) -> dict[str, tuple[str, ...]]:
    properties = tools.get(name, {}).get("properties")
    return {key: types_in(one) for key, one in properties.items()} if isinstance(properties, dict) else {}


def types_in(schema: Any) -> tuple[str, ...]:
    """The types that a schema names for a value, those of its alternatives too."""
    if not isinstance(schema, dict):
        return ()
    stated = schema.get("type")
    types = [stated] if isinstance(stated, str) else stated if isinstance(stated, list) else []
    for word in ("anyOf", "oneOf"):
        choices = schema.get(word)
        for choice in choices if isinstance(choices, list) else ():
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
