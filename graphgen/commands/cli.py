"""The `graphgen` command. Owns options and what is printed; everything else is the public API."""

import contextlib
import errno
import importlib
import inspect
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
import typer
from rich.console import Console

from graphgen.api.engine import Engine
from graphgen.base.version import __version__
from graphgen.calls.sampling_params import SamplingParams
from graphgen.commands import probe
from graphgen.commands.chat import HELP, Conversation, Reply, chat_prompt, check_chat, converse, write_reply
from graphgen.commands.cluster import cluster_app
from graphgen.commands.demo_run import run_demo
from graphgen.commands.describe import Info, decisions, installed_versions
from graphgen.commands.keys import keys_app
from graphgen.commands.options import takes_engine_options, takes_sampling_options, takes_serve_options
from graphgen.commands.replicas import replicas_app
from graphgen.commands.tables import (
    buckets_table,
    decisions_table,
    figures_table,
    phases_table,
    tune_table,
    versions_table,
)
from graphgen.commands.tune import describe_figures, tune_figures
from graphgen.ipc.errors import GraphgenError
from graphgen.launch.config import EngineConfig
from graphgen.launch.replicas import alone, check_devices, of_replica
from graphgen.launch.step_times_store import StepTimesKey, stored_file
from graphgen.mock_server.__main__ import mock_server
from graphgen.server.options import ServeOptions
from graphgen.server.serving import serve_until_signal

app = typer.Typer(add_completion=False, no_args_is_help=True)
app.add_typer(keys_app, name="keys")
app.add_typer(replicas_app, name="replicas")
app.add_typer(cluster_app, name="cluster")
stdout = Console()
stderr = Console(stderr=True)

app.command()(mock_server)
app.command()(probe.health)
app.command()(probe.stats)

USAGE_EXIT = 2
MORE_SPACE = "free some, or name a folder of another disk by TMPDIR"
REMEDIES = {
    errno.ENAMETOOLONG: "give a shorter path, most file systems allow 255 bytes between two / and 4095 in all",
    errno.ENOSPC: MORE_SPACE,
    errno.EDQUOT: MORE_SPACE,
}
"""Of what the file system refuses whatever the program does."""


