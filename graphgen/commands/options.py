"""The options of every command that starts an engine, made from EngineConfig.

Owns how a field becomes an option: its name, its type, its help (the field's docstring) and what stands for None. A
field that EngineConfig gains is an option of every command, with no line here. Starts nothing; used by the commands
and, for argparse, by `benchmarks.options`.
"""

import ast
import functools
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import msgspec
import typer
from msgspec import Struct
from rich.markup import escape

from graphgen.launch.config import EngineConfig, EngineSettings, make_config

PANELS = {
    "Model": ("model", "revision", "tokenizer", "load_format", "dtype", "max_model_len", "seed"),
    "Device and memory": ("device", "memory_fraction", "num_pages", "page_size", "attention", "cpu_threads"),
    "Scheduling": ("token_budget", "max_num_seqs", "itl_target_ms", "ttft_target_ms", "step_times", "max_long_prompts"),
    "Queue": ("max_waiting", "max_waiting_tokens"),
    "Start and logs": ("start_timeout_s", "step_log"),
}
"""Where the help of a command shows which option."""
SWITCHES_PANEL = "Switches"
"""Of what is on or off: the help needs a column for the --no-... of an option, which would narrow the other panels."""
OTHER_PANEL = "Engine"

FLAGS = {"seed": "--weights-seed"}
"""Options that are not called as their field is: where requests are made, --seed is theirs."""

_NONE_SENTENCE = re.compile(r"(?:^|(?<=[.;] ))None: (.+?)\.(?= |$)")
_PREFIX = "engine_"
"""Of the parameters that hold these options, so that a command may have others of the same name."""
_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", bool: ""}


class Option(Struct, frozen=True):
    """A field of a Struct, as a command line shows it."""

    name: str
    type: Any  # of the field: a type, a union with None, or a Literal
    default: Any
    help: str
    none_means: str | None  # what the engine does when it is left out, where that is None

    @property
    def flag(self) -> str:
        return FLAGS.get(self.name, "--" + self.name.replace("_", "-"))

    @property
    def value_type(self) -> Any:
        """The type of a value that is given: never None."""
        (value_type,) = (
            [part for part in get_args(self.type) if part is not type(None)] if self._is_union else [self.type]
        )
        return value_type

    @property
    def metavar(self) -> str:
        """What stands for the value in the help."""
        return _METAVARS.get(self.value_type, "NAME")

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal; empty for every other type."""
        return get_args(self.value_type) if get_origin(self.value_type) is Literal else ()

    @property
    def _is_union(self) -> bool:
        return type(None) in get_args(self.type)


def options_of(kind: type[Struct]) -> tuple[Option, ...]:
    """One for each field, in their order. The sentence `None: ...` of a field's docstring says what None stands for."""
    docstrings = _field_docstrings(kind)
    options = []
    for field in msgspec.structs.fields(kind):
        text = " ".join(docstrings[field.name].split())
        found = _NONE_SENTENCE.search(text)
        text = text if found is None else (text[: found.start()] + text[found.end() :]).strip()
        none_means = None if found is None else found[1]
        options.append(Option(field.name, field.type, field.default, " ".join(text.split()), none_means))
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


ENGINE_OPTIONS = options_of(EngineConfig)


def takes_engine_options(
    without: Collection[str] = (), only: Collection[str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the command's first parameter, `config: EngineConfig`, is made from options on the command line.

    The model is also an argument, after the command's own. without: fields that the command sets itself. only: the
    fields that mean something to it, where these are few.
    """
    chosen = [
        option for option in ENGINE_OPTIONS if option.name not in without and (only is None or option.name in only)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(model_argument: str | None = None, **values: Any) -> None:
            settings = {option.name: values.pop(_PREFIX + option.name) for option in chosen}
            given = {option.name: settings[option.name] for option in chosen if settings[option.name] != option.default}
            command(make_config(model_argument, cast(EngineSettings, given)), **values)

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        num_arguments = sum(_is_argument(parameter) for parameter in own)
        parameters = [
            *own[:num_arguments],
            *([_model_argument()] if any(option.name == "model" for option in chosen) else []),
            *own[num_arguments:],
            *map(_parameter, chosen),
        ]
        keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]  # what typer reads
        return run

    return decorate


def _model_argument() -> inspect.Parameter:
    (model,) = [option for option in ENGINE_OPTIONS if option.name == "model"]
    argument = typer.Argument(metavar="MODEL", help=escape(model.help), show_default=model.none_means or True)
    return _keyword("model_argument", None, Annotated[str | None, argument])


def _parameter(option: Option) -> inspect.Parameter:
    """The parameter of a command's signature that makes typer offer the option."""
    value_type = option.value_type
    is_switch = value_type is bool
    flags = f"{option.flag}/--no-{option.flag[2:]}" if is_switch else option.flag
    choices = f"{', '.join(option.choices[:-1])} or {option.choices[-1]}. " if option.choices else ""
    declared = typer.Option(
        flags,
        help=escape(choices + option.help),
        metavar=option.metavar,
        show_default=option.none_means or True,
        rich_help_panel=SWITCHES_PANEL if is_switch else _panel_of(option.name),
    )
    return _keyword(_PREFIX + option.name, option.default, Annotated[option.type, declared])


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _is_argument(parameter: inspect.Parameter) -> bool:
    return any(isinstance(part, typer.models.ArgumentInfo) for part in get_args(parameter.annotation))


def _panel_of(name: str) -> str:
    return next((panel for panel, names in PANELS.items() if name in names), OTHER_PANEL)
