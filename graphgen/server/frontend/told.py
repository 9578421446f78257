"""What frontends elsewhere that route requests here are told of this server's engines.

Owns nothing. Called by `graphgen.server.frontend.reception` on the server's loop.
"""

from graphgen.ipc.ggp.routing import Capacity, Load
from graphgen.router.links import Links
from graphgen.router.remote_messages import capacity_of, load_of


class Told:
    """Of the engines behind some links, as one."""

    def __init__(self, links: Links) -> None:
        self._links = links

    def capacity(self) -> Capacity | None:
        """What they hold; None while none serves."""
        if not self._links.num_serving:
            return None
        return capacity_of(self._links.ready, self._links.num_engines)

    def load(self) -> Load | None:
        """What they have to do; None before they have said so."""
        report = self._links.report()
        return None if report is None else load_of(report, self._links.num_engines)
