"""The engines of a cluster: which there should be, how each is, and what is to be done about it now.

Pure: told the time and what was seen, answers with actions; starts and asks nothing. Called by
`graphgen.cluster.keeper` at every look, which does what it says.

    waiting ──> placing ──> starting ──> serving ──> draining ──> ending ──> gone
       ^           │            │           │
       └───────────┴────────────┴───────────┘  lost: its process, its node or its place

What a frontend does not know yet it is told again at every look, so one that was started anew learns all engines, and
an action that failed is tried again.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

from msgspec import Struct

from graphgen.cluster.scaling import Load, Scaling
from graphgen.launch.starts import Backoff, StartLimit

UNSERVED_S = 120.0
"""An engine whose processes live, and that the frontend cannot use for so long, is replaced."""
DRAIN_SLACK_S = 60.0
"""Beyond its grace, until an engine that should have drained is ended nevertheless."""

LifeState = Literal["placing", "starting", "serving", "lost", "ending"]
EngineState = Literal["waiting", "placing", "starting", "serving", "draining", "ending"]


class Address(Struct, frozen=True):
    """Where an engine listens, the public key by which it is known, and what it can run there."""

    data: str
    control: str
    server_key: str
    num_slots: int  # requests that run at a time


class Seen(Struct, frozen=True):
    """What is known of the present life of an engine: its actor, and the server that this has started."""

    state: LifeState
    node: str = ""
    address: Address | None = None  # once it serves
    reason: str = ""  # of a lost one
    pids: tuple[int, ...] = ()  # on its node: of the actor, and of the server that this has started


class EngineLoad(Struct, frozen=True):
    """What one engine has to do."""

    num_running: int
    num_waiting: int
    kv_usage: float


class View(Struct, frozen=True):
    """What the frontend says. engines: by their data addresses, whether each serves there."""

    engines: Mapping[str, bool]
    load: Load | None  # None: it does not say
    loads: Mapping[str, EngineLoad] = {}
    num_held: int = 0  # requests that wait in the frontend


class Start(Struct, frozen=True):
    """Another life of an engine."""

    number: int


class End(Struct, frozen=True):
    """End what there is of an engine's life, and free its place; its server has so long for what is open."""

    number: int
    grace_s: float = 0.0


class Add(Struct, frozen=True):
    """The frontend may send requests to it."""

    address: Address


class Remove(Struct, frozen=True):
    """The frontend may no longer; what is open there after the grace goes on elsewhere."""

    address: str
    grace_s: float


Action = Start | End | Add | Remove


class EngineStatus(Struct, frozen=True):
    """One engine, for whoever asks."""

    number: int
    state: EngineState
    node: str
    address: str
    restarts: int
    since_s: float  # so long it has been so
    problem: str  # why it was lost last
    pids: tuple[int, ...]


class _Engine:
    """One engine through all its lives."""

    def __init__(self, number: int, now_s: float) -> None:
        self.number = number
        self.state: EngineState = "waiting"
        self.since_s = now_s
        self.due_s = now_s  # of the next start
        self.asked_s = now_s
        self.node = ""
        self.pids: tuple[int, ...] = ()
        self.address: Address | None = None
        self.limit = StartLimit()
        self.backoff = Backoff()
        self.restarts = 0
        self.problem = ""
        self.served_s = now_s  # when the frontend could use it last
        self.grace_s = 0.0

    def change(self, state: EngineState, now_s: float) -> None:
        self.state = state
        self.since_s = now_s


