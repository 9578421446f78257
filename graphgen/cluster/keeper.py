"""The keeper of a cluster: looks at engines and frontend twice a second, and does what the roster says.

Owns the loop, from the first engine to the end of the last; decides nothing. It sees no token. It waits for Ray and for
the frontend, and answers nobody: before it waits it publishes how the cluster is. Called by `graphgen.cluster.up`, on
the main thread of `graphgen cluster up`.
"""

import os
import time
from collections.abc import Callable

from graphgen.base.signals import SAME_S, EndSignals
from graphgen.cluster.answering import Answering
from graphgen.cluster.frontend import Frontend
from graphgen.cluster.launcher import Launcher
from graphgen.cluster.record import ClusterStatus, EngineLine, Phase
from graphgen.cluster.roster import Action, Add, End, EngineLoad, Remove, Roster, Start, View
from graphgen.cluster.scaling import Scaling
from graphgen.ipc.errors import EngineDeadError

LOOK_S = 0.5
END_S = 5.0
"""For an engine with nothing open to end in order."""
FORCED_END_S = 30.0
"""Until what does not end in order is killed."""
ENDED_AT_ONCE = 2
"""Wishes to end, from which on open requests get no more time."""
NO_LOAD = EngineLoad(0, 0, 0.0)


class Keeper:
    """One cluster."""

    def __init__(
        self,
        name: str,
        scaling: Scaling,
        launcher: Launcher,
        frontend: Frontend,
        answering: Answering,
        ray_address: str,
        grace_s: float,
        start_timeout_s: float,
        say: Callable[[str], None],
    ) -> None:
        """grace_s: for what is open at an engine that leaves, and at all of them in the end. say: gets what an operator
        should see."""
        self._name = name
        self._scaling = scaling
        self._roster = Roster(scaling, grace_s)
        self._launcher = launcher
        self._frontend = frontend
        self._answering = answering
        self._ray_address = ray_address
        self._grace_s = grace_s
        self._start_timeout_s = start_timeout_s
        self._say = say
        self._phase: Phase = "starting"
        self._begun_s = time.monotonic()
        self._view: View | None = None

    def run(self, signals: EndSignals) -> int:
        """Keeps the cluster until a signal or `graphgen cluster down`: the exit code, 0 when every request got its
        whole output. Raises EngineDeadError where an engine or the frontend does not start at the first time."""
        try:
            self._start(signals)
            while not self._num_wishes(signals):
                self._turn()
            self._say(f"draining: open requests have {self._grace_s:g} s; a second signal ends them now")
            return self._drain(signals)
        finally:
            self._phase = "ending"
            self._publish()
            try:
                self._end_engines()
            finally:
                with self._answering.doing("stopping the frontend"):
                    self._frontend.close()

    def _num_wishes(self, signals: EndSignals) -> int:
        """To end."""
        return signals.num_wishes + self._answering.num_asked_to_end

    def _start(self, signals: EndSignals) -> None:
        """All engines, then the frontend, which wants to know the first ones from the beginning."""
        deadline_s = time.monotonic() + self._start_timeout_s
        while self._frontend.place is None and not self._num_wishes(signals):
            self._look()
            if losses := self._roster.losses():
                raise EngineDeadError(f"the cluster does not start: {losses[0]}")
            engines = self._roster.serving()
            if len(engines) >= self._scaling.num_engines:
                with self._answering.doing("starting the frontend"):
                    self._frontend.keep(engines)
            if time.monotonic() > deadline_s:
                raise EngineDeadError(self._why_late())
        if self._frontend.place is not None:
            self._phase = "serving"
            self._publish()  # before anybody is told that it serves
            took_s = time.monotonic() - self._begun_s
            self._say(
                f"the cluster {self._name!r} serves with {len(self._roster.serving())} engines after {took_s:.1f} s"
            )

    def _why_late(self) -> str:
        states = ", ".join(f"engine {one.number} {one.state}" for one in self._roster.status(time.monotonic()))
        return (
            f"the cluster was not ready after {self._start_timeout_s:g} s ({states}): raise start_timeout_s, or see"
            " `ray status` for why no place is free"
        )

    def _turn(self) -> None:
        with self._answering.doing("asking the frontend how it is"):
            self._frontend.keep(self._roster.serving())
            self._view = self._frontend.look()
        self._look()

    def _look(self) -> None:
        """At all engines, and does what is to be done; then waits for the next look."""
        with self._answering.doing("asking Ray how the engines are"):
            seen = self._launcher.look()
        actions = self._roster.advance(time.monotonic(), seen, self._view)
        for line in self._roster.news:
            self._say(line)
        self._roster.news.clear()
        self._publish()
        for action in actions:
            self._do(action)
        self._answering.wait(LOOK_S)

    def _do(self, action: Action) -> None:
        match action:
            case Start(number):
                with self._answering.doing(f"asking Ray for a place for engine {number}"):
                    self._launcher.start(number)
            case End(number):
                with self._answering.doing(f"stopping engine {number}"):
                    self._launcher.end(number, action.grace_s)
            case Add(address):
                with self._answering.doing(f"telling the frontend to use {address.data}"):
                    self._frontend.add(address)
            case Remove(address):
                with self._answering.doing(f"telling the frontend to leave {address}"):
                    self._frontend.remove(address, action.grace_s)

    def _drain(self, signals: EndSignals) -> int:
        """Nothing new is taken; what is open has its grace, which another signal ends. The exit code."""
        if self._frontend.place is None:
            return 0
        self._phase = "ending"
        self._publish()
        num_told, next_s = 0, 0.0
        deadline_s = time.monotonic() + self._grace_s + FORCED_END_S
        with self._answering.doing("waiting for open requests"):
            while self._frontend.exit_code is None and time.monotonic() < deadline_s:
                if num_told < min(self._num_wishes(signals), ENDED_AT_ONCE) and time.monotonic() >= next_s:
                    self._frontend.ask_to_end()
                    num_told += 1
                    next_s = time.monotonic() + 2 * SAME_S  # sooner it would take both for one
                self._answering.wait(LOOK_S / 5)
        code = self._frontend.exit_code
        return 1 if code is None else code

    def _end_engines(self) -> None:
        with self._answering.doing("stopping the engines"):
            for number in self._launcher.look():
                self._launcher.end(number, END_S)
            deadline_s = time.monotonic() + FORCED_END_S
            while self._launcher.look() and time.monotonic() < deadline_s:
                self._answering.wait(LOOK_S / 5)
            self._launcher.close()

    # --- what others are told --------------------------------------------------------------------------------------

    def _publish(self) -> None:
        now_s = time.monotonic()
        place, loads = self._frontend.place, {} if self._view is None else self._view.loads
        lines = [(one, loads.get(one.address, NO_LOAD)) for one in self._roster.status(now_s)]
        status = ClusterStatus(
            name=self._name,
            pid=os.getpid(),
            phase=self._phase,
            up_s=now_s - self._begun_s,
            ray=self._ray_address,
            data="" if place is None else place.data[0],
            control="" if place is None else place.control[0],
            num_wanted=self._scaling.num_engines,
            least=self._scaling.limits.least,
            most=self._scaling.limits.most,
            num_held=0 if self._view is None else self._view.num_held,
            engines=tuple(EngineLine(one, load.num_running, load.num_waiting, load.kv_usage) for one, load in lines),
            frontend_restarts=self._frontend.num_restarts,
            cold_start_s=self._scaling.cold_start_s,
        )
        self._answering.publish(status)
