"""What a keeper needs of whatever starts engines on machines: Ray, or a fake."""

from collections.abc import Mapping
from typing import Protocol

from graphgen.cluster.roster import Seen


class Launcher(Protocol):
    """Starts, watches and ends the lives of engines. No call waits for an engine, each may for an answer of Ray."""

    def start(self, number: int) -> None:
        """Begins a life of this engine, which has none."""

    def end(self, number: int, grace_s: float) -> None:
        """Ends the life of this engine, if it has one; its server has so long for what is open."""

    def look(self) -> Mapping[int, Seen]:
        """Of every engine that has a life. One that ends is among them until nothing of it is left."""

    def close(self) -> None:
        """Ends everything at once. Idempotent."""