class Roster:
    """As many engines as the scaling says, each started again when it is lost."""

    def __init__(self, scaling: Scaling, grace_s: float) -> None:
        """grace_s: for requests that are open at an engine which is no longer needed."""
        self._scaling = scaling
        self._grace_s = grace_s
        self._engines: dict[int, _Engine] = {}
        self.news: list[str] = []
        """What an operator should know since this was emptied."""

    @property
    def num_wanted(self) -> int:
        return self._scaling.num_engines

    def serving(self) -> list[Address]:
        """Of the engines to which requests may be sent."""
        return [one.address for one in self._engines.values() if one.state == "serving" and one.address is not None]

    def losses(self) -> list[str]:
        """Why engines were lost that do not serve again yet."""
        return [f"engine {one.number}: {one.problem}" for one in self._engines.values() if one.problem]

    def status(self, now_s: float) -> list[EngineStatus]:
        return [
            EngineStatus(
                one.number,
                one.state,
                one.node,
                "" if one.address is None else one.address.data,
                one.restarts,
                now_s - one.since_s,
                one.problem,
                one.pids,
            )
            for one in sorted(self._engines.values(), key=lambda one: one.number)
        ]

    def advance(self, now_s: float, seen: Mapping[int, Seen], view: View | None) -> list[Action]:
        """What is to be done now. seen: of every engine that has a life. view: None while no frontend answers."""
        actions: list[Action] = []
        for engine in list(self._engines.values()):
            actions += self._look_at(engine, now_s, seen.get(engine.number), view)
        actions += self._scale(now_s, seen, view)
        if view is not None:
            known = {one.address.data for one in self._engines.values() if one.address is not None}
            actions += [Remove(address, 0.0) for address in view.engines if address not in known]
        return actions

    # --- one engine ------------------------------------------------------------------------------------------------

    def _look_at(self, engine: _Engine, now_s: float, seen: Seen | None, view: View | None) -> Iterator[Action]:
        match engine.state:
            case "waiting":
                # Not before what is left of its last life is gone: it may hold a device.
                if seen is None and now_s >= engine.due_s and engine.limit.take(now_s):
                    yield self._start(engine, now_s)
            case "placing" | "starting":
                yield from self._look_at_start(engine, now_s, seen)
            case "serving":
                yield from self._look_at_service(engine, now_s, seen, view)
            case "draining":
                if self._has_drained(engine, now_s, seen, view):
                    yield from self._end(engine, now_s, seen)
                elif view is not None and engine.address is not None and engine.address.data in view.engines:
                    yield Remove(engine.address.data, engine.grace_s)
            case "ending":
                if seen is None:
                    del self._engines[engine.number]

    def _start(self, engine: _Engine, now_s: float) -> Action:
        engine.backoff.started(now_s)
        engine.change("placing", now_s)
        engine.asked_s = now_s
        return Start(engine.number)

    def _look_at_start(self, engine: _Engine, now_s: float, seen: Seen | None) -> Iterator[Action]:
        if seen is None or seen.state in ("lost", "ending"):
            yield from self._lose(engine, now_s, "its actor is gone" if seen is None else seen.reason)
            return
        engine.node, engine.pids = seen.node, seen.pids
        if seen.state == "starting" and engine.state == "placing":
            engine.change("starting", now_s)
        if seen.state == "serving":
            engine.address = seen.address
            engine.limit.succeeded()
            engine.problem = ""
            engine.served_s = now_s
            engine.change("serving", now_s)
            self._scaling.engine_started(now_s - engine.asked_s)
            self.news.append(f"engine {engine.number} serves on {engine.node}")

    def _look_at_service(self, engine: _Engine, now_s: float, seen: Seen | None, view: View | None) -> Iterator[Action]:
        assert engine.address is not None, "it serves"
        data = engine.address.data
        if view is None or view.engines.get(data, False):
            engine.served_s = now_s
        elif data not in view.engines:
            yield Add(engine.address)
        if seen is None or seen.state in ("lost", "ending"):
            yield from self._lose(engine, now_s, "its actor is gone" if seen is None else seen.reason)
        elif now_s - engine.served_s > UNSERVED_S:
            yield from self._lose(engine, now_s, f"the frontend could not use it for {UNSERVED_S:g} s")

    def _lose(self, engine: _Engine, now_s: float, reason: str) -> Iterator[Action]:
        """It is started again, where there is a place, after a wait that grows."""
        wait_s = engine.backoff.ended(now_s)
        engine.problem = reason
        engine.restarts += 1
        engine.due_s = now_s + wait_s
        engine.node, engine.pids, engine.address = "", (), None
        engine.change("waiting", now_s)
        self.news.append(f"engine {engine.number} is lost, and is started again: {reason}")
        yield End(engine.number)

    def _has_drained(self, engine: _Engine, now_s: float, seen: Seen | None, view: View | None) -> bool:
        """Also where nothing can drain any more."""
        if seen is None or seen.state != "serving" or now_s - engine.since_s > engine.grace_s + DRAIN_SLACK_S:
            return True
        return view is not None and engine.address is not None and engine.address.data not in view.engines

    def _end(self, engine: _Engine, now_s: float, seen: Seen | None) -> Iterator[Action]:
        engine.address = None
        if seen is None and engine.state == "waiting":  # one that was started a moment ago is not seen yet
            del self._engines[engine.number]
            return
        engine.change("ending", now_s)
        yield End(engine.number)

    # --- all of them -----------------------------------------------------------------------------------------------

    def _scale(self, now_s: float, seen: Mapping[int, Seen], view: View | None) -> Iterator[Action]:
        decision = self._scaling.decide(now_s, None if view is None else view.load)
        if decision.reason:
            self.news.append(f"{decision.num_engines} engines are wanted: {decision.reason}")
        kept = [one for one in self._engines.values() if one.state not in ("draining", "ending")]
        for _ in range(decision.num_engines - len(kept)):
            number = next(number for number in range(len(self._engines) + 1) if number not in self._engines)
            self._engines[number] = engine = _Engine(number, now_s)
            yield from self._look_at(engine, now_s, seen.get(number), view)
        for engine in self._least_needed(kept)[: max(0, len(kept) - decision.num_engines)]:
            yield from self._retire(engine, now_s, seen.get(engine.number))

    def _least_needed(self, engines: list[_Engine]) -> list[_Engine]:
        """What serves least first; of those that are alike, the one with the highest number."""
        order: list[EngineState] = ["waiting", "placing", "starting", "serving"]
        return sorted(engines, key=lambda one: (order.index(one.state), -one.number))

    def _retire(self, engine: _Engine, now_s: float, seen: Seen | None) -> Iterator[Action]:
        if engine.state == "serving":
            engine.grace_s = self._grace_s
            engine.change("draining", now_s)
            self.news.append(f"engine {engine.number} is not needed any more: it drains, then ends")
            assert engine.address is not None, "it serves"
            yield Remove(engine.address.data, engine.grace_s)
        else:
            yield from self._end(engine, now_s, seen)
