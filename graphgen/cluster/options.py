"""How many engines a cluster has and where: the options of `graphgen cluster up` beside those of engine and server."""

import re

from msgspec import Struct

from graphgen.cluster.scaling import ScalingLimits
from graphgen.ipc.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,19}")


class ClusterOptions(Struct, frozen=True, kw_only=True):
    """Raises ConfigError for what can never be met."""

    name: str = "default"
    """Of the cluster: by it `status` and `down` find it. Letters, digits, - and _, 20 at most."""
    engines: int = 1
    """Engines that are started, each on GPUs of its own, on the machines that have them."""
    min_engines: int | None = None
    """Fewer are never kept, however little there is to do. None: as many as --engines."""
    max_engines: int | None = None
    """More are never started, however much there is to do. None: as many as --engines."""
    address: str | None = None
    """HOST:PORT of a cluster of Ray that runs, as `ray start --head` says it. None: Ray is started on this machine."""
    wait_s: float = 0.0
    """Seconds to wait until machines with room for all engines have joined."""
    waiting_per_engine: int = 8
    """Requests that may wait for each engine; while more do, engines are added."""
    scale_up_s: float = 3.0
    """Seconds for which more have to wait before engines are added."""
    scale_down_s: float = 300.0
    """Seconds without a request that waits, and with room for all at the other engines, before one is removed."""
    kept_starts: float = 3.0
    """An engine is kept for at least so many times what its start takes, however little there is to do."""

    def __post_init__(self) -> None:
        if NAME.fullmatch(self.name) is None:
            raise ConfigError(f"the name {self.name!r} is none of a cluster: use 1 to 20 letters, digits, - and _")
        if self.engines < 1:
            raise ConfigError(f"engines is {self.engines}, the least is 1: raise it")
        if not 0 <= self.wait_s < float("inf"):
            raise ConfigError(f"wait_s is {self.wait_s}: give seconds from 0 on")
        least, most = self._bounds
        if not 1 <= least <= self.engines <= most:
            raise ConfigError(
                f"engines is {self.engines}, min_engines {least} and max_engines {most}: give"
                " 1 <= min_engines <= engines <= max_engines"
            )
        for name in ("scale_up_s", "scale_down_s", "kept_starts"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}: give a number from 0 on")
        self.limits  # noqa: B018  # which checks the rest

    @property
    def _bounds(self) -> tuple[int, int]:
        """The least number of engines and the most."""
        return (
            self.engines if self.min_engines is None else self.min_engines,
            self.engines if self.max_engines is None else self.max_engines,
        )

    @property
    def limits(self) -> ScalingLimits:
        least, most = self._bounds
        return ScalingLimits(
            least=least,
            most=most,
            waiting_per_engine=self.waiting_per_engine,
            up_after_s=self.scale_up_s,
            down_after_s=self.scale_down_s,
            kept_starts=self.kept_starts,
        )
