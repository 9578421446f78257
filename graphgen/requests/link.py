"""The engine's side of the channel to the scheduler: what is sent to it, and one thread that receives.

Owns the sockets, the thread and the moment the engine is declared dead; `graphgen.requests.request_table` has the open
requests, `graphgen.requests.questions` what was asked and is not answered. Knows nothing of prompts or models. Made by
`graphgen.router.links`; any thread may call it.

Nothing here may hang a caller: whatever goes wrong in the thread becomes an exception for every open request and for
every later call.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

import zmq

from graphgen.base.owner import Owner
from graphgen.ipc.channel import Channel
from graphgen.ipc.engine_messages import (
    Attach,
    Blamed,
    Cancel,
    EngineStats,
    EngineToScheduler,
    Notice,
    Outputs,
    Ready,
    Rejected,
    ReportRequest,
    SchedulerToEngine,
    StatsRequest,
)
from graphgen.ipc.errors import EngineClosedError, EngineDeadError, GraphgenError
from graphgen.ipc.reports import EngineReport
from graphgen.ipc.senders import engine_channel
from graphgen.ipc.worker_messages import Failed, Probe, Progress, Shutdown
from graphgen.requests.failures import error_of, refusal_of
from graphgen.requests.link_ends import Nobody, Observer, Processes
from graphgen.requests.open_request import OpenRequest
from graphgen.requests.questions import Questions, fail_all
from graphgen.requests.request_table import RequestTable, deliver

logger = logging.getLogger("graphgen")

WATCH_S = 0.1
"""How often the thread looks whether the engine's processes live."""
FAILED_WAIT_S = 0.3
"""A process that ends on an error says so first; its message gets so long to arrive through the scheduler."""
LAST_WORDS_S = 0.005
"""What a dead engine had sent arrives within this."""
CLOSE_GRACE_S = 2.0


