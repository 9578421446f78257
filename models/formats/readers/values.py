"""Keys of a quantization_config, each checked where it is read: anybody may have written that file.

Called by the readers alone. All of it raises UnsupportedModelError with the key, its value and what it must be.
"""

import re
from collections.abc import Mapping
from typing import Any

from graphgen.ipc.errors import UnsupportedModelError


def refuse(what: str, remedy: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the quantization_config has {what}, which graphgen does not read: {remedy}")


def whole(config: Mapping[str, Any], *names: str, least: int = 1) -> int:
    """A key of the config that has to be a whole number; names: in which it may be written."""
    value = next((config[name] for name in names if name in config), None)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _wrong(names[0], value, f"a whole number of {least} or more")
    return value


def group_size(config: Mapping[str, Any], *names: str) -> int | None:
    """Columns of one scale; None, which the config writes as -1: all of a row."""
    size = whole(config, *names, least=-1)
    if size == 0:
        raise _wrong(names[0], size, "a number of columns, or -1 for all of a row")
    return None if size == -1 else size


def block_size(config: Mapping[str, Any], name: str) -> tuple[int, int] | None:
    """Rows and columns of one scale; None where the config does not say."""
    sizes = config.get(name)
    if sizes is None:
        return None
    if not (
        isinstance(sizes, list | tuple) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)
    ):
        raise _wrong(name, sizes, "two whole numbers, rows and columns of a block")
    return sizes[0], sizes[1]


def flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """default: also for null."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def names_in(config: Mapping[str, Any], *keys: str) -> list[str]:
    """Names of modules, of the first key that has any; what begins with re: is a regular expression."""
    for key in keys:
        value = config.get(key)
        if value is not None and not (isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)):
            raise _wrong(key, value, "a list of names")
        for name in value or ():
            if name.startswith("re:"):
                check_pattern(key, name.removeprefix("re:"))
        if value:
            return list(value)
    return []


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object within the config; empty where there is none."""
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _wrong(name, value, "an object")
    return value


def check_pattern(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise _wrong(key, pattern, f"a regular expression ({error})") from error


def _wrong(name: str, value: object, must_be: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the quantization_config has {name} = {value!r}: it must be {must_be}")
