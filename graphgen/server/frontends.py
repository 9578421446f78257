"""The frontends of a server: processes with public sockets, each at addresses of its own, which share the engines.

Owns their channels to the supervisor, their starts, and what each has said of itself; decides nothing. Used by the
supervisor, on its loop.

What all of them say of the engines is heard from one, the speaker: the first that listens.
"""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec
import zmq

from graphgen.ipc.channel import Channel
from graphgen.ipc.engine_messages import SenderEnded
from graphgen.ipc.senders import engine_channel, first_request_id
from graphgen.ipc.server_messages import Drained, FrontendToSupervisor, Listening, SupervisorToFrontend
from graphgen.ipc.worker_messages import Failed
from graphgen.launch.processes import EngineProcesses, Exit
from graphgen.server.frontend.settings import FrontendSettings, frontend_name, settings_file
from graphgen.server.kept import Kept
from graphgen.server.options import ServeOptions

MODULE = "graphgen.server.frontend"
LAST_WORD_S = 1.0
"""How much later the last message of a process may be than the system's word that it has ended."""

FrontendChannel = Channel[SupervisorToFrontend, FrontendToSupervisor]


class Frontend:
    """One of them, whichever process it is by now."""

    def __init__(self, name: str, channel: FrontendChannel, kept: Kept, data: str, control: str) -> None:
        self.name = name  # for people
        self.channel = channel
        self.kept = kept
        self.data = data
        self.control = control
        self.lives = False
        self.has_failed = False  # in this life, by its own word
        self.listens = False
        self.has_listened = False  # in this life or an earlier one
        self.num_lost: int | None = None  # requests, once it has drained


