"""The keeper of a cluster: looks at engines and frontend twice a second, and does what the roster says.

Owns the loop, from the first engine to the end of the last; decides nothing. It sees no token. Called by
`graphgen.cluster.up`, on the main thread of `graphgen cluster up`.
"""

import os
import time
from collections.abc import Callable

from graphgen.base.signals import EndSignals
from graphgen.cluster.frontend import Frontend
from graphgen.cluster.launcher import Launcher
from graphgen.cluster.record import ClusterStatus, EngineLine, Phase, Question, Record
from graphgen.cluster.roster import Action, Add, End, EngineLoad, Remove, Roster, Start, View
from graphgen.cluster.scaling import Scaling
from graphgen.ipc.errors import EngineDeadError

LOOK_S = 0.5
END_S = 5.0
"""For an engine with nothing open to end in order."""
FORCED_END_S = 30.0
"""Until what does not end in order is killed."""
NO_LOAD = EngineLoad(0, 0, 0.0)


class Keeper:
    """One cluster."""

    def __init__(
        self,
        name: str,
        scaling: Scaling,
        launcher: Launcher,
        frontend: Frontend,
        record: Record,
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
        self._record = record
        self._ray_address = ray_address
        self._grace_s = grace_s
        self._start_timeout_s = start_timeout_s
        self._say = say
        self._phase: Phase = "starting"
        self._begun_s = time.monotonic()
        self._num_asked_to_end = 0
        self._view: View | None = None

    def run(self, signals: EndSignals) -> int:
        """Keeps the cluster until a signal or `graphgen cluster down`: the exit code, 0 when every request got its
        whole output. Raises EngineDeadError where an engine or the frontend does not start at the first time."""
        try:
            self._start(signals)
            while not self._ends(signals):
                self._turn()
            self._say(f"draining: open requests have {self._grace_s:g} s; a second signal ends them now")
            return self._drain(signals)
        finally:
            self._phase = "ending"
            self._end_engines()
            self._frontend.close()

    def _ends(self, signals: EndSignals) -> bool:
        return bool(signals.num_wishes or self._num_asked_to_end)

    def _start(self, signals: EndSignals) -> None:
        """All engines, then the frontend, which wants to know the first ones from the beginning."""
        deadline_s = time.monotonic() + self._start_timeout_s
        while self._frontend.place is None and not self._ends(signals):
            self._look()
            if losses := self._roster.losses():
                raise EngineDeadError(f"the cluster does not start: {losses[0]}")
            engines = self._roster.serving()
            if len(engines) >= self._scaling.num_engines:
                self._frontend.keep(engines)
            if time.monotonic() > deadline_s:
                raise EngineDeadError(self._why_late())
        if self._frontend.place is not None:
            self._phase = "serving"
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
        self._frontend.keep(self._roster.serving())
        self._view = self._frontend.look()
        self._look()

    def _look(self) -> None:
        """At all engines, and does what is to be done; then answers whoever asks until the next look."""
        now_s = time.monotonic()
        for action in self._roster.advance(now_s, self._launcher.look(), self._view):
            self._do(action)
        for line in self._roster.news:
            self._say(line)
        self._roster.news.clear()
        self._record.serve(self._answer, LOOK_S)

    def _do(self, action: Action) -> None:
        match action:
            case Start():
                self._launcher.start(action.number)
            case End():
                self._launcher.end(action.number, action.grace_s)
            case Add():
                self._frontend.add(action.address)
            case Remove():
                self._frontend.remove(action.address, action.grace_s)

    def _drain(self, signals: EndSignals) -> int:
        """Nothing new is taken; what is open has its grace, which another signal ends. The exit code."""
        if self._frontend.place is None:
            return 0
        self._phase = "ending"
        seen = signals.num_wishes + self._num_asked_to_end
        self._frontend.ask_to_end()
        deadline_s = time.monotonic() + self._grace_s + FORCED_END_S
        while self._frontend.exit_code is None and time.monotonic() < deadline_s:
            self._record.serve(self._answer, LOOK_S / 5)
            if signals.num_wishes + self._num_asked_to_end > seen:
                seen = signals.num_wishes + self._num_asked_to_end
                self._frontend.ask_to_end()
        code = self._frontend.exit_code
        return 1 if code is None else code

    def _end_engines(self) -> None:
        for number in self._launcher.look():
            self._launcher.end(number, END_S)
        deadline_s = time.monotonic() + FORCED_END_S
        while self._launcher.look() and time.monotonic() < deadline_s:
            self._record.serve(self._answer, LOOK_S / 5)
        self._launcher.close()

    # --- who asks --------------------------------------------------------------------------------------------------

    def _answer(self, question: Question) -> ClusterStatus:
        if question.action == "down":
            self._num_asked_to_end += 1
            self._phase = "ending"
        now_s = time.monotonic()
        place, loads = self._frontend.place, {} if self._view is None else self._view.loads
        lines = [(one, loads.get(one.address, NO_LOAD)) for one in self._roster.status(now_s)]
        return ClusterStatus(
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
