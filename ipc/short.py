"""How values look in a terminal: short. A Struct without hundreds of ids, a float without fifteen digits.

Used as `__repr__` by the Structs that users print. Owns no value.
"""

from collections.abc import Container

from msgspec import Struct, structs

MAX_TEXT_LEN = 80
MAX_ITEMS = 8


def short(value: object) -> str:
    """The value's repr, cut: a long text in its middle, a long list to its length, a float to four digits.

    What a short list holds is cut in the same way.
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str) and len(value) > MAX_TEXT_LEN:
        half = MAX_TEXT_LEN // 2
        return f"<{len(value)} characters: {value[:half]!r} ... {value[-half:]!r}>"
    if isinstance(value, (tuple, list)) and len(value) > MAX_ITEMS:
        return f"<{len(value)} items>"
    if type(value) is tuple:
        return f"({', '.join(map(short, value))}{',' * (len(value) == 1)})"
    if type(value) is list:
        return f"[{', '.join(map(short, value))}]"
    return repr(value)


def short_repr(struct: Struct, leaves_out: Container[str] = ()) -> str:
    """`Name(field=value, ...)` without the fields that have their default, and those that nobody should see."""
    values = {field.name: (getattr(struct, field.name), field.default) for field in structs.fields(struct)}
    shown = [
        f"{name}={short(value)}"
        for name, (value, default) in values.items()
        if value != default and name not in leaves_out
    ]
    return f"{type(struct).__name__}({', '.join(shown)})"