class Frontends:
    """All of them, by number."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        options: ServeOptions,
        model_name: str,
        engines: Sequence[EngineProcesses],
        say: Callable[[str], None],
    ) -> None:
        """engines: the first one's folder is also theirs."""
        self._context = context
        self.elsewhere: Callable[[], tuple[tuple[int, str], ...]] | None = None
        """Where the engines are, if they are servers elsewhere: their numbers and addresses at this moment."""
        self._options = options
        self._model_name = model_name
        self._processes = engines[0]
        self._engines = tuple(str(one.folder) for one in engines)
        self._all: list[Frontend] = []
        for number, (data, control) in enumerate(options.addresses):
            name = f"frontend {number}" if options.frontends > 1 else "frontend"
            folder = self._processes.folder
            channel: FrontendChannel = Channel(context, folder, frontend_name(number), "upper", FrontendToSupervisor)
            kept = Kept(name, "its clients have lost their sessions", say)
            self._all.append(Frontend(name, channel, kept, data, control))
        self._undertakers: dict[str, zmq.Socket[bytes]] = {}  # by the channel whose sender has ended
        self._poller = zmq.Poller()
        for one in self._all:
            self._poller.register(one.channel.receiver, zmq.POLLIN)

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Frontend]:
        return iter(self._all)

    def __getitem__(self, number: int) -> Frontend:
        return self._all[number]

    def start(self) -> None:
        """All of them. They bind their sockets at once, so that an address in use is found soon."""
        for number, one in enumerate(self._all):
            one.kept.start(partial(self._start_one, number))

    def close(self) -> None:
        for one in self._all:
            one.channel.close()
        for socket in self._undertakers.values():
            socket.close(linger=0)

    # --- messages ----------------------------------------------------------------------------------------------------

    def receive(self, timeout_s: float) -> list[tuple[int, FrontendToSupervisor]]:
        """A message of each that has said something, and who said it; nothing after `timeout_s`."""
        readable = dict(self._poller.poll(int(timeout_s * 1000)))
        found = ((number, one.channel) for number, one in enumerate(self._all) if one.channel.receiver in readable)
        return [(number, message) for number, channel in found if (message := channel.receive(0.0)) is not None]

    def last_words(self, number: int, found: Exit) -> list[FrontendToSupervisor]:
        """What one that has ended had said and nobody has taken. One that was not killed says last whether it drained
        or failed; the thread that reads its socket may be later than the system's word that it has ended."""
        one = self._all[number]
        words = list(one.channel.drain())
        has_said_all = found.code < 0 or not one.lives or one.has_failed
        deadline_s = time.monotonic() + (0.0 if has_said_all else LAST_WORD_S)
        while not any(isinstance(word, Drained | Failed) for word in words):
            word = one.channel.receive(max(0.0, deadline_s - time.monotonic()))
            if word is None:
                break
            words.append(word)
        return words

    def tell(self, message: SupervisorToFrontend) -> None:
        """To all of them; one that is being started hears it later."""
        for one in self._all:
            one.channel.send(message)

    @property
    def speaker(self) -> int:
        """From whom is heard what all of them say."""
        return next((number for number, one in enumerate(self._all) if one.listens), 0)

    # --- lives -------------------------------------------------------------------------------------------------------

    def listen(self, number: int, where: Listening) -> bool:
        """One listens. Whether it is not the first time: then it has the addresses that it had before."""
        one = self._all[number]
        one.data, one.control = where.data, where.control
        one.listens = True
        again, one.has_listened = one.has_listened, True
        return again

    @property
    def have_listened(self) -> bool:
        """Whether all of them have, so that the server has been ready."""
        return all(one.has_listened for one in self._all)

    @property
    def num_lost(self) -> int | None:
        """Requests that were lost, once all have drained."""
        lost = [one.num_lost for one in self._all if one.num_lost is not None]
        return sum(lost) if len(lost) == len(self._all) else None

    def find_exits(self) -> list[tuple[int, Exit]]:
        """Those that have ended and had not drained."""
        found = (
            (number, self._processes.find_exit((frontend_name(number),)))
            for number, one in enumerate(self._all)
            if one.num_lost is None
        )
        return [(number, ended) for number, ended in found if ended is not None]

    def restore(self, number: int, found: Exit) -> None:
        """One has ended, and is started again; its requests end at once. Called for as long as it has."""
        if self._all[number].lives:
            self._all[number].lives = self._all[number].listens = False
            self._end_requests(number)
        self._all[number].kept.restore(found, partial(self._start_one, number))

    def kill_undrained(self) -> list[str]:
        """Kills those that have not said that they drained: their names. What was open in them is lost."""
        left = [number for number, one in enumerate(self._all) if one.num_lost is None]
        self._processes.finish([frontend_name(number) for number in left], signal.SIGKILL, 0.0)
        for number in left:
            self._all[number].num_lost = 1
        return [self._all[number].name for number in left]

    def _end_requests(self, number: int) -> None:
        """Of a frontend that has ended, at all engines. What its successor sends has later ids. Those elsewhere see by
        themselves that its connections have closed."""
        if self.elsewhere is not None:
            return
        below = first_request_id(number, len(self._all), time.monotonic())
        message = msgspec.msgpack.encode(SenderEnded(below))
        for folder in self._engines:
            name = f"{folder}/{engine_channel(number)}.down"
            socket = self._undertakers.get(name)
            if socket is None:
                socket = self._undertakers[name] = self._context.socket(zmq.PUSH)
                socket.set_hwm(0)
                socket.connect(f"ipc://{name}")
            socket.send(message)

    def _start_one(self, number: int) -> None:
        one, folder, options = self._all[number], self._processes.folder, self._options
        keys = options.key_folder
        FrontendSettings(
            num_frontends=len(self._all),
            frontends=tuple(every.data for every in self._all) if len(self._all) > 1 else (),
            engines=self._engines if len(self._engines) > 1 else (),
            elsewhere=None if self.elsewhere is None else self.elsewhere(),
            engine_keys=None if options.engine_keys is None else str(Path(options.engine_keys).expanduser().absolute()),
            model=self._model_name,
            data=one.data,
            control=one.control,
            keys=None if keys is None else str(keys),
            private=private_address(folder, number),
            memory_limit_bytes=options.memory_limit_mib << 20,
            slow_consumer_s=options.slow_consumer_s,
            open_requests=options.open_requests,
            awaits_all=not one.has_listened,
            log_requests=options.log_requests,
        ).write(settings_file(folder, number))
        self._processes.start(MODULE, number=number)
        one.lives, one.has_failed = True, False


def private_address(folder: Path, number: int) -> str:
    """Where a frontend listens for processes of its own server."""
    return f"ipc://{folder / f'private-{number}'}"
