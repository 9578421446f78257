"""Whose process it is: what has threads and sockets works in the process that made it, and not in a fork of that.

Owns the check and what it says. A fork has neither the threads nor the state of the locks that they held, so the check
comes before any lock is taken. Used by the link to an engine and by the connection to a server.
"""

import os

from graphgen.ipc.errors import EngineDeadError


class Owner:
    """The process that made an object."""

    def __init__(self, what: str) -> None:
        """what: how errors call the object, with its article: `the engine`."""
        self._what = what
        self._pid = os.getpid()

    @property
    def is_this(self) -> bool:
        """False in a fork of the process."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raises EngineDeadError in a fork, where nothing would ever answer."""
        if not self.is_this:
            raise EngineDeadError(
                f"{self._what} was made in process {self._pid} and this is process {os.getpid()}, a fork of it: use it"
                " there, or make another here"
            )
