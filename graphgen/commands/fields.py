"""A Struct's fields as a command line shows them: name, type, help (the field's docstring) and what stands for None.

Owns how a field is read; knows neither typer nor argparse, which `commands.options` and `benchmarks.options` do.
"""

import ast
import inspect
import itertools
import re
import textwrap
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec import Struct

_NONE_SENTENCE = re.compile(r"(?:^|(?<=[.;] ))None: (.+?)\.(?= |$)")
_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", bool: ""}


class Option(Struct, frozen=True):
    """One field."""

    name: str
    type: Any  # of the field: a type, a union with None, or a Literal
    default: Any
    help: str
    none_means: str | None
    """What happens when it is left out, where that is None."""
    flag: str

    @property
    def value_type(self) -> Any:
        """The type of a value that is given: never None."""
        parts = get_args(self.type)
        if type(None) not in parts:
            return self.type
        (value_type,) = [part for part in parts if part is not type(None)]
        return value_type

    @property
    def metavar(self) -> str:
        """What stands for the value in the help."""
        return _METAVARS.get(self.value_type, "NAME")

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal; empty for every other type."""
        return get_args(self.value_type) if get_origin(self.value_type) is Literal else ()


def options_of(kind: type[Struct], flags: dict[str, str] | None = None) -> tuple[Option, ...]:
    """One for each field, in their order. The sentence `None: ...` of a field's docstring says what None stands for.

    flags: of fields whose option is not called as the field is.
    """
    docstrings = _field_docstrings(kind)
    options = []
    for field in msgspec.structs.fields(kind):
        text = " ".join(docstrings[field.name].split())
        found = _NONE_SENTENCE.search(text)
        none_means = None if found is None else found[1]
        if found is not None:
            text = f"{text[: found.start()].rstrip()} {text[found.end() :].lstrip()}".strip()
        flag = (flags or {}).get(field.name, "--" + field.name.replace("_", "-"))
        options.append(Option(field.name, field.type, field.default, text, none_means, flag))
    return tuple(options)


def _field_docstrings(kind: type[Struct]) -> dict[str, str]:
    """The string below each field of a class, by the field's name. Python keeps them in the source alone."""
    docstrings: dict[str, str] = {}
    for base in kind.__mro__[: kind.__mro__.index(Struct)]:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in itertools.pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                docstrings.setdefault(field.target.id, str(ast.literal_eval(below.value)))
    return docstrings
