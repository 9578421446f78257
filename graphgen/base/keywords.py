"""Keyword arguments of the public classes: an unknown one is an error of ours that names the nearest known one.

Owns what such an error says. Used by every Struct that a user's program builds.
"""

import difflib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin

import msgspec
from msgspec import StructMeta

ELSEWHERE = {
    "enable_prefix_caching": "prefix_cache",
    "eos_token_id": "stop_token_ids",
    "gpu_memory_utilization": "memory_fraction",
    "max_batch_size": "max_num_seqs",
    "max_length": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_num_batched_tokens": "token_budget",
    "mem_fraction_static": "memory_fraction",
    "model_path": "model",
    "num_return_sequences": "n",
    "torch_dtype": "dtype",
}
"""What other engines call some of the same things."""


class KnownKeywords(StructMeta):
    """Metaclass of a Struct that is built with keyword arguments. `refused_with` is the class of its errors, and
    `called` what they call it."""

    refused_with: ClassVar[type[Exception]]
    called: ClassVar[str]

    if not TYPE_CHECKING:  # to a type checker it would hide the arguments of the class

        def __call__(cls, *values: object, **named: object) -> object:
            known = cls.__struct_fields__
            if values:
                raise cls.refused_with(
                    f"{cls.called} takes keyword arguments and was given {values[0]!r} without one: write"
                    f" {cls.called}({known[0]}=...)"
                )
            for name in named:
                if name not in known:
                    raise cls.refused_with(unknown_keyword(cls.called, name, known))
            return super().__call__(**named)


def unknown_keyword(what: str, name: str, known: Iterable[str]) -> str:
    """The message for an argument that does not exist."""
    known = tuple(known)
    near = difflib.get_close_matches(name, known, n=1)
    meant = next((one for one in (ELSEWHERE.get(name), *near) if one in known), None)
    hint = f"did you mean {meant}?" if meant is not None else f"it has {', '.join(known)}"
    return f"{what} has no argument {name!r}: {hint}"


def type_problem(value: object, expected: Any) -> str | None:
    """What is wrong with a value for a field of this type, as the end of a sentence; None: nothing.

    msgspec checks types when it decodes a Struct, not when a program builds one.
    """
    literals = [part for part in (expected, *get_args(expected)) if get_origin(part) is Literal]
    choices = [choice for literal in literals for choice in get_args(literal)]
    try:
        msgspec.convert(value, expected)
    except msgspec.ValidationError as error:
        if choices:
            *first, last = (f'"{choice}"' for choice in choices)
            return f"use {', '.join(first)} or {last}"
        problem = str(error)[0].lower() + str(error)[1:].replace("null", "None")  # msgspec speaks of JSON
        return f"{problem}: give str(...) of the path" if isinstance(value, os.PathLike) else problem
    return None
