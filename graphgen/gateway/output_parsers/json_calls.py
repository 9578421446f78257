"""Calls that are written as JSON: `{"name": "f", "arguments": {...}}`, one or a list, between whatever markers.

The formats of Hermes and Qwen, Llama 3, Mistral, and what a grammar makes any model write.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from graphgen.gateway.output_parsers.events import Arguments, Content
from graphgen.gateway.output_parsers.reading import Reader, Reading

Markers = Mapping[str, str]
"""What a marker is in the text: its symbol, or itself."""
Tools = Mapping[str, Mapping[str, Any]]
"""The JSON schema of the parameters of each function that the client has described."""

Read = Callable[[Reader, Markers, Tools], Reading[None]]
"""A parser of calls: reads an output behind its reasoning to its end."""

_ARGUMENTS = '"arguments"', '"parameters"'


def read_hermes(reader: Reader, markers: Markers, tools: Tools) -> Reading[None]:
    """`<tool_call>{...}</tool_call>`, any number of them, with text between."""
    opening, closing = markers["<tool_call>"], markers["</tool_call>"]
    while (yield from reader.copy_until(Content, opening)) is not None:
        if (yield from read_call(reader)):
            yield from reader.read_space()
            if (yield from reader.reads(",")):  # further keys
                yield from reader.read_until(closing)
            else:
                yield from reader.reads(closing)
            continue
        body, end = yield from reader.read_until(closing)
        if not say_call(reader, body):
            reader.say(Content, opening + body + (end or ""))


def read_llama3(reader: Reader, markers: Markers, tools: Tools) -> Reading[None]:
    """An output that is a call, or several with `;` between them, perhaps behind `<|python_tag|>`. Else it is text."""
    tag = markers["<|python_tag|>"]
    reader.record()
    yield from reader.read_space()
    has_tag = yield from reader.reads(tag)
    begun = reader.keep()
    is_call = yield from read_call(reader)
    if not is_call:
        reader.say(Content, begun)
    while is_call:
        reader.record()
        yield from reader.read_space()
        if not (yield from reader.reads(";")):
            reader.rewind()
            break
        reader.keep()
        is_call = yield from read_call(reader)
    if has_tag:
        yield from reader.copy_until(Content)
    else:
        while (yield from reader.copy_until(Content, tag)) is not None:
            if not (yield from read_call(reader)):
                reader.say(Content, tag)


def read_mistral(reader: Reader, markers: Markers, tools: Tools) -> Reading[None]:
    """`[TOOL_CALLS]` and a list of calls, or a name and, perhaps behind `[ARGS]`, its arguments."""
    opening, call_id, arguments = markers["[TOOL_CALLS]"], markers["[CALL_ID]"], markers["[ARGS]"]
    while (yield from reader.copy_until(Content, opening)) is not None:
        if (yield from read_list(reader)):
            continue
        reader.record()
        yield from reader.read_space()
        name = yield from reader.read_name()
        if (yield from reader.reads(call_id)):
            yield from reader.read_name()
        yield from reader.reads(arguments)
        yield from reader.read_space()
        if name and (yield from reader.comes("{")):
            reader.keep()
            reader.begin_call(name)
            yield from reader.copy_json()
        else:
            reader.rewind()
            reader.say(Content, opening)


def read_json_list(reader: Reader) -> Reading[None]:
    """A list of calls and nothing else, as a grammar asks for it."""
    yield from read_list(reader)


def read_list(reader: Reader) -> Reading[bool]:
    """Calls in brackets. False: something else comes, and nothing was read."""
    reader.record()
    yield from reader.read_space()
    if not (yield from reader.reads("[")):
        reader.rewind()
        return False
    yield from reader.read_space()
    if not (yield from reader.comes("{")):
        reader.rewind()
        return False
    reader.keep()
    while True:
        if not (yield from read_call(reader)):
            parts: list[str] = []
            yield from reader.read_space()
            if (yield from reader.comes("{")):
                yield from reader.copy_json(parts.append)
            if not say_call(reader, "".join(parts)):
                reader.say(Content, "".join(parts))
        yield from reader.read_space()
        if not (yield from reader.reads(",")):
            yield from reader.reads("]")
            return True


def read_call(reader: Reader) -> Reading[bool]:
    """A call whose name comes first, as most models write it: it can be passed on while it comes. False: something
    else comes, and nothing was read."""
    reader.record()
    name = yield from _read_head(reader)
    if not name:
        reader.rewind()
        return False
    reader.keep()
    reader.begin_call(name)
    yield from reader.copy_json()
    yield from reader.read_space()
    yield from reader.reads("}")
    return True


def say_call(reader: Reader, text: str) -> bool:
    """The events of a whole call, its keys in any order. False: it is none."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if not isinstance(call, dict) or not isinstance(name := call.get("name"), str) or not name:
        return False
    arguments: object = next((call[key] for quoted in _ARGUMENTS if (key := quoted.strip('"')) in call), {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return False
    if not isinstance(arguments, dict):
        return False
    reader.begin_call(name)
    reader.say(Arguments, json.dumps(arguments, ensure_ascii=False))
    return True


def _read_head(reader: Reader) -> Reading[str]:
    """The name in `{"name": "f", "arguments": `, read up to the arguments; empty: something else came."""
    for literal in ("{", '"name"', ":", '"'):
        yield from reader.read_space()
        if not (yield from reader.reads(literal)):
            return ""
    name = yield from reader.read_name()
    for literal in ('"', ","):
        if not (yield from reader.reads(literal)):
            return ""
        yield from reader.read_space()
    if not ((yield from reader.reads(_ARGUMENTS[0])) or (yield from reader.reads(_ARGUMENTS[1]))):
        return ""
    yield from reader.read_space()
    if not (yield from reader.reads(":")):
        return ""
    yield from reader.read_space()
    return name if (yield from reader.comes("{")) else ""
