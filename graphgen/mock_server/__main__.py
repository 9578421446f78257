"""The command of the mock server. Owns its options and what it prints; called as `graphgen mock-server` too."""

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
import zmq

from graphgen.base.addresses import control_address
from graphgen.base.signals import EndSignals
from graphgen.ipc.errors import ConfigError
from graphgen.ipc.ggp.messages import DEFAULT_ADDRESS
from graphgen.mock_server.script import built_in_script, read_script
from graphgen.mock_server.server import MockServer
from graphgen.mock_server.sockets import Keys


def mock_server(
    bind: Annotated[
        str, typer.Option(help="Address of the data socket; tcp://127.0.0.1:* takes a free port.", metavar="ADDRESS")
    ] = DEFAULT_ADDRESS,
    control: Annotated[
        str | None,
        typer.Option(help="Address of the control socket.", metavar="ADDRESS", show_default="the next port"),
    ] = None,
    script: Annotated[
        Path | None, typer.Option(help="JSON file with the answers.", metavar="FILE", show_default="built in")
    ] = None,
    curve: Annotated[bool, typer.Option("--curve", help="Encrypt; any client key is let in.", metavar="")] = False,
    grace_s: Annotated[float, typer.Option(min=0, help="Seconds for open requests after SIGTERM.", metavar="X")] = 10.0,
    print_script: Annotated[
        bool, typer.Option("--print-script", help="Print the built-in script and end.", metavar="")
    ] = False,
) -> None:
    """Speak GGP/1 without a model: scripted answers, stalls, faults and disconnects, for authors of clients.

    A token is a byte of UTF-8. Prompts with an answer of their own: stall, hang, silence, restart, drain, unicode,
    burst, slow, gap, garbage, future, late error, overloaded, new error, and "error CODE" for each error code. Every
    other prompt is echoed word by word.
    """
    if print_script:
        print(msgspec.json.format(msgspec.json.encode(built_in_script())).decode())
        return
    keys = Keys(*zmq.curve_keypair()) if curve else None
    server = MockServer(
        read_script(script) if script else built_in_script(), bind, control or control_address(bind), keys
    )
    signals = EndSignals(lambda num_wishes: server.drain(grace_s) if num_wishes == 1 else server.stop())
    print(f"listening on {server.address} (data)\nlistening on {server.control_address} (control)")
    if keys is not None:
        print(f"public key {keys.public.decode()}")
    print("ready", flush=True)
    server.run()
    signals.ignore()


def main() -> None:
    try:
        typer.run(mock_server)
    except (ConfigError, zmq.ZMQError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
