"""The mock server's one loop.

Owns sessions, open requests and when each goes on. Takes its answers from a script; has no engine, and one thread.
Called by the command line and by tests.
"""

import heapq
import itertools
import secrets
import time
from collections.abc import Iterator
from typing import NamedTuple

from msgspec import Struct

from graphgen.ipc.ggp.framing import (
    CHOSEN_ID,
    FrameError,
    is_made_by_socket,
    make_error,
    server_framing,
    unsupported_version,
)
from graphgen.ipc.ggp.messages import (
    MAJOR,
    NAMES,
    Bye,
    Cancel,
    ClientMessage,
    Delta,
    Draining,
    Error,
    Generate,
    Health,
    HealthRequest,
    Hello,
    Ping,
    Pong,
    ServerLimits,
    ServerMessage,
    Stats,
    StatsRequest,
    Welcome,
)
from graphgen.mock_server.checks import EOS_ID, VOCAB_SIZE, Refusal, prompt_ids, prompt_text
from graphgen.mock_server.playing import Move, Pause, Playing
from graphgen.mock_server.script import Drain, Raw, Restart, Script, Silence
from graphgen.mock_server.sockets import Keys, Sockets

LONGEST_POLL_S = 0.1
"""A signal is seen after so long at the latest."""


class _Open(NamedTuple):
    """An open request and where its answer stands."""

    playing: Playing
    moves: Iterator[Move]


class _Session(Struct):
    """One data connection that said hello."""

    peer: bytes
    name: str
    open: dict[int, _Open]


