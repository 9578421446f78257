"""Numbers and lists of numpy and torch as Python's own, which alone can be sent.

Owns the conversion at the edge where users hand values over. Imports neither library: numpy registers its numbers with
the `numbers` module, and both have `tolist`. A bool stays one, though Python takes it for a number.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import msgspec


def plain_number(value: object) -> object:
    """An int or float for any other kind of number; everything else, bools too, as it is."""
    if isinstance(value, bool) or type(value) in (int, float):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def plain_list(values: Any) -> Any:
    """A list for an array; everything else as it is. Any: what users hand over."""
    return values.tolist() if hasattr(values, "tolist") and not isinstance(values, Sequence) else values


def plain_fields(struct: msgspec.Struct) -> None:
    """Puts plain numbers, and lists of them, into a struct that is being made, before its values are checked."""
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        plain = plain_list(plain_number(value))
        if isinstance(plain, (list, tuple)) and any(plain_number(item) is not item for item in plain):
            plain = [plain_number(item) for item in plain]
        if plain is not value:
            msgspec.structs.force_setattr(struct, name, plain)
