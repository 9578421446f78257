"""The functions that a chat may call: what the template is told of them and what the parser is to find.

Owns the checks of `tools` and `tool_choice`. Used by the endpoint of chats.
"""

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from graphgen.calls.prompts import MAX_DEPTH
from graphgen.gateway.errors import ApiError
from graphgen.gateway.output_parsers.json_calls import Tools
from graphgen.gateway.schema import ChatRequest

CHOICES = "none", "auto", "required"
MAX_CALLS = 32
"""In an output that must be calls: what has no end would be written to max_tokens."""


class ToolUse(Struct, frozen=True):
    """What a request wants of its tools."""

    described: list[dict[str, Any]] | None
    """For the chat template."""
    schemas: Tools | None
    """For the parser; None: outputs have no calls."""
    one_call: bool
    """At most one."""
    forced: dict[str, Any] | None = None
    """The JSON schema of the list of calls that the output must be; None: the model may write what it likes."""
    is_named: bool = False
    """The request has named the function: that it is called is no news."""


def read_tools(request: ChatRequest, has_parser: bool) -> ToolUse:
    """has_parser: of the calls of this model. Raises ApiError."""
    choice = _choice(request.tool_choice)
    one_call = request.parallel_tool_calls is False
    if choice == "none":
        return ToolUse(None, None, one_call)
    schemas: dict[str, Mapping[str, Any]] = {}
    for number, tool in enumerate(request.tools or ()):
        name, schema = _described(number, tool)
        if name in schemas:
            raise _refused(f"tools[{number}]", f"there is a tool {name!r:.100} before it: give each a name of its own")
        schemas[name] = schema
    if choice not in CHOICES and choice not in schemas:
        known = ", ".join(schemas) or "none"
        raise _refused("tool_choice", f"{choice!r:.100} is not among the tools: name one of them ({known:.100})")
    if choice == "required" and not schemas:
        raise _refused("tool_choice", "a call is required and there are no tools: give tools")
    if not schemas:
        return ToolUse(None, None, one_call)
    if choice != "auto":
        is_named = choice != "required"
        callable_ones = {choice: schemas[choice]} if is_named else schemas
        forced = calls_schema(callable_ones, one_call or is_named)
        return ToolUse(request.tools, schemas, one_call, forced, is_named)
    if not has_parser:
        text = (
            "the form in which this model writes its calls is not known: start the server with --tool-parser, or say"
            ' "tool_choice": "none"'
        )
        raise ApiError(400, f"tools: {text}", "unsupported_parameter", "tools")
    return ToolUse(request.tools, schemas, one_call)


def calls_schema(schemas: Tools, one_call: bool) -> dict[str, Any]:
    """Of a list of calls, as `output_parsers.json_calls.read_json_list` reads it. Raises ApiError."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{number}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for number, name in enumerate(schemas)
    ]
    return {
        "type": "array",
        "items": {"anyOf": calls},
        "minItems": 1,
        "maxItems": 1 if one_call else MAX_CALLS,
        "$defs": {str(number): _moved(one, f"#/$defs/{number}") for number, one in enumerate(schemas.values())},
    }


def _moved(schema: Any, root: str, depth: int = 0) -> Any:  # of any JSON
    """A schema whose root is elsewhere in the document now: its references are from there. Raises ApiError."""
    if depth > MAX_DEPTH:
        raise _refused("tools", f"parameters are nested more than {MAX_DEPTH} deep: make them flatter")
    if isinstance(schema, Mapping):
        return {
            key: root + value[1:] if key == "$ref" and isinstance(value, str) and value.startswith("#") else moved
            for key, value in schema.items()
            for moved in (_moved(value, root, depth + 1),)
        }
    return [_moved(one, root, depth + 1) for one in schema] if isinstance(schema, list) else schema


def _choice(given: str | Mapping[str, Any] | None) -> str:
    """One of CHOICES, or the name of a function."""
    if given is None:
        return "auto"
    if isinstance(given, str):
        if given not in CHOICES:
            raise _refused(
                "tool_choice", f"{given!r:.100} is no choice: give one of {', '.join(CHOICES)}, or a function"
            )
        return given
    function = given.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if given.get("type") != "function" or not isinstance(name, str):
        form = '{"type": "function", "function": {"name": ...}}'
        raise _refused("tool_choice", f"{given!r:.100} names no function: give {form}")
    return name


def _described(number: int, tool: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """(its name, the JSON schema of its parameters)."""
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
        form = '{"type": "function", "function": {"name": ..., "parameters": ...}}'
        raise _refused(f"tools[{number}]", f"{tool!r:.100} is no function: give {form}")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise _refused(f"tools[{number}]", f"its name is {name!r:.100}: give text")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise _refused(f"tools[{number}]", f"its parameters are {parameters!r:.100}: give a JSON schema, or nothing")
    return name, parameters or {"type": "object"}


def _refused(param: str, text: str) -> ApiError:
    return ApiError(400, f"{param}: {text}", "invalid_request", param)
