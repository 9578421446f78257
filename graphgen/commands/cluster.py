"""`graphgen cluster`: engines on many machines, which Ray starts and watches, behind one address.

Owns the options, what is printed and the exit codes: 0 it is done, 1 it cannot be or is not as asked, 2 the command is
wrong or nothing of the name is up.
"""

import sys
import time
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from graphgen.cluster.options import ClusterOptions
from graphgen.cluster.record import ClusterStatus, Question, ask, is_up, names_up
from graphgen.commands.fields import options_of
from graphgen.commands.options import SERVE_OPTIONS, takes_engine_options, takes_fields
from graphgen.ipc.errors import ConfigError
from graphgen.launch.config import EngineConfig
from graphgen.server.options import ServeOptions
from graphgen.server.serving import say

NOT_DONE_EXIT = 1
LOOK_S = 0.2
PIPED_WIDTH = 160
"""Of a table that no terminal shows."""
LONG_S = 2.0
"""What a keeper does for so long is told."""

cluster_app = typer.Typer(no_args_is_help=True, help="Engines on many machines behind one address, through Ray.")

_FRONTEND_OPTIONS = [one for one in SERVE_OPTIONS if one.name not in ("engines", "engine_keys", "frontends")]
_takes_cluster = takes_fields("cluster", ClusterOptions, options_of(ClusterOptions), panel="Cluster")
_takes_frontend = takes_fields("options", ServeOptions, _FRONTEND_OPTIONS, panel="Server")

Name = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="Of the cluster.", show_default="the only one that is up")
]


@cluster_app.command()
@takes_engine_options(without=("replicas",))
@_takes_frontend
@_takes_cluster
def up(config: EngineConfig, options: ServeOptions, cluster: ClusterOptions) -> None:
    """Start engines and a frontend for them, and keep them until Ctrl-C, SIGTERM or `graphgen cluster down`.

    Ray places the engines, on this machine or on those of --address, and says when one is lost, which is then started
    again where there is a place. Requests go from clients to the frontend and to the engines, never through Ray.
    """
    from graphgen.cluster.up import run_cluster

    sys.exit(run_cluster(config, options, cluster, say))


@cluster_app.command()
def status(
    name: Name = None, json: Annotated[bool, typer.Option("--json", help="Print it as JSON.", metavar="")] = False
) -> None:
    """Print how a cluster that was started on this machine is: its engines, where they are, and what they do."""
    found = ask(_name_of(name), Question("status"))
    if json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(found), indent=1).decode() + "\n")
        return
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    console.print(_headline(found), soft_wrap=True, markup=False, highlight=False)
    if found.engines:
        console.print(_table(found))
    for one in found.engines:
        if one.status.problem:
            console.print(
                f"engine {one.status.number} was lost: {one.status.problem}", soft_wrap=True, markup=False, style="red"
            )


@cluster_app.command()
def down(
    name: Name = None,
    timeout_s: Annotated[float, typer.Option(min=0, help="Seconds to wait until everything has ended.")] = 120.0,
    now: Annotated[bool, typer.Option("--now", help="Give open requests no time to finish.", metavar="")] = False,
) -> None:
    """End a cluster: open requests have its --grace-s, then engines, frontend and the Ray that it started end."""
    name = _name_of(name)
    for _ in range(2 if now else 1):
        ask(name, Question("down"))
    deadline_s = time.monotonic() + timeout_s
    while is_up(name):
        if time.monotonic() > deadline_s:
            sys.stderr.write(f"the cluster {name!r} has not ended after {timeout_s:g} s: it drains; try --now\n")
            raise typer.Exit(NOT_DONE_EXIT)
        time.sleep(LOOK_S)
    sys.stdout.write(f"the cluster {name!r} is down\n")


def _name_of(name: str | None) -> str:
    """The cluster that is meant: the only one, unless it is named. Raises ConfigError."""
    if name is not None:
        return ClusterOptions(name=name).name
    found = names_up()
    if not found:
        raise ConfigError("no cluster of this user is up on this machine: start one with `graphgen cluster up`")
    if len(found) > 1:
        raise ConfigError(f"several clusters are up: name one with --name {' or '.join(found)}")
    return found[0]


def _headline(found: ClusterStatus) -> str:
    bounds = f", {found.least} to {found.most}" if found.least < found.most else ""
    start = f"; a start takes {found.cold_start_s:.0f} s" if found.cold_start_s else ""
    lines = [
        f"{found.name}  {found.phase}, up for {found.up_s:.0f} s, process {found.pid}",
        f"engines wanted: {found.num_wanted}{bounds}{start}",
    ]
    if found.ray:
        lines.append(f"Ray at {found.ray}")
    if found.doing_s >= LONG_S:
        old = f"; engines are shown as they were {found.age_s:.0f} s ago" if found.engines else ""
        lines.append(f"{found.doing} for {found.doing_s:.0f} s{old}")
    if found.data:
        restarts = f", restarted {found.frontend_restarts} times" if found.frontend_restarts else ""
        lines.append(f"clients connect to {found.data}{restarts}; {found.num_held} requests wait in the frontend")
    return "\n".join(lines)


def _table(found: ClusterStatus) -> Table:
    table = Table("engine", "node", "state", "for", "running", "waiting", "KV", "restarts", "address")
    for column in table.columns:
        column.no_wrap = True
    for number in (0, 3, 4, 5, 6, 7):
        table.columns[number].justify = "right"
    table.columns[-1].overflow = "ignore"
    for one in found.engines:
        status = one.status
        table.add_row(
            str(status.number),
            status.node or "-",
            status.state,
            f"{status.since_s:.0f} s",
            str(one.num_running),
            str(one.num_waiting),
            f"{one.kv_usage:.0%}",
            str(status.restarts),
            status.address or "-",
        )
    return table