@app.command()
@takes_engine_options()
@takes_sampling_options()
def generate(
    config: EngineConfig,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text to answer; - reads it from standard input.")
    ],
    sampling: SamplingParams,
    raw: Annotated[bool, typer.Option("--raw", help="Go on with the text itself, without the chat template.")] = False,
) -> None:
    """Stream the output of one prompt.

    A model with a chat template gets the prompt as a user's message; any other, and the embedded one, which knows
    plays alone, goes on with the text.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    goes_on = raw or (config.model is None and config.chat_template is None)
    with Engine(config) as engine:
        reply = write_reply(engine, text if goes_on else chat_prompt(engine.tokenizer, text), sampling, _write)
        _write("\n")
        _show_figures(engine, reply)


@app.command()
@takes_engine_options()
@takes_sampling_options(max_tokens=None)
def chat(
    config: EngineConfig,
    sampling: SamplingParams,
    message: Annotated[
        str | None,
        typer.Argument(
            metavar="MESSAGE",
            help="What to say; - reads it from standard input.",
            show_default="read line by line, until /exit or Ctrl-D",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="The system message.", show_default="the chat template's, if it has one")
    ] = None,
) -> None:
    """Talk to a chat model: one message and its reply, or a conversation.

    In a conversation the model sees all that was said. /clear begins anew, /system TEXT does so with another system
    message, /exit or Ctrl-D ends, Ctrl-C stops a reply.
    """
    with Engine(config) as engine:
        check_chat(engine.tokenizer)
        conversation = Conversation(engine, sampling, system)
        if message is None:
            converse(conversation, _read_lines(), _write, _tell)
            return
        reply = conversation.ask(sys.stdin.read() if message == "-" else message, _write)
        _write("\n")
        _show_figures(engine, reply)


@app.command()
@takes_engine_options()
def info(
    config: EngineConfig, json: Annotated[bool, typer.Option("--json", help="Print it as JSON.", metavar="")] = False
) -> None:
    """Start an engine and print what it found and decided, and why."""
    with Engine(config) as engine:
        found = engine.info
        rows = decisions(engine.config, engine.resolved, found)
        if json:
            told = Info(installed_versions(), rows, found.worker.buckets, found.worker.phases, engine.start_s)
            _write(msgspec.json.format(msgspec.json.encode(told.as_objects()), indent=1).decode() + "\n")
            return
        stdout.print(versions_table())
        stdout.print(decisions_table(rows))
        stdout.print(buckets_table(found.worker.buckets))
        stdout.print(phases_table(found.worker.phases, engine.start_s))


@app.command()
@takes_engine_options()
def demo(
    config: EngineConfig, max_tokens: Annotated[int, typer.Option(help="Tokens of output of each request.")] = 120
) -> None:
    """Serve prompts of many lengths at once on the embedded model, show one of them live, and print the figures."""
    with Engine(config) as engine:
        figures = run_demo(engine, max_tokens, _write)
        _write("\n\n")
        stdout.print(figures_table(figures, engine))
        stdout.print(phases_table(engine.info.worker.phases, engine.start_s))


@app.command()
@takes_engine_options(without=("step_times",))
def tune(
    config: EngineConfig,
    json: Annotated[Path | None, typer.Option(help="Write the figures into this file.", dir_okay=False)] = None,
) -> None:
    """Measure how long a step of each bucket takes, print what that says, and store it for later starts.

    The scheduler chooses its steps by these times. A start on a GPU that finds none measures them itself, in seconds
    and less exactly. They are looked up by device, model shape, dtype, kernels, page size, buckets and versions: tune
    with the options the engine will have, while nothing else runs on the device. One of several replicas measures for
    all.

    A --token-budget above the default, 2048 say, shows whether larger steps would compute more rows a second.
    """
    check_devices(config)
    with Engine(msgspec.structs.replace(alone(config), step_times="measure")) as engine:
        worker = engine.info.worker
        key = StepTimesKey.of(of_replica(engine.resolved, 0, 1), worker)
    assert worker.step_times is not None, "the worker measured: it was asked to"
    stored = stored_file(os.environ, key, worker.step_times)
    figures = tune_figures(worker.step_times, worker.device, worker.attention, config.objective, stored)
    stdout.print(tune_table(figures))
    stdout.print("\n".join(describe_figures(figures)), soft_wrap=True, markup=False, highlight=False)
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=1) + b"\n")


@app.command()
@takes_engine_options(
    # What kernels and their constants follow from.
    only=(
        *("model", "revision", "dtype", "quantization", "kv_cache_dtype", "tensor_parallel"),
        *("page_size", "max_model_len", "max_num_seqs", "token_budget"),
    ),
    model_none_means="any model with heads of 64, 128 or 256 and no sliding window",
)
def prebuild(
    config: EngineConfig,
    arch: Annotated[
        str | None, typer.Option(help="GPU architecture, like 9.0a or 8.0.", show_default="of the GPU here")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Compilations at once.", show_default="one for each core")
    ] = None,
    no_start: Annotated[
        bool, typer.Option("--no-start", help="Kernels alone: start no engine, though its GPU is here.", metavar="")
    ] = False,
) -> None:
    """Build kernels ahead of a first start, of one model (all of them) or of most; needs nvcc, ninja and no GPU.

    Where the GPU that it builds for is here, an engine of the model is started once, with made-up weights: its layers
    are compiled and its steps are timed. The caches folder, copied to a machine with such a card, makes its first start
    as short as a second one.
    """
    from graphgen.commands.first_start import start_first
    from graphgen.commands.prebuild import prebuild as build_kernels  # imports torch

    begun_s = time.monotonic()
    config = msgspec.structs.replace(config, device="cuda")
    with stderr.status("building kernels, which takes minutes"):
        built = build_kernels(config, arch, jobs)
    lines = [f"{source:<9} {name}" for name, source in built.libraries.items()]
    if built.triton is not None:
        done = built.triton.num_kernels - len(built.triton.failures)
        lines.append(f"compiled  {done} of {built.triton.num_kernels} Triton kernels")
    if not no_start and config.model is not None:
        with stderr.status("starting an engine once"):
            first = start_first(config, built.capability)
        lines.append(
            f"not started, so layers are compiled and steps timed at the first start: {first.problem}"
            if first.problem
            else f"started   once, in {first.seconds:.1f} s: layers compiled, {first.buckets_timed} buckets timed"
        )
    lines.append(f"serves    {built.serves}")
    lines.append(f"for {built.arch} in {built.folder} after {time.monotonic() - begun_s:.1f} s")
    stdout.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)


@app.command()
@takes_engine_options()
@takes_serve_options
def serve(config: EngineConfig, options: ServeOptions) -> None:
    """Serve programs in any language over ZeroMQ, until SIGTERM; the protocol is in ipc/PROTOCOL.md."""
    sys.exit(serve_until_signal(config, options))


def _print_version(asked: bool) -> None:
    if asked:
        _write(f"graphgen {__version__}\n")
        raise typer.Exit


@app.callback()
def graphgen(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version, metavar="")
    ] = False,
) -> None:
    """Serve large language models."""


def _join_lines(commands: typer.Typer) -> None:
    """Help texts are docstrings, whose line breaks typer keeps in all paragraphs but the first."""
    for command in commands.registered_commands:
        paragraphs = inspect.cleandoc(command.callback.__doc__ or "").split("\n\n")
        command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


_join_lines(app)
_join_lines(keys_app)
_join_lines(replicas_app)
_join_lines(cluster_app)


def main() -> None:
    """The console script. What graphgen raises on purpose is told in one line, without a trace, and so is what the
    file system refuses."""
    try:
        app()
    except GraphgenError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        about = "" if error.filename is None else f" ({error.filename})"
        _fail(f"{error.strerror}{about}: {REMEDIES[error.errno]}")


def _fail(text: str) -> NoReturn:
    stderr.print(f"graphgen: {text}", style="red", markup=False, highlight=False)
    sys.exit(USAGE_EXIT)


def _write(text: str) -> None:
    """Text of a model is written as it is: rich would take [brackets] for markup."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _tell(text: str) -> None:
    """What is not the model's, so that standard output holds replies alone."""
    stderr.print(text, style="dim", markup=False, highlight=False)


def _read_lines() -> Iterator[str]:
    """What the user types, or the lines of a file or pipe. Ctrl-C at the prompt ends as Ctrl-D does."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):  # not everywhere; input() uses it for editing and earlier lines
        importlib.import_module("readline")
    _tell(HELP)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ")
    _write("\n")


def _show_figures(engine: Engine, reply: Reply) -> None:
    stats = engine.stats()
    _tell(
        f"{reply.num_tokens} tokens, finished by {reply.reason or 'Ctrl-C'}; {stats.steps} steps,"
        f" {stats.step_ms_p50:.2f} ms p50; started in {engine.start_s:.1f} s"
    )