class MockServer:
    """Serves a script until `stop` or the end of a drain."""

    def __init__(self, script: Script, bind: str, control: str, keys: Keys | None = None) -> None:
        self._script = script
        self._framing = server_framing()
        self._sockets = Sockets(bind, control, keys, script.frame_bytes)
        self._instance = secrets.token_hex(4)
        self._sessions: dict[bytes, _Session] = {}
        self._due: list[tuple[float, int, _Session, int, _Open]] = []
        self._order = itertools.count()
        self._draining = False
        self._drain_ends_s: float | None = None
        self._stopped = False
        self._finished = self._refused = self._deltas = 0
        self._next_ping_s = time.monotonic()

    @property
    def address(self) -> str:
        return self._sockets.address

    @property
    def control_address(self) -> str:
        return self._sockets.control_address

    # --- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until `stop`, or until a drain has nothing left to do."""
        while not self._stopped and not self._drained():
            self._read(control=True)
            self._read(control=False)
            self._play()
            self._ping()
            self._sockets.wait(self._wait_s())
        self._end()

    def stop(self) -> None:
        """At once; may be called by another thread or a signal handler."""
        self._stopped = True

    def drain(self, grace_s: float) -> None:
        """Finish what is open and end. A second call ends at once. May be called by a signal handler."""
        if self._drain_ends_s is not None:
            self._stopped = True
        self._drain_ends_s = time.monotonic() + grace_s

    def _drained(self) -> bool:
        if self._drain_ends_s is None:
            return False
        if not self._draining:
            self._announce_drain(self._grace_left_ms())
        return self._num_open() == 0 or time.monotonic() > self._drain_ends_s

    def _grace_left_ms(self) -> int:
        return 0 if self._drain_ends_s is None else max(0, int((self._drain_ends_s - time.monotonic()) * 1000))

    def _end(self) -> None:
        for session in list(self._sessions.values()):  # one that is gone is forgotten on the way
            for request_id in list(session.open):
                self._send(session.peer, make_error("draining", "the server ended", request_id, "generate"))
        self._sockets.close()

    def _wait_s(self) -> float:
        now_s = time.monotonic()
        times = [now_s + LONGEST_POLL_S, self._next_ping_s]
        if self._due:
            times.append(self._due[0][0])
        return min(times) - now_s

    def _read(self, control: bool) -> None:
        """All that is there. Messages of one peer keep their order."""
        for peer, frames in self._sockets.read(control):
            try:
                message = self._framing.decode(frames)
                if not is_made_by_socket(peer):
                    raise Refusal(make_error("bad_request", CHOSEN_ID, about=NAMES[type(message)]))
                if control:
                    self._answer_control(peer, message)
                else:
                    self._answer(peer, message)
            except (FrameError, Refusal) as refusal:
                self._refuse(peer, refusal.error, control)

    # --- messages ----------------------------------------------------------------------------------------------

    def _answer(self, peer: bytes, message: ClientMessage) -> None:
        session = self._sessions.get(peer)
        if isinstance(message, Hello):
            self._welcome(peer, message)
        elif session is None:
            request_id = message.id if isinstance(message, Generate) else None
            raise Refusal(make_error("no_session", "the connection has no session: say hello", request_id))
        elif isinstance(message, Generate):
            self._generate(session, message)
        elif isinstance(message, Cancel):
            self._cancel(session, message.id)
        elif isinstance(message, Bye):
            self._forget(session)
        else:
            self._answer_either(peer, message, control=False)

    def _answer_control(self, peer: bytes, message: ClientMessage) -> None:
        if isinstance(message, Cancel):
            for session in self._sessions.values():
                if session.name == message.session:
                    self._cancel(session, message.id)
        elif isinstance(message, Hello | Generate | Bye):
            raise Refusal(make_error("bad_request", "the control socket has no sessions: use the data socket"))
        else:
            self._answer_either(peer, message, control=True)

    def _answer_either(self, peer: bytes, message: ClientMessage, control: bool) -> None:
        match message:
            case Ping():
                self._send(peer, Pong(t=message.t, instance=self._instance), control)
            case StatsRequest():
                self._send(peer, self._stats(), control)
            case HealthRequest():
                status = "draining" if self._draining else "ok"
                self._send(peer, Health(status=status, ready=not self._draining, worker_ms=0.0), control)
            case _:  # a pong says that the client lives, which nothing here depends on
                pass

    def _welcome(self, peer: bytes, hello: Hello) -> None:
        lowest, highest = hello.versions
        if not lowest <= MAJOR <= highest:
            raise Refusal(unsupported_version(f"the client speaks {lowest} to {highest}", about="hello"))
        if peer in self._sessions:
            self._forget(self._sessions[peer])
        session = self._sessions[peer] = _Session(peer, secrets.token_hex(8), {})
        self._send(peer, self._welcome_for(session))
        if self._draining:
            self._send(peer, Draining(grace_ms=self._grace_left_ms()))

    def _welcome_for(self, session: _Session) -> Welcome:
        script = self._script
        return Welcome(
            version=MAJOR,
            session=session.name,
            instance=self._instance,
            server="graphgen mock-server",
            model=script.model,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=[EOS_ID],
            features=list(script.features),
            limits=ServerLimits(
                frame_bytes=script.frame_bytes,
                prompt_tokens=script.prompt_tokens,
                text_bytes=script.text_bytes,
                open_requests=script.open_requests,
                open_prompt_tokens=script.prompt_tokens * script.open_requests,
            ),
            heartbeat_ms=script.heartbeat_ms,
            slow_consumer_ms=60_000,
            control=self.control_address,
            draining=self._draining,
        )

    def _generate(self, session: _Session, request: Generate) -> None:
        if request.id in session.open:
            raise Refusal(make_error("duplicate_id", f"request {request.id} is open: choose another id"))
        if self._draining:
            raise Refusal(make_error("draining", "the server is about to end", request.id, "generate"))
        if len(session.open) >= self._script.open_requests:
            message = f"{len(session.open)} requests are open, the limit is that: wait for one to end"
            raise Refusal(make_error("overloaded", message, request.id, "generate", retry_after_ms=100))
        ids = prompt_ids(request, self._welcome_for(session))
        prompt = prompt_text(request, ids)
        playing = Playing(request, prompt, ids, lambda message: self._send(session.peer, message))
        opened = _Open(playing, playing.moves(self._script.steps_for(prompt)))
        session.open[request.id] = opened
        self._go_on(
            session, request.id, opened
        )  # to its first pause: `accepted` is out before the next message is read

    def _cancel(self, session: _Session, request_id: int) -> None:
        opened = session.open.pop(request_id, None)
        if opened is not None:
            opened.playing.finish("aborted")
            self._finished += 1

    def _forget(self, session: _Session) -> None:
        session.open.clear()
        self._sessions.pop(session.peer, None)

    # --- playing -----------------------------------------------------------------------------------------------

    def _play(self) -> None:
        """Every request whose pause is over goes on to its next one."""
        now_s = time.monotonic()
        while self._due and self._due[0][0] <= now_s:
            _, _, session, request_id, opened = heapq.heappop(self._due)
            self._go_on(session, request_id, opened)

    def _go_on(self, session: _Session, request_id: int, opened: _Open) -> None:
        """Plays one request up to its next pause, unless it was cancelled or its session ended."""
        while session.open.get(request_id) is opened:
            match next(opened.moves, None):
                case None:
                    session.open.pop(request_id, None)
                    self._finished += 1
                case Pause(seconds):
                    due_s = time.monotonic() + seconds
                    heapq.heappush(self._due, (due_s, next(self._order), session, request_id, opened))
                    return
                case Silence(ms):
                    time.sleep(ms / 1000)
                case Raw(frames):
                    self._send_frames(session.peer, [bytes.fromhex(frame) for frame in frames])
                case Restart():
                    self._restart()
                case Drain(grace_ms):
                    self._announce_drain(grace_ms)

    def _restart(self) -> None:
        for session in list(self._sessions.values()):
            self._forget(session)
        self._due.clear()
        self._draining = False
        self._sockets.bind_anew()
        self._instance = secrets.token_hex(4)

    def _announce_drain(self, grace_ms: int) -> None:
        self._draining = True
        for session in list(self._sessions.values()):
            self._send(session.peer, Draining(grace_ms=grace_ms))

    def _ping(self) -> None:
        now_s = time.monotonic()
        if now_s < self._next_ping_s:
            return
        self._next_ping_s = now_s + self._script.heartbeat_ms / 1000
        for session in list(self._sessions.values()):
            if session.open:
                self._send(session.peer, Ping(instance=self._instance))

    # --- sending -----------------------------------------------------------------------------------------------

    def _refuse(self, peer: bytes, error: Error, control: bool) -> None:
        self._refused += 1
        session = self._sessions.get(peer)
        if error.code != "no_session" and session is not None and error.id in session.open:
            # The error is about a second request with the id of an open one, and must not end the first.
            error = make_error("duplicate_id", error.message, about=error.about)
        self._send(peer, error, control)

    def _send(self, peer: bytes, message: ServerMessage, control: bool = False) -> None:
        self._deltas += isinstance(message, Delta)
        self._send_frames(peer, list(self._framing.encode(message)), control)

    def _send_frames(self, peer: bytes, frames: list[bytes], control: bool = False) -> None:
        arrived = self._sockets.send(peer, frames, control)
        if not arrived and not control and peer in self._sessions:
            self._forget(self._sessions[peer])

    def _num_open(self) -> int:
        return sum(len(session.open) for session in self._sessions.values())

    def _stats(self) -> Stats:
        """Of what a mock has; the rest is 0."""
        return Stats(
            sessions=len(self._sessions),
            open_requests=self._num_open(),
            held_requests=0,
            running=self._num_open(),
            waiting=0,
            pages_free=0,
            pages_total=0,
            steps=0,
            finished=self._finished,
            preemptions=0,
            step_ms_p50=0.0,
            step_ms_p95=0.0,
            step_ms_p99=0.0,
            step_ms_max=0.0,
            deltas_sent=self._deltas,
            deltas_merged=0,
            messages_refused=self._refused,
            frontend_cpu_s=time.process_time(),
            frontend_rss_bytes=0,
        )
