"""The actor of one engine: starts its server on the machine where Ray has placed it, watches it, and ends it.

Owns the server's process and its CURVE keys. Imports no Ray: `graphgen.cluster.ray_launcher` makes an actor of the
class. One life: when the server ends the actor says so, and whoever made it makes another, perhaps elsewhere.
"""

import os
import socket

from graphgen.base.version import __version__
from graphgen.cluster.child import ServerChild
from graphgen.cluster.orders import EngineOrder, EngineReport
from graphgen.ipc.errors import ConfigError
from graphgen.server.frontend.keys import Keys
from graphgen.server.options import ServeOptions

FRONTEND_KEY = "frontend"


class EngineActor:
    """`report` and `end` are called on two threads."""

    def __init__(self, order: bytes, address: str) -> None:
        """address: by which Ray knows this machine."""
        told = EngineOrder.decode(order)
        if told.version != __version__:
            raise ConfigError(
                f"{socket.gethostname()} has graphgen {__version__}, and the cluster was started with {told.version}:"
                " install the same version on every machine"
            )
        self._child = ServerChild(f"engine {told.number}")
        keys = Keys(self._child.folder / "keys")
        _, self._server_key = keys.make(None)
        keys.allow(FRONTEND_KEY, told.client_key, routes=True)
        options = ServeOptions(
            data=f"tcp://{_bracketed(told.host or address)}:*",
            keys=str(keys.folder),
            grace_s=told.grace_s,
            log_requests=False,
        )
        self._child.start(told.config, options)

    def report(self) -> bytes:
        """An EngineReport."""
        node, problem, place = socket.gethostname(), self._child.find_end(), self._child.place()
        if problem is not None:
            return EngineReport("ended", node, problem=problem).encode()
        pids = (os.getpid(), self._child.pid or 0)
        if place is None:
            return EngineReport("starting", node, pids=pids).encode()
        return EngineReport(
            "serving", node, place.data[0], place.control[0], self._server_key, pids=pids, num_slots=place.num_slots
        ).encode()

    def end(self, grace_s: float) -> None:
        """Returns when nothing is left of the server, at the latest soon after the grace."""
        if grace_s:
            self._child.ask_to_end()
        self._child.stop(grace_s)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
