"""The engines of a server, where these are servers elsewhere: their addresses, how each is, and which come and go.

Starts and ends no engine: what becomes of them the frontends say, which are connected to them. Used by the supervisor,
on its loop.
"""

from collections.abc import Callable, Sequence

from graphgen.base.addresses import check_connectable
from graphgen.ipc.errors import ConfigError
from graphgen.ipc.server_messages import (
    AddEngine,
    DrainEngine,
    EngineAway,
    EngineDrained,
    EngineServes,
    RemoveEngine,
    SupervisorToFrontend,
)
from graphgen.server.operator import EngineState, Told, Wish

Tell = Callable[[SupervisorToFrontend], None]


class EnginesElsewhere:
    """By number; that of one that was removed is used again."""

    def __init__(self, addresses: Sequence[str], tell: Tell, say: Callable[[str], None]) -> None:
        """tell: the frontends. say: to the operator."""
        self._addresses = list(addresses)
        self._states: list[EngineState] = ["serving"] * len(addresses)  # from when the server listens
        self._reasons = [""] * len(addresses)
        self._leaving: set[int] = set()  # engines that are removed when they have drained
        self._graces_s: dict[int, float] = {}  # that engines which drain were given
        self._new: set[int] = set()  # engines that were added, and have not served yet
        self._tell = tell
        self._say = say

    def addresses(self) -> tuple[tuple[int, str], ...]:
        """Those that a frontend which is started now is to be connected to."""
        return tuple(
            (number, address)
            for number, address in enumerate(self._addresses)
            if self._states[number] not in ("drained", "removed")
        )

    def take(self, message: EngineServes | EngineAway | EngineDrained) -> None:
        """What a frontend says of one of them."""
        number = message.engine
        if number >= len(self._states) or self._states[number] == "removed":
            return
        match message:
            case EngineServes() if self._states[number] in ("serving", "draining"):
                pass  # a frontend that was started again says it of all
            case EngineServes():
                self._new.discard(number)
                self._set(number, "serving", f"{self._name(number)} serves")
            case EngineAway() if message.is_refused and number in self._new:
                self._remove(number, message.reason)
            case EngineAway():
                if self._states[number] in ("serving", "starting"):
                    self._set(number, "away", f"{self._name(number)} is away: {message.reason}")
                self._reasons[number] = message.reason
            case EngineDrained(error=""):
                self._set(number, "drained", f"{self._name(number)} has drained")
                if number in self._leaving:
                    self._remove(number)
            case EngineDrained():
                self._leaving.discard(number)
                self._set(number, "serving", f"{self._name(number)} does not drain: {message.error}")
                self._reasons[number] = message.error

    def begin_again(self) -> None:
        """A frontend listens that was started again: it knows of no drain."""
        for number, state in enumerate(self._states):
            if state == "draining":
                self._tell(DrainEngine(number, self._graces_s[number]))

    def fulfil(self, wish: Wish) -> Told:
        """What an operator asks for."""
        try:
            number = self._number_of(wish)
            match wish.action:
                case "add":
                    number = self._add(wish.address)
                case "resume":
                    self._resume(number)
                case "drain":
                    self._drain(number, wish.grace_s)
                case "remove":
                    self._leave(number, wish.grace_s)
        except ConfigError as error:
            return self._told(0, str(error))
        return self._told(number)

    def _told(self, number: int, error: str = "") -> Told:
        return Told(tuple(self._states), error, tuple(self._addresses), tuple(self._reasons), number)

    def _number_of(self, wish: Wish) -> int:
        """Raises ConfigError."""
        if wish.action in ("show", "add"):
            return wish.engine
        known = [(one, address) for one, address in enumerate(self._addresses) if self._states[one] != "removed"]
        number = wish.engine
        if wish.address:
            number = next((one for one, address in known if address == wish.address), -1)
        if not any(one == number for one, _ in known):
            listed = ", ".join(f"{one} {address}" for one, address in known)
            raise ConfigError(f"there is no engine {wish.address or wish.engine}: they are {listed}")
        return number

    def _add(self, address: str) -> int:
        check_connectable(address)
        if any(one == address and state != "removed" for one, state in zip(self._addresses, self._states, strict=True)):
            raise ConfigError(f"{address} is one of the engines already: name another")
        free = (number for number, state in enumerate(self._states) if state == "removed")
        number = next(free, len(self._states))
        if number == len(self._states):
            self._addresses.append(address)
            self._states.append("starting")
            self._reasons.append("")
        self._addresses[number] = address
        self._new.add(number)
        self._begin(number)
        return number

    def _begin(self, number: int) -> None:
        self._set(number, "starting", f"{self._name(number)} is being connected to")
        self._tell(AddEngine(number, self._addresses[number]))

    def _resume(self, number: int) -> None:
        if self._states[number] != "drained":
            raise ConfigError(f"{self._name(number)} is {self._states[number]}: it needs no resume")
        self._begin(number)

    def _drain(self, number: int, grace_s: float) -> None:
        if self._states[number] != "serving":
            raise ConfigError(f"{self._name(number)} is {self._states[number]}: only one that serves can drain")
        if self._states.count("serving") < 2:
            raise ConfigError(f"{self._name(number)} is the only one that serves: let another one serve first")
        name = self._name(number)
        self._set(number, "draining", f"{name} drains; what is open there after {grace_s:g} s goes on elsewhere")
        self._graces_s[number] = grace_s
        self._tell(DrainEngine(number, grace_s))

    def _leave(self, number: int, grace_s: float) -> None:
        if self._states[number] == "serving":
            self._drain(number, grace_s)
        if self._states[number] == "draining":
            self._leaving.add(number)
        else:
            self._remove(number)

    def _remove(self, number: int, reason: str = "") -> None:
        self._leaving.discard(number)
        self._new.discard(number)
        self._set(number, "removed", f"{self._name(number)} is removed" + (f": {reason}" if reason else ""))
        self._reasons[number] = reason
        self._tell(RemoveEngine(number))

    def _set(self, number: int, state: EngineState, said: str) -> None:
        self._states[number] = state
        self._reasons[number] = ""
        self._say(said)

    def _name(self, number: int) -> str:
        return f"engine {number} ({self._addresses[number]})"
