"""Machines and a frontend that do at once what they are told, or when a test lets them."""

import threading
import time
from collections.abc import Collection, Mapping
from typing import Literal

from graphgen.base.signals import EndSignals
from graphgen.cluster.roster import Address, EngineLoad, Seen, View
from graphgen.cluster.scaling import Load
from graphgen.ipc.errors import EngineDeadError
from graphgen.server.supervisor import ServerPlace


class NoSignals(EndSignals):
    """So many wishes as the test says."""

    def __init__(self) -> None:
        self.num_wishes = 0

    def ignore(self) -> None:
        """There is no handler."""


class FakeLauncher:
    """Lives that serve from the second look on. `broken`: why none starts."""

    def __init__(self) -> None:
        self.seen: dict[int, Seen] = {}
        self.num_lives = 0
        self.broken = ""
        self.is_closed = False

    def start(self, number: int) -> None:
        self.num_lives += 1
        self.seen[number] = Seen("starting", "here")

    def end(self, number: int, grace_s: float) -> None:
        if number in self.seen:
            self.seen[number] = Seen("ending")

    def look(self) -> Mapping[int, Seen]:
        found = dict(self.seen)
        for number, one in found.items():
            if one.state == "ending":
                del self.seen[number]
            elif one.state == "starting" and self.broken:
                self.seen[number] = Seen("lost", reason=self.broken)
            elif one.state == "starting":
                data = f"tcp://here:{self.num_lives}0{number}"
                self.seen[number] = Seen("serving", "here", Address(data, data, "key", 4), pids=(1, 2))
        return found

    def close(self) -> None:
        self.seen.clear()
        self.is_closed = True


class SlowLauncher(FakeLauncher):
    """Whose calls wait while `waits` is set, as those of a Ray that does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self._goes_on = threading.Event()
        self._goes_on.set()
        self.waits_in: Literal["", "start", "end", "look"] = ""
        self.is_waiting = False

    def wait_in(self, call: Literal["start", "end", "look"]) -> None:
        """From its next call on."""
        self._goes_on.clear()
        self.waits_in = call

    def go_on(self) -> None:
        self.waits_in = ""
        self._goes_on.set()

    def _wait(self, call: str) -> None:
        if call == self.waits_in:
            self.is_waiting = True
            assert self._goes_on.wait(60.0), "a test lets it go on"
            self.is_waiting = False

    def start(self, number: int) -> None:
        self._wait("start")
        super().start(number)

    def end(self, number: int, grace_s: float) -> None:
        self._wait("end")
        super().end(number, grace_s)

    def look(self) -> Mapping[int, Seen]:
        self._wait("look")
        return super().look()


class FakeFrontend:
    """Serves as soon as it is kept. It ends when it is asked to, unless `drains`; a second time in any case."""

    def __init__(self) -> None:
        self.engines: list[str] = []
        self.load = Load(0, 0, 0.0, 1, 4)
        self.place: ServerPlace | None = None
        self.num_restarts = 0
        self.exit_code: int | None = None
        self.drains = False
        self.broken = ""
        self.asked_to_end_s: list[float] = []
        self.is_closed = False
        self.busy = threading.Lock()
        """While a test holds it, the frontend does not answer."""

    def keep(self, engines: Collection[Address]) -> None:
        if self.broken:
            raise EngineDeadError(self.broken)
        if self.place is None:
            self.engines = [one.data for one in engines]
            self.place = ServerPlace(("tcp://here:1",), ("tcp://here:2",), "/nowhere", 4)

    def look(self) -> View | None:
        with self.busy:
            loads = {one: EngineLoad(3, 4, 0.25) for one in self.engines}
        return View(dict.fromkeys(self.engines, True), self.load, loads, num_held=5)

    def add(self, address: Address) -> None:
        self.engines.append(address.data)

    def remove(self, address: str, grace_s: float) -> None:
        self.engines.remove(address)

    def ask_to_end(self) -> None:
        self.asked_to_end_s.append(time.monotonic())
        if not self.drains or self.num_asked_to_end > 1:
            self.exit_code = 0

    @property
    def num_asked_to_end(self) -> int:
        return len(self.asked_to_end_s)

    def close(self) -> None:
        self.is_closed = True
