"""`graphgen replicas`: how the engines of a server on this machine are, and taking one out of service and back.

Owns the options, what is printed and the exit codes: 0 it is done, 1 it cannot be, 2 the command is wrong.
"""

import sys
import time
from typing import Annotated

import typer

from graphgen.ipc.errors import ConfigError
from graphgen.server.operator import EngineState, Wish, ask, find_server
from graphgen.server.options import MAX_S

NOT_DONE_EXIT = 1
LOOK_S = 0.2
MAX_ENGINE = 10**6

replicas_app = typer.Typer(
    no_args_is_help=True, help="The engines of a server with --replicas or --engines, on this machine."
)

Server = Annotated[
    str | None,
    typer.Option("--server", metavar="FOLDER", help="Folder of the server.", show_default="the only one that runs"),
]
Number = Annotated[int, typer.Argument(metavar="ENGINE", help="Its number, from 0.")]
Timeout = Annotated[float, typer.Option(min=0, help="Seconds to wait until it is done.")]


@replicas_app.command()
def show(server: Server = None) -> None:
    """Print how each engine is: serving, starting, draining, drained or ended; one elsewhere may be away."""
    told = ask(find_server(server), Wish("show"))
    for number, state in enumerate(told.engines):
        if state != "removed":
            address = f"  {told.addresses[number]}" if told.addresses else ""
            reason = f": {told.reasons[number]}" if told.reasons and told.reasons[number] else ""
            sys.stdout.write(f"engine {number}{address}  {state}{reason}\n")


@replicas_app.command()
def drain(
    engine: Number,
    grace_s: Annotated[
        float, typer.Option(min=0, help="Seconds for what is open there; then it goes on at other engines.")
    ] = 30.0,
    server: Server = None,
) -> None:
    """Take an engine out of service: it gets no new requests, and ends when it has none left. Nothing is lost."""
    _do(server, Wish("drain", engine, grace_s), "drained", grace_s + 60.0)


@replicas_app.command()
def resume(engine: Number, timeout_s: Timeout = 600.0, server: Server = None) -> None:
    """Start an engine again that was drained, or that had ended too often."""
    _do(server, Wish("resume", engine), "serving", timeout_s)


@replicas_app.command()
def add(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="Of a server elsewhere: tcp://HOST:PORT.")],
    timeout_s: Timeout = 60.0,
    server: Server = None,
) -> None:
    """Let a server elsewhere be another engine of a server with --engines."""
    _do(server, Wish("add", address=address), "serving", timeout_s)


@replicas_app.command()
def remove(
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help="Its address, or its number.")],
    grace_s: Annotated[
        float, typer.Option(min=0, help="Seconds for what is open there; then it goes on at other engines.")
    ] = 30.0,
    server: Server = None,
) -> None:
    """Drain an engine of a server with --engines, and let it be none any more. It goes on running."""
    is_number = engine.isascii() and engine.isdigit() and len(engine) <= len(str(MAX_ENGINE))
    number, address = (int(engine), "") if is_number else (0, engine)
    _do(server, Wish("remove", number, grace_s, address), "removed", grace_s + 60.0)


def _do(server: str | None, wish: Wish, wanted: EngineState, timeout_s: float) -> None:
    """Asks, and waits until the engine is as wanted. Raises ConfigError for numbers that none can have."""
    if not 0 <= wish.engine <= MAX_ENGINE:
        raise ConfigError(f"there is no engine {wish.engine}: `graphgen replicas show` says which there are")
    if not wish.grace_s <= MAX_S:
        raise ConfigError(f"grace_s is {wish.grace_s}, the limit is {MAX_S:.0f}: lower it")
    folder = find_server(server)
    told = ask(folder, wish)
    number = told.engine if wish.address else wish.engine
    error = told.error
    deadline_s = time.monotonic() + timeout_s
    while not error and (state := told.engines[number]) != wanted:
        reason = told.reasons[number] if told.reasons else ""
        if state == "removed" or (state == "serving" and reason):
            error = reason
        elif time.monotonic() > deadline_s:
            error = f"engine {number} is {state} after {timeout_s:g} s" + (f": {reason}" if reason else "")
        else:
            time.sleep(LOOK_S)
            told = ask(folder, Wish("show"))
    if error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(NOT_DONE_EXIT)
    sys.stdout.write(f"engine {number}  {wanted}\n")
