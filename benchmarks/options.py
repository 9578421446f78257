"""The command line that scripts which start an engine have in common: the engine's options, for argparse.

The options are those of `graphgen.commands.options`, made from EngineConfig. Each script adds its own.
"""

import argparse
from collections.abc import Collection
from typing import Any, Unpack, cast

from graphgen.commands.fields import Option
from graphgen.commands.options import ENGINE_OPTIONS
from graphgen.launch.config import EngineSettings


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """description: the script's docstring, printed as it is."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_engine_options(
    parser: argparse.ArgumentParser, without: Collection[str] = ()
) -> argparse._MutuallyExclusiveGroup:
    """Adds them but for replicas: a script measures one engine, unless it says otherwise.

    Returns the group of --token-budget, for options that exclude it.

    without: fields that the script sets itself.
    """
    engine = parser.add_argument_group("engine")
    budgets = engine.add_mutually_exclusive_group()
    added = [option for option in ENGINE_OPTIONS if option.name not in (*without, "replicas")]
    for option in added:
        group = budgets if option.name == "token_budget" else engine
        group.add_argument(option.flag, default=None, **_how(option))
    parser.set_defaults(engine_options=added)
    return budgets


def engine_settings(
    options: argparse.Namespace, captures_all: bool = True, **more: Unpack[EngineSettings]
) -> EngineSettings:
    """The keyword arguments of EngineConfig that were given, and `more`; it has its own defaults for the others.

    captures_all: every bucket before the engine is ready, unless the options say otherwise. What it does with only some
    of them is nothing to measure but of its start.
    """
    named = {option.name: getattr(options, option.flag[2:].replace("-", "_")) for option in options.engine_options}
    given = {name: value for name, value in named.items() if value is not None}
    first = {"captured_at_start": "all"} if captures_all else {}
    return cast(EngineSettings, {**first, **given, **more})


def _how(option: Option) -> dict[str, Any]:
    """What argparse is told of an option. A % in its help would be a format."""
    default = option.default if option.none_means is None else option.none_means
    how: dict[str, Any] = {"help": f"{option.help} [default: {default}]".replace("%", "%%")}
    if option.value_type is bool:
        return how | {"action": argparse.BooleanOptionalAction}
    if option.choices:
        return how | {"choices": option.choices}
    return how | {"type": option.value_type, "metavar": option.metavar}
