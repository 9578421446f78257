"""What a request says of the structure of its answers, in any of the ways in which clients say it.

Owns the reading of `response_format` (OpenAI's), `structured_outputs` and `guided_*` (vLLM's), and of our own
`structured_after`. Whether a structure can be followed, the server says. Used by `graphgen.gateway.generation`.
"""

from collections.abc import Mapping
from typing import Any

from graphgen.calls.structured import Choice, Grammar, JsonSchema, Regex, Structured
from graphgen.gateway.errors import ApiError
from graphgen.gateway.schema import Generation
from graphgen.ipc.errors import InvalidRequestError

_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_ANY_OBJECT = {"type": "object"}


def structured_of(request: Generation) -> Structured | None:
    """None: the answer is free. Raises ApiError."""
    given: dict[str, tuple[str, Any]] = {}  # name of the field: kind, and its value
    if request.response_format is not None:
        found = _of_format(request.response_format)
        if found is not None:
            given["response_format"] = found
    if request.structured_outputs is not None:
        given["structured_outputs"] = _of_outputs(request.structured_outputs)
    for kind in ("json", "regex", "choice", "grammar"):
        value = getattr(request, f"guided_{kind}")
        if value is not None:
            given[f"guided_{kind}"] = kind, value
    if len(given) > 1:
        raise _wrong(next(iter(given)), f"{' and '.join(given)} are given: say once what the answer must follow")
    if not given:
        if request.structured_after:
            raise _wrong("structured_after", "no structure is given that could begin there: leave it out")
        return None
    ((param, (kind, value)),) = given.items()
    try:
        return _made(param, kind, value, request.structured_after or "")
    except InvalidRequestError as error:
        raise ApiError(400, str(error), "invalid_request", param) from None


def _of_format(given: Mapping[str, Any]) -> tuple[str, Any] | None:
    match given.get("type"):
        case "text":
            return None
        case "json_object":
            return "json_object", True
        case "json_schema":
            described = given.get("json_schema")
            if not isinstance(described, Mapping) or described.get("schema") is None:
                form = '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
                raise _wrong("response_format", f"no schema is given: give {form}")
            return "json", described["schema"]  # strict or not, it is kept
        case kind:
            raise _wrong("response_format", f"its type is {kind!r:.100}: give text, json_object or json_schema")


def _of_outputs(given: Mapping[str, Any]) -> tuple[str, Any]:
    """vLLM's; what it says of white space and of back ends says nothing here unless it is set."""
    asked = {name: value for name, value in given.items() if value is not None and value is not False}
    unknown = [name for name in asked if name not in _KINDS]
    if unknown or len(asked) != 1:
        raise _wrong(
            "structured_outputs",
            f"it says {', '.join(asked) or 'nothing':.100}: give exactly one of {', '.join(_KINDS)}",
        )
    return next(iter(asked.items()))


def _made(param: str, kind: str, value: Any, after: str) -> Structured:
    """Raises InvalidRequestError, and ApiError for a value of a wrong type."""
    match kind, value:
        case "json_object", True:
            return JsonSchema(_ANY_OBJECT, after)
        case "json", str() | Mapping() | bool():
            return JsonSchema(value, after)
        case "regex", str():
            return Regex(value, after)
        case "choice", list():
            return Choice(value, after)
        case "grammar", str():
            return Grammar(value, after)
    raise _wrong(param, f"{kind} is {value!r:.100}: give {'a list of texts' if kind == 'choice' else 'text'}")


def _wrong(param: str, text: str) -> ApiError:
    return ApiError(400, f"{param}: {text}", "invalid_request", param)