class Link:
    """Sends requests to the scheduler and delivers what comes back, until closed or until a process ends.

    `attaches`: the engine is another's, which this link joins in the place of one that is gone, and leaves running.
    `is_kept`: whoever made the engine watches it once it has served, and starts another in its place when it ends.
    """

    def __init__(
        self,
        processes: Processes,
        on_progress: Callable[[Progress], None] | None = None,
        attaches: bool = False,
        after_outputs: Callable[[], None] | None = None,
        on_notice: Callable[[Notice], None] | None = None,
        is_kept: bool = False,
        observer: Observer | None = None,
        lock: "threading.RLock | None" = None,
    ) -> None:
        """after_outputs: called on the receiving thread when the outputs of a step have reached their sinks.

        on_notice: gets what an operator should know, until `when_noticed` names another; None: it is logged. lock: of
        several links whose requests may change from one to another; reentrant.
        """
        self._owner = Owner("the engine")
        self._processes = processes
        self._on_progress = on_progress
        # Guards the table, the questions and the fault. Reentrant: the collector may drop a stream, which cancels
        # its request, in the middle of anything.
        self._lock = threading.RLock() if lock is None else lock
        self._observer: Observer = Nobody() if observer is None else observer
        self._table = RequestTable(self._lock, self._observer, self._send_cancel)
        self._questions = Questions(self._lock)
        self._attaches = attaches
        self._is_kept = is_kept or attaches
        self._gives_back = is_kept  # what is open when its engine ends is asked for, and goes on elsewhere
        self._after_outputs = after_outputs
        self._on_notice = on_notice or _log
        self._on_ready: Callable[[Ready], None] | None = None
        self._ready: Future[Ready] = Future()
        self._serves = False
        self._awaits_another = False  # the engine ended, and one is being started in its place
        self._jobs: deque[Callable[[], None]] = deque()  # for the thread, between two messages
        self._fault: GraphgenError | None = None
        self._stopping = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._channel: Channel[EngineToScheduler, SchedulerToEngine] = Channel(
            self._context, processes.folder, engine_channel(processes.sender), "upper", SchedulerToEngine
        )
        if attaches:
            self._channel.send(Attach())
        self._thread = threading.Thread(target=self._run, name="graphgen-link", daemon=True)
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> Ready:
        """Raises what stopped the start, or EngineDeadError after `timeout_s`, at once if that is not above 0."""
        try:
            if timeout_s <= 0:  # also where it is ready by now: it was not in time
                raise FutureTimeoutError
            return self._ready.result(timeout_s)
        except FutureTimeoutError:
            tails = "\n".join(f"[{name}]\n{self._processes.log_tail(name)}" for name in self._processes.pids)
            raise EngineDeadError(
                f"the engine was not ready after {timeout_s:g} s: raise start_timeout_s, or see what its processes"
                f" wrote:\n{tails}"
            ) from None

    def check_process(self) -> None:
        """Raises EngineDeadError in a fork of the program: its receiving thread is the parent's."""
        self._owner.check()

    def submit(self, requests: Iterable[OpenRequest]) -> None:
        """Opens the requests; from now on their sinks are called. Raises when the engine is closed or dead."""
        self.check_process()
        opened = list(requests)
        with self._lock:
            self._raise_fault()
            for request in opened:
                self._table.open(request)
                self._channel.send(request.submit)

    def cancel(self, request_ids: Iterable[int]) -> None:
        """Ends requests without a word to their sinks. Ids that are not open any more are ignored. Does nothing in a
        fork: the requests are its parent's."""
        if not self._owner.is_this:
            return
        with self._lock:
            for request_id in request_ids:
                self._table.cancel(request_id)

    def stats(self, timeout_s: float) -> EngineStats:
        """A snapshot. Raises EngineDeadError when the scheduler does not answer in time."""
        try:
            return self.ask_stats().result(timeout_s)
        except FutureTimeoutError:
            raise EngineDeadError(f"the scheduler did not answer for {timeout_s:g} s: close the engine") from None

    def ask_stats(self, steps: bool = False) -> "Future[EngineStats]":
        """Asks for a snapshot and does not wait for it. steps: with those since the last such question."""
        self.check_process()
        with self._lock:
            self._raise_fault()
            answer = self._questions.add_stats()
            self._channel.send(StatsRequest(steps))
        return answer

    def ask_probe(self) -> "Future[None]":
        """Is done when scheduler, worker and device have answered, behind the steps in flight."""
        self.check_process()
        with self._lock:
            self._raise_fault()
            probe, answer = self._questions.add_probe()
            self._channel.send(probe)
        return answer

    def ask_report(self) -> None:
        """Asks how much there is to do and how fast it is done; the observer gets the answer."""
        with self._lock:
            if self._fault is None and self._serves:
                self._channel.send(ReportRequest())

    def when_ready(self, call: Callable[[Ready], None]) -> None:
        """From now on `call` is made, on the receiving thread, each time that an engine begins to serve."""
        self._on_ready = call

    def when_noticed(self, call: Callable[[Notice], None]) -> None:
        """From now on `call` gets what an operator should know, on the receiving thread."""
        self._on_notice = call

    def await_another_engine(self) -> list[OpenRequest]:
        """The engine of a link that is kept has ended, and another is started in its place: from the Ready of that one
        on it serves. What was asked of the old one is forgotten: returns the requests that were open."""
        error = EngineDeadError("the engine ended, and another is started in its place: try again")
        with self._lock:
            self._serves, self._awaits_another = False, True
            requests, unanswered = self._table.take_all(), self._questions.take_all()
            self._channel.send(Attach())  # whatever still waits to be sent to the old one is void for the new one
        fail_all(unanswered, error)
        return requests

    def lose(self, take: Callable[[list[OpenRequest]], None]) -> None:
        """The same, once what the engine had sent is delivered: within `WATCH_S` `take` is called, on the receiving
        thread, with the requests that were open."""

        def give_back() -> None:
            while (message := self._channel.receive(LAST_WORDS_S)) is not None:
                self._handle(message)
            take(self.await_another_engine())

        self._jobs.append(give_back)

    def release(self, request_ids: Collection[int], take: Callable[[list[OpenRequest]], None]) -> None:
        """These requests are to go on at another engine: this one, which lives, is told to end them, and `take` is
        called with those that are open, as by `lose`. Nothing more is heard of them from here."""

        self._jobs.append(lambda: take(self._table.release(request_ids)))

    def expect(self) -> None:
        """The engine is started again by who keeps it, and says so itself."""

    def open_requests(self) -> list[OpenRequest]:
        """Those of this moment."""
        return self._table.snapshot()

    def begin_close(self) -> None:
        """Tells the scheduler to end, and open requests that they get EngineClosedError. Idempotent."""
        self._fail(EngineClosedError("the engine was closed: make a new Engine"))

    def close(self) -> None:
        """Ends the processes, then the thread. Open requests get EngineClosedError. Idempotent."""
        if not self._owner.is_this:
            return  # the engine is the parent's
        self.begin_close()
        # Before the engine serves nobody may be listening, and nothing is lost by a signal.
        self._processes.stop(CLOSE_GRACE_S if self._serves else 0.0)
        self._stopping.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _send_cancel(self, request_id: int) -> None:
        if self._fault is None:
            self._channel.send(Cancel(request_id))

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise type(self._fault)(*self._fault.args)

    def _run(self) -> None:
        """The thread. It owns the receiving socket and closes the channel last."""
        try:
            watched_s = time.monotonic()
            while not self._stopping.is_set():
                message = self._channel.receive(WATCH_S)
                if message is not None:
                    self._handle(message)
                while self._jobs:
                    self._jobs.popleft()()
                if time.monotonic() - watched_s >= WATCH_S:
                    self._watch()
                    watched_s = time.monotonic()
        except GraphgenError as error:
            self._die(error)
        except Exception as error:
            logger.exception("graphgen's receiving thread failed")
            self._die(EngineDeadError(f"the receiving thread failed with {type(error).__name__}: {error}"))
        finally:
            self._channel.close(linger_s=0.0)
            self._context.term()

    def _handle(self, message: SchedulerToEngine) -> None:
        joins = self._attaches or self._awaits_another
        if joins and not self._serves and not isinstance(message, (Ready, Progress, Failed)):
            return  # meant for the one before
        match message:
            case Outputs():
                self._table.deliver_outputs(message)
                if self._after_outputs is not None:
                    self._after_outputs()
            case Rejected():
                self._table.refuse(message.request_id, refusal_of(message))
            case Blamed():
                self._table.hear_deaths(message)
            case EngineStats():
                self._questions.take_stats(message)
            case EngineReport():
                self._observer.reported(message)
            case Probe():
                self._questions.take_probe(message)
            case Progress():
                if self._on_progress is not None:
                    self._on_progress(message)
            case Notice():
                self._on_notice(message)
            case Ready():
                self._serves, self._awaits_another = True, False
                if not self._ready.done():  # an attached link hears it twice when it came before the worker
                    self._ready.set_result(message)
                if self._on_ready is not None:
                    self._on_ready(message)
            case Failed():
                if not (self._is_kept and self._ready.done()):
                    raise error_of(message)
                self._hear_last_words(error_of(message))

    def _hear_last_words(self, error: GraphgenError) -> None:
        """Of an engine whose master sees it end, and starts another."""
        logger.error("the engine ends: %s", error)
        if not self._gives_back:
            for request in self.await_another_engine():
                deliver(request.sink, type(error)(*error.args))

    def _watch(self) -> None:
        """Raises EngineDeadError when a process has ended that should not have."""
        if self._fault is not None or (self._is_kept and self._ready.done()):
            return  # whoever keeps the engine watches it
        if (found := self._processes.find_exit()) is None:
            return
        # The one that ended first may have told why, and another may follow it: wait for the better word.
        deadline = time.monotonic() + FAILED_WAIT_S
        while (left_s := deadline - time.monotonic()) > 0:
            message = self._channel.receive(left_s)
            if message is not None:
                self._handle(message)
        raise EngineDeadError(f"{found}\nMake a new Engine; requests that were open are lost")

    def _die(self, error: GraphgenError) -> None:
        """Tells everyone, then ends what is left of the processes."""
        if self._fault is None and isinstance(error, EngineDeadError):  # other errors say all that a user can use
            for name in self._processes.pids:
                if tail := self._processes.log_tail(name, num_lines=100):
                    logger.error("output of the %s process:\n%s", name, tail)
        self._fail(error)
        self._processes.stop(grace_s=0.2)

    def _fail(self, error: GraphgenError) -> None:
        """From now on every call raises `error`; the first fault stays."""
        with self._lock:
            if self._fault is not None:
                return
            self._fault = error
            requests, unanswered = self._table.take_all(), self._questions.take_all()
            if not self._attaches:
                self._channel.send(Shutdown())
        for request in requests:
            deliver(request.sink, type(error)(*error.args))
        fail_all((self._ready, *unanswered), error)


def _log(notice: Notice) -> None:
    logger.warning("%s", notice.text)
