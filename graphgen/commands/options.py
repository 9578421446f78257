"""The options of every command that starts an engine, made from EngineConfig; those of a server from ServeOptions,
those of a prompt from SamplingParams, and others from a Struct of their command's own.

Owns how a field becomes an option of typer, and where the help shows it. A field that EngineConfig gains is an option
of every command, with no line here. Starts nothing; used by the commands and, for argparse, by `benchmarks.options`.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, cast, get_args

import msgspec
import typer
from msgspec import Struct
from rich.markup import escape

from graphgen.calls.sampling_params import SamplingParams
from graphgen.commands.fields import Option, options_of
from graphgen.ipc.errors import ConfigError
from graphgen.launch.config import EngineConfig, EngineSettings, make_config
from graphgen.server.options import ServeOptions

Command = Callable[..., None]

MAX_INT = 2**63 - 1

PANELS = {
    "Model": (
        *("model", "revision", "tokenizer", "chat_template", "load_format", "dtype", "quantization", "max_model_len"),
        "seed",
    ),
    "Device and memory": (
        *("device", "replicas", "tensor_parallel", "memory_fraction", "kv_cache_dtype", "num_pages", "page_size"),
        *("attention", "cpu_threads"),
    ),
    "Scheduling": (
        *("objective", "token_budget", "max_num_seqs", "itl_target_ms", "ttft_target_ms", "tpot_target_ms"),
        "step_times",
        "max_long_prompts",
    ),
    "Queue": ("max_waiting", "max_waiting_tokens"),
    "Start and logs": ("captured_at_start", "start_timeout_s", "step_log", "standby"),
}
"""Where the help of a command shows which option of the engine."""
OTHER_PANEL = "Engine"
SWITCHES_PANEL = "Switches"
"""Of what is on or off: the help needs a column for the --no-... of an option, which would narrow the other panels."""

# Where requests are made, --seed is theirs.
ENGINE_OPTIONS = options_of(EngineConfig, flags={"seed": "--weights-seed"})
SERVE_OPTIONS = options_of(ServeOptions, flags={"data": "--bind"})
SAMPLING_OPTIONS = tuple(
    msgspec.structs.replace(option, type=list[str] | None, default=None) if option.name == "stop" else option
    for option in options_of(SamplingParams)
    if option.name
    not in ("n", "stop_token_ids", "logit_bias", "skip_special_tokens", "cache_salt", "priority", "structured")
    and not option.name.endswith("_ms")
)
"""Without what one prompt at a time has no use for. --stop may be repeated."""


def takes_engine_options(
    without: Collection[str] = (), only: Collection[str] | None = None, model_none_means: str | None = None
) -> Callable[[Command], Command]:
    """A decorator: the command's parameter `config: EngineConfig` is made from options on the command line.

    The model is also an argument, after the command's own. without: fields that the command sets itself. only: the
    fields that mean something to it, where these are few. model_none_means: what the command does without a model,
    where that is not to take the demo model.
    """
    chosen = [
        msgspec.structs.replace(option, none_means=model_none_means)
        if option.name == "model" and model_none_means is not None
        else option
        for option in ENGINE_OPTIONS
        if option.name not in without and (only is None or option.name in only)
    ]
    arguments = [_argument(option) for option in chosen if option.name == "model"]
    panels = {name: panel for panel, names in PANELS.items() for name in names}
    declared = [_declared(option, panels.get(option.name, OTHER_PANEL)) for option in chosen]

    def make(given: Mapping[str, Any], model: str | None = None) -> EngineConfig:
        return make_config(model, cast(EngineSettings, given))

    return functools.partial(_replace_parameter, "config", chosen, arguments, declared, make)


def takes_sampling_options(**defaults: Any) -> Callable[[Command], Command]:
    """A decorator: the command's parameter `sampling: SamplingParams` is made from options on the command line.

    defaults: those of the command where they are not SamplingParams' own.
    """
    options = [
        msgspec.structs.replace(option, default=defaults.get(option.name, option.default))
        for option in SAMPLING_OPTIONS
    ]
    declared = [_declared(option, panel="Sampling") for option in options]

    def make(given: Mapping[str, Any]) -> SamplingParams:
        return SamplingParams(**{**defaults, **given})

    return functools.partial(_replace_parameter, "sampling", options, [], declared, make)


def takes_fields(name: str, kind: type[Struct], options: Sequence[Option], panel: str) -> Callable[[Command], Command]:
    """A decorator: the command's parameter `name`, a `kind`, is made from options on the command line."""
    declared = [_declared(option, panel) for option in options]
    return functools.partial(_replace_parameter, name, options, [], declared, lambda given: kind(**given))


def _replace_parameter(
    name: str,
    options: Sequence[Option],
    arguments: Sequence[inspect.Parameter],
    declared: Sequence[inspect.Parameter],
    make: Callable[..., Struct],
    command: Command,
) -> Command:
    """The command with `declared`, one for each option, and `arguments` in the place of its parameter `name`.

    make: called with what was given that is not the default, and the values of `arguments`.
    """

    @functools.wraps(command)
    def run(**values: Any) -> None:
        found = [values.pop(parameter.name) for parameter in declared]
        for option, value in zip(options, found, strict=True):
            if isinstance(value, int) and abs(value) > MAX_INT:  # what no message between processes holds
                raise ConfigError(f"{option.name} is {value}, the limit is {MAX_INT}: use a number within it")
        given = {option.name: value for option, value in zip(options, found, strict=True) if value != option.default}
        made = make(given, *(values.pop(argument.name) for argument in arguments))
        command(**{name: made}, **values)

    own = [parameter for parameter in inspect.signature(command, eval_str=True).parameters.values()]
    num_arguments = 1 + max((place for place, one in enumerate(own) if _is_argument(one)), default=-1)
    all_of_them = [*own[:num_arguments], *arguments, *own[num_arguments:], *declared]
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in all_of_them if one.name != name]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    return run


def _argument(option: Option) -> inspect.Parameter:
    """The option as an argument: `graphgen serve MODEL` is `graphgen serve --model MODEL`."""
    shown = typer.Argument(
        metavar=option.name.upper(), help=escape(option.help), show_default=option.none_means or True
    )
    return _keyword(f"{option.name}_argument", option.default, Annotated[option.type, shown])


def _declared(option: Option, panel: str) -> inspect.Parameter:
    """The parameter of a command's signature that makes typer offer the option."""
    is_switch = option.value_type is bool and option.default is not False
    choices = f"{', '.join(option.choices[:-1])} or {option.choices[-1]}. " if option.choices else ""
    shown = typer.Option(
        f"{option.flag}/--no-{option.flag[2:]}" if is_switch else option.flag,
        help=escape(choices + option.help),
        metavar=option.metavar,
        show_default=option.none_means or option.default is not False,
        rich_help_panel=SWITCHES_PANEL if is_switch else panel,
    )
    # Not the flag's name alone: a command may have a parameter of that name.
    return _keyword(f"{option.flag[2:].replace('-', '_')}_option", option.default, Annotated[option.type, shown])


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _is_argument(parameter: inspect.Parameter) -> bool:
    return any(isinstance(part, typer.models.ArgumentInfo) for part in get_args(parameter.annotation))


takes_serve_options = takes_fields("options", ServeOptions, SERVE_OPTIONS, panel="Server")
"""A decorator: the command's parameter `options: ServeOptions` is made from options on the command line."""
