"""Machines and a frontend that do at once what they are told."""

from collections.abc import Collection, Mapping

from graphgen.cluster.roster import Address, EngineLoad, Seen, View
from graphgen.cluster.scaling import Load
from graphgen.ipc.errors import EngineDeadError
from graphgen.server.supervisor import ServerPlace


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
                self.seen[number] = Seen("serving", "here", Address(data, data, "key"), pids=(1, 2))
        return found

    def close(self) -> None:
        self.seen.clear()
        self.is_closed = True


class FakeFrontend:
    """Serves as soon as it is kept. It ends when it is asked to, unless `drains`; a second time in any case."""

    def __init__(self) -> None:
        self.engines: list[str] = []
        self.load = Load(0, 0, 0.0, 1)
        self.place: ServerPlace | None = None
        self.num_restarts = 0
        self.exit_code: int | None = None
        self.drains = False
        self.broken = ""
        self.num_asked_to_end = 0
        self.is_closed = False

    def keep(self, engines: Collection[Address]) -> None:
        if self.broken:
            raise EngineDeadError(self.broken)
        if self.place is None:
            self.engines = [one.data for one in engines]
            self.place = ServerPlace(("tcp://here:1",), ("tcp://here:2",), "/nowhere")

    def look(self) -> View | None:
        loads = {one: EngineLoad(3, 4, 0.25) for one in self.engines}
        return View(dict.fromkeys(self.engines, True), self.load, loads, num_held=5)

    def add(self, address: Address) -> None:
        self.engines.append(address.data)

    def remove(self, address: str, grace_s: float) -> None:
        self.engines.remove(address)

    def ask_to_end(self) -> None:
        self.num_asked_to_end += 1
        if not self.drains or self.num_asked_to_end > 1:
            self.exit_code = 0

    def close(self) -> None:
        self.is_closed = True
