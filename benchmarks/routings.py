"""How requests are spread over replicas in a simulation: the router, and what it is held against.

The others know which engines died and nothing else of health. Called by `benchmarks.simulated_replicas`.
"""

from random import Random
from typing import Protocol

from graphgen.ipc.reports import EngineReport
from graphgen.router.policy import Router
from graphgen.router.records import Capacity, Choice, Loss, Refusal, RoutedRequest, RouterSettings

MAX_DIGESTS = 1 << 20
"""Of a router: one in a simulation has the clients of a hundred frontends."""


class Routing(Protocol):
    """What a simulation calls of `graphgen.router.policy.Router`."""

    def joined(self, engine_id: str, capacity: Capacity, now_s: float, /) -> None: ...
    def report(self, engine_id: str, report: EngineReport, now_s: float, /) -> None: ...
    def died(self, engine_id: str, now_s: float, /) -> tuple[Loss, ...]: ...
    def renewed(self, engine_id: str, epoch: int, now_s: float, /) -> None: ...
    def watch(self, now_s: float, /) -> tuple[Loss, ...]: ...
    def choose(self, request: RoutedRequest, now_s: float, /) -> Choice | Refusal: ...
    def sent(self, choice: Choice, /) -> None: ...
    def first_token(self, request_id: int, cached_tokens: int, now_s: float, /) -> None: ...
    def progress(self, request_id: int, num_output: int, now_s: float, /) -> None: ...
    def finished(self, request_id: int, num_output: int, /) -> None: ...
    def move(self, request_id: int, now_s: float, /) -> Choice | Refusal: ...


class Plain:
    """Without a look at prompts, speeds or reports: a subclass picks an engine."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._open: dict[str, dict[int, RoutedRequest]] = {}
        self._at: dict[int, str] = {}
        self._lost: dict[int, RoutedRequest] = {}
        self._dead: set[str] = set()

    def pick(self, living: list[str]) -> str:
        raise NotImplementedError

    def joined(self, engine_id: str, capacity: Capacity, now_s: float) -> None:
        self._open[engine_id] = {}

    def report(self, engine_id: str, report: EngineReport, now_s: float) -> None:
        """Nobody reads it."""

    def died(self, engine_id: str, now_s: float) -> tuple[Loss, ...]:
        self._dead.add(engine_id)
        lost, self._open[engine_id] = self._open[engine_id], {}
        self._lost |= lost
        return tuple(Loss(request_id, engine_id, 1) for request_id in lost)

    def renewed(self, engine_id: str, epoch: int, now_s: float) -> None:
        self._dead.discard(engine_id)

    def watch(self, now_s: float) -> tuple[Loss, ...]:
        return ()

    def choose(self, request: RoutedRequest, now_s: float) -> Choice | Refusal:
        living = (
            [engine_id for engine_id in self._open if engine_id not in self._dead] if self._dead else list(self._open)
        )
        return Choice(request, self.pick(living), 0, 0.0)

    def sent(self, choice: Choice) -> None:
        request_id = choice.request.request_id
        self._open[choice.engine_id][request_id] = choice.request
        self._at[request_id] = choice.engine_id
        self._lost.pop(request_id, None)

    def first_token(self, request_id: int, cached_tokens: int, now_s: float) -> None:
        """Nobody counts it."""

    def progress(self, request_id: int, num_output: int, now_s: float) -> None:
        """Nobody counts it."""

    def finished(self, request_id: int, num_output: int) -> None:
        del self._open[self._at.pop(request_id)][request_id]

    def move(self, request_id: int, now_s: float) -> Choice | Refusal:
        return self.choose(self._lost[request_id], now_s)


class RoundRobin(Plain):
    """One engine after another."""

    _next = 0

    def pick(self, living: list[str]) -> str:
        self._next += 1
        return living[self._next % len(living)]


class LeastOpen(Plain):
    """The engine with the fewest open requests of all; of equals any."""

    def pick(self, living: list[str]) -> str:
        least = min(len(self._open[engine_id]) for engine_id in living)
        return self._random.choice([engine_id for engine_id in living if len(self._open[engine_id]) == least])


ROUTINGS = ("router", "least open", "round robin")


def make_routing(name: str, seed: int) -> Routing:
    match name:
        case "router":
            return Router(RouterSettings(max_digests=MAX_DIGESTS), seed)
        case "least open":
            return LeastOpen(seed)
        case "round robin":
            return RoundRobin(seed)
    raise ValueError(f"{name!r} is no routing: choose one of {', '.join(ROUTINGS)}")
