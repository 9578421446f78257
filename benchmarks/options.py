"""What the command lines of all scripts have in common, and the engine's options of those that start one.

These are the options of `graphgen.commands.options`, made from EngineConfig. Each script adds its own.
"""

import argparse
import math
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Unpack, cast

from graphgen.commands.fields import Option
from graphgen.commands.options import ENGINE_OPTIONS
from graphgen.ipc.errors import GraphgenError
from graphgen.launch.config import EngineSettings

OUTPUTS = ("json", "plot", "png")
"""Names of options that say where results are written."""


class Parser(argparse.ArgumentParser):
    """Refuses what no script can use before anything runs."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options = super().parse_args(args, namespace)
        for action in self._actions:
            given = getattr(options, action.dest, None)
            for value in given if isinstance(given, list) else [given]:
                flag = "/".join(action.option_strings)
                if isinstance(value, int | float) and not 0 <= value < math.inf:
                    self.error(f"argument {flag}: {value}: use a number that is not negative, nor inf or nan")
                if action.dest in OUTPUTS and value is not None and not Path(value).absolute().parent.is_dir():
                    self.error(f"argument {flag}: there is no folder {Path(value).absolute().parent}: make it first")
        return options


def make_parser(description: str | None) -> Parser:
    """description: the script's docstring, printed as it is."""
    return Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def count(text: str) -> int:
    """Of an option of which there is at least one."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: the least is 1")
    return int(text)


def above_zero(text: str) -> float:
    if not 0.0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: use a number above 0")
    return float(text)


def run_script(main: Callable[[], object]) -> None:
    """What a user can mend is told in a line, which would be lost at the end of a traceback."""
    try:
        main()
    except (GraphgenError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
        sys.exit(f"error: {error}")


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
