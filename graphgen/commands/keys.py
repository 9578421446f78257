"""What `graphgen keys` does with its options. The keys are `graphgen.server.frontend.keys`."""

from pathlib import Path
from typing import Annotated

import typer

from graphgen.gateway.keys import FOLDER as HTTP_KEYS
from graphgen.gateway.keys import make_key
from graphgen.ipc.ggp.limits import MAX_PRIORITY
from graphgen.server.frontend.keys import Keys, default_folder
from graphgen.server.serving import say

keys_app = typer.Typer(no_args_is_help=True, help="CURVE keys of the server and of those who may connect.")

KeysFolder = Annotated[
    Path | None,
    typer.Option(
        "--keys",
        metavar="FOLDER",
        help="Folder of the keys.",
        show_default="$GRAPHGEN_KEYS or ~/.config/graphgen/keys",
    ),
]


MaxPriority = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=0,
        max=MAX_PRIORITY,
        help="Requests of the client that ask for a higher priority get this one.",
    ),
]


Routes = Annotated[
    bool,
    typer.Option(
        "--routes",
        help="It is of a frontend (`graphgen serve --engines`), which may route requests of others here.",
        metavar="",
    ),
]


@keys_app.command()
def new(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="Of a client, which is let in as well.", show_default="the server's own keys"
        ),
    ] = None,
    max_priority: MaxPriority = MAX_PRIORITY,
    routes: Routes = False,
    keys: KeysFolder = None,
) -> None:
    """Make a pair of keys, and print where the secret one lies and what the public one is."""
    secret, public_key = _open(keys).make(name, max_priority, routes)
    say(f"secret  {secret}\npublic  {public_key}")


@keys_app.command(context_settings={"ignore_unknown_options": True})  # one key in 85 begins with a dash
def allow(
    name: Annotated[str, typer.Argument(metavar="NAME", help="To find the key by, later.")],
    public_key: Annotated[str, typer.Argument(metavar="KEY", help="The client's public key, 40 characters.")],
    max_priority: MaxPriority = MAX_PRIORITY,
    routes: Routes = False,
    keys: KeysFolder = None,
) -> None:
    """Let a client in by its public key; a running server needs no restart. Remove the file to shut it out: its
    sessions end as well, within two seconds."""
    say(str(_open(keys).allow(name, public_key, max_priority, routes)))


@keys_app.command()
def http(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is.")],
    max_priority: MaxPriority = MAX_PRIORITY,
    requests_per_minute: Annotated[
        int | None, typer.Option("--per-minute", metavar="N", min=1, help="Most requests.", show_default="no limit")
    ] = None,
    keys: KeysFolder = None,
) -> None:
    """Make an API key for HTTP, and print it: it is kept nowhere. A running server needs no restart. Remove
    http/NAME.key in the folder to shut it out."""
    say(make_key(_open(keys).folder / HTTP_KEYS, name, max_priority, requests_per_minute))


def _open(folder: Path | None) -> Keys:
    return Keys(folder.expanduser() if folder is not None else default_folder())
