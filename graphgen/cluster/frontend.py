"""The frontend of a cluster: `graphgen serve --engines` as a child, to which engines are added and taken away.

Owns its process, which is started again when it ends, and the folder of keys by which it knows the engines. What
clients send passes through it alone. Used by `graphgen.cluster.keeper`, on one thread.
"""

import contextlib
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import msgspec
import zmq.auth

from graphgen.cluster.child import ServerChild
from graphgen.cluster.roster import Address, EngineLoad, View
from graphgen.cluster.scaling import Load
from graphgen.ipc.errors import EngineDeadError, GraphgenError
from graphgen.ipc.ggp.messages import Stats
from graphgen.ipc.ggp.statistics import EngineCount
from graphgen.launch.config import EngineConfig
from graphgen.launch.starts import Backoff
from graphgen.remote.client import Client
from graphgen.server.frontends import private_address
from graphgen.server.operator import Told, Wish, ask
from graphgen.server.options import ServeOptions
from graphgen.server.supervisor import ServerPlace

OWN_KEY = "frontend"
ASK_S, ASK_AGAIN_S = 2.0, 15.0


class Frontend(Protocol):
    """What a keeper needs of it. Calls may wait for seconds where it does not answer, and raise nothing for that."""

    @property
    def place(self) -> ServerPlace | None:
        """Where it listens; None while it does not serve."""

    @property
    def num_restarts(self) -> int: ...

    def keep(self, engines: Collection[Address]) -> None:
        """Starts it with these engines where it does not run. Raises EngineDeadError if it never served."""

    def look(self) -> View | None:
        """What it says; None while it does not answer."""

    def add(self, address: Address) -> None:
        """Requests may be sent to this engine."""

    def remove(self, address: str, grace_s: float) -> None:
        """To this one no more; what is open there after the grace goes on elsewhere."""

    def ask_to_end(self) -> None:
        """Its open requests have their grace; a second call gives them nothing more."""

    @property
    def exit_code(self) -> int | None:
        """0: every request got its whole output. None while it runs."""

    def close(self) -> None:
        """Ends it at once, if it has not ended. Idempotent."""


