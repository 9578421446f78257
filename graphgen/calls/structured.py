"""What an output must follow: a JSON schema, a regular expression, one of several texts, or a grammar.

Owns the four public kinds and the checks of their form. Whether one can be followed, the package llguidance says where
requests are made (`graphgen.requests.structured`); a client's distribution does without it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

from graphgen.ipc.errors import InvalidRequestError
from graphgen.ipc.ggp import messages
from graphgen.ipc.ggp.limits import MAX_AFTER_LEN, MAX_CHOICES, MAX_GRAMMAR_LEN


class JsonSchema(Struct, frozen=True, tag=True):
    """JSON that the schema allows. `JsonSchema({"type": "object"})` is any JSON object.

    Between two tokens of JSON there are at most eight characters of white space.
    """

    schema: Mapping[str, Any] | bool | str
    """A JSON schema, or its text. What cannot be enforced is refused by its keyword."""
    after: str = ""
    """The structure begins behind this text, as `</think>`; before it the output is free. "": from the first token."""
    opening: str = ""
    """With `after`: only an output that begins with this text, as `<think>`, is free up to `after`; any other begins
    with the structure. "": every output is free up to it."""

    def __post_init__(self) -> None:
        _check(self.text, "a JSON schema", self.after, self.opening)

    @property
    def text(self) -> str:
        """The schema as JSON."""
        if isinstance(self.schema, str):
            return self.schema
        try:
            return json.dumps(self.schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(
                f"structured: a JSON schema is no JSON ({error}): give what JSON can say"
            ) from None


class Regex(Struct, frozen=True, tag=True):
    """Text that the expression matches as a whole, in the syntax of Rust's package regex: without look-around and
    references to groups."""

    pattern: str
    after: str = ""
    opening: str = ""
    """See JsonSchema, as of `after`."""

    def __post_init__(self) -> None:
        _check(self.pattern, "a regular expression", self.after, self.opening)


class Choice(Struct, frozen=True, tag=True):
    """One of these texts."""

    options: Sequence[str]
    after: str = ""
    opening: str = ""
    """See JsonSchema, as of `after`."""

    def __post_init__(self) -> None:
        options = self.options
        if isinstance(options, str) or not all(isinstance(one, str) for one in options):
            raise InvalidRequestError(f"structured: options of a choice are {options!r}: give a list of texts")
        if not 1 <= len(options) <= MAX_CHOICES or not all(options):
            raise InvalidRequestError(
                f"structured: a choice has {len(options)} options, of which {sum(not one for one in options)} are"
                f" empty: give 1 to {MAX_CHOICES}, none of them empty"
            )
        _check("".join(options), "a choice", self.after, self.opening)


class Grammar(Struct, frozen=True, tag=True):
    """Text of a context-free grammar: Lark, as llguidance extends it, or the GBNF of llama.cpp."""

    text: str
    after: str = ""
    opening: str = ""
    """See JsonSchema, as of `after`."""

    def __post_init__(self) -> None:
        _check(self.text, "a grammar", self.after, self.opening)


Structured = JsonSchema | Regex | Choice | Grammar


def to_wire(structured: Structured) -> messages.Structured:
    """As the protocol writes it."""
    kind: Literal["json_schema", "regex", "choice", "grammar"]
    text, options = "", list[str]()
    match structured:
        case JsonSchema():
            kind, text = "json_schema", structured.text
        case Regex():
            kind, text = "regex", structured.pattern
        case Choice():
            kind, options = "choice", list(structured.options)
        case Grammar():
            kind, text = "grammar", structured.text
    return messages.Structured(
        kind=kind, text=text, options=options, after=structured.after, opening=structured.opening
    )


def of_wire(wire: messages.Structured) -> Structured:
    """Raises InvalidRequestError."""
    if wire.text if wire.kind == "choice" else wire.options:
        unused = "text" if wire.kind == "choice" else "options"
        raise InvalidRequestError(f"structured: kind is {wire.kind}, which has no {unused}: leave it out")
    match wire.kind:
        case "json_schema":
            return JsonSchema(wire.text, wire.after, wire.opening)
        case "regex":
            return Regex(wire.text, wire.after, wire.opening)
        case "choice":
            return Choice(tuple(wire.options), wire.after, wire.opening)
        case "grammar":
            return Grammar(wire.text, wire.after, wire.opening)


def _check(text: object, what: str, after: object, opening: object) -> None:
    if not isinstance(text, str):
        raise InvalidRequestError(f"structured: {what} is of type {type(text).__name__}: give text")
    for name, one in (("after", after), ("opening", opening)):
        if not isinstance(one, str) or len(one) > MAX_AFTER_LEN:
            raise InvalidRequestError(f"structured: {name} is {one!r}: give at most {MAX_AFTER_LEN} characters of text")
    if opening and not after:
        raise InvalidRequestError(f"structured: opening is {opening!r} without after: say where what it opens ends")
    if not 1 <= len(text) <= MAX_GRAMMAR_LEN:
        raise InvalidRequestError(
            f"structured: {what} has {len(text)} characters: give 1 to {MAX_GRAMMAR_LEN} characters"
        )
    for one in (text, str(after), str(opening)):
        try:
            one.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"structured: {what} is no valid Unicode ({error}): remove its lone surrogates"
            ) from None