class FrontendChild:
    """That of `graphgen serve --engines`."""

    def __init__(self, config: EngineConfig, options: ServeOptions, keys: Path) -> None:
        """keys: a folder for the keys of the engines, in which `make_key` has put the frontend's own."""
        self._config = config
        self._options = options
        self._keys = keys
        self._child: ServerChild | None = None
        self._client: Client | None = None
        self._backoff = Backoff()
        self._due_s = 0.0
        self._next_client_s = 0.0
        self._place: ServerPlace | None = None
        self._num_starts = 0
        self._num_slots: dict[str, int] = {}  # by the data addresses of all engines that it was told of

    @property
    def place(self) -> ServerPlace | None:
        return self._place

    @property
    def num_restarts(self) -> int:
        return max(0, self._num_starts - 1)

    def keep(self, engines: Collection[Address]) -> None:
        if self._child is not None and (reason := self._child.find_end()) is not None:
            self._bury(reason)
        if self._child is None and engines and time.monotonic() >= self._due_s:
            self._start(engines)
        if self._child is not None and self._place is None and (place := self._child.place()) is not None:
            self._place = place
            # One that is started in its place is found where this one was.
            self._options = msgspec.structs.replace(self._options, data=place.data[0], control=place.control[0])

    def _start(self, engines: Collection[Address]) -> None:
        self._num_starts += 1
        self._backoff.started(time.monotonic())
        for one in engines:
            self._take(one)
        options = msgspec.structs.replace(
            self._options, engines=",".join(one.data for one in engines), engine_keys=str(self._keys)
        )
        self._child = ServerChild("the cluster's frontend")
        self._child.start(self._config, options, shows=True)

    def _bury(self, reason: str) -> None:
        assert self._child is not None, "it has ended"
        has_served = self._place is not None
        self.close()
        self._place = None
        if not has_served and self._num_starts == 1:
            raise EngineDeadError(f"{reason}; what it said is above")
        self._due_s = time.monotonic() + self._backoff.ended(time.monotonic())

    def look(self) -> View | None:
        if self._place is None:
            return None
        try:
            return view_of(ask(Path(self._place.folder), Wish("show")), self._stats(), self._num_slots)
        except EngineDeadError:
            return None

    def _stats(self) -> Stats | None:
        """None while it gives none, as one does that has no engine: it has to learn of others nevertheless."""
        assert self._place is not None, "it serves"
        now_s = time.monotonic()
        if self._client is None and now_s < self._next_client_s:
            return None
        try:
            if self._client is None:
                self._next_client_s = now_s + ASK_AGAIN_S
                self._client = Client(private_address(Path(self._place.folder), 0), connect_timeout_s=ASK_S)
            return self._client.stats()
        except (GraphgenError, OSError, TimeoutError):
            self._drop_client()
            return None

    def add(self, address: Address) -> None:
        self._take(address)
        self._wish(Wish("add", address=address.data))

    def remove(self, address: str, grace_s: float) -> None:
        self._wish(Wish("remove", grace_s=grace_s, address=address))

    def _wish(self, wish: Wish) -> None:
        """What fails is wished again at the next look."""
        if self._place is not None:
            with contextlib.suppress(EngineDeadError):
                ask(Path(self._place.folder), wish)

    def _take(self, address: Address) -> None:
        """What there is to know of an engine before requests are sent to it."""
        self._num_slots[address.data] = address.num_slots
        name = address.data.partition("://")[2].replace(":", "_")
        path = self._keys / f"{name}.key"
        path.write_text(f'metadata\ncurve\n    public-key = "{address.server_key}"\n')

    def ask_to_end(self) -> None:
        if self._child is not None:
            self._child.ask_to_end()

    @property
    def exit_code(self) -> int | None:
        return 1 if self._child is None else self._child.exit_code

    def close(self) -> None:
        self._drop_client()
        if self._child is not None:
            self._child.stop(0.0)
            self._child = None

    def _drop_client(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(GraphgenError):
                client.close()


def make_key(folder: Path) -> str:
    """A new pair of the frontend's in this folder: the public key."""
    folder.mkdir(mode=0o700)
    _, secret = zmq.auth.create_certificates(folder, OWN_KEY)
    Path(secret).chmod(0o600)
    return zmq.auth.load_certificate(secret)[0].decode()


def view_of(told: Told, stats: Stats | None, num_slots: Mapping[str, int]) -> View:
    """What a frontend says of its engines, by number and by address, as one. stats: None where it gives none.
    num_slots: of each engine, by its address."""
    loads: dict[str, EngineLoad] = {}
    serves: dict[str, bool] = {}
    for number, (address, state) in enumerate(zip(told.addresses, told.engines, strict=True)):
        if state != "removed":
            serves[address] = state == "serving"
            if stats is not None and number < len(stats.engines):
                loads[address] = _load_of(stats.engines[number])
    if stats is None:
        return View(serves, None)
    serving = [loads[address] for address, does in serves.items() if does and address in loads]
    if serving:
        running, waiting = sum(one.num_running for one in serving), sum(one.num_waiting for one in serving)
        usage = sum(one.kv_usage for one in serving) / len(serving)
    else:  # of one engine the counts of the whole server are its own
        used = stats.pages_total - stats.pages_free
        running, waiting = stats.running, stats.waiting
        usage = used / stats.pages_total if stats.pages_total else 0.0
    # An operator may have added one of which nothing is known here: it is removed again.
    slots = [num_slots[address] for address, does in serves.items() if does and address in num_slots]
    load = Load(waiting + stats.held_requests, running, usage, sum(serves.values()), min(slots, default=0))
    return View(serves, load, loads, stats.held_requests)


def _load_of(engine: EngineCount) -> EngineLoad:
    used = engine.pages_total - engine.pages_free
    return EngineLoad(engine.running, engine.waiting, used / engine.pages_total if engine.pages_total else 0.0)
