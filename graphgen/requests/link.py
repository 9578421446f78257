"""The engine's side of the channel to the scheduler: one thread that receives, and the requests that are open.

Owns the sockets, the table of open requests and the moment the engine is declared dead. Knows nothing of prompts or
models. Made by `graphgen.requests.core`; any thread may call it.

Nothing here may hang a caller: whatever goes wrong in the thread becomes an exception for every open request and for
every later call.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError

import zmq

from graphgen.base.owner import Owner
from graphgen.calls.outputs import Delivery, Sink
from graphgen.ipc.channel import Channel
from graphgen.ipc.errors import EngineClosedError, EngineDeadError, GraphgenError, OverloadedError
from graphgen.ipc.messages import (
    Attach,
    Blamed,
    Cancel,
    EngineStats,
    EngineToScheduler,
    Failed,
    FinishReason,
    Notice,
    Outputs,
    Probe,
    Progress,
    Ready,
    Rejected,
    ReportRequest,
    SchedulerToEngine,
    Shutdown,
    StatsRequest,
)
from graphgen.ipc.reports import EngineReport
from graphgen.requests.failures import error_of, refusal_of
from graphgen.requests.link_ends import Nobody, Observer, Processes
from graphgen.requests.open_request import OpenRequest

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
        # Guards the table, the queue of stats and the fault. Reentrant: the collector may drop a stream, which cancels
        # its request, in the middle of anything.
        self._lock = threading.RLock() if lock is None else lock
        self._observer: Observer = Nobody() if observer is None else observer
        self._unbegun: dict[int, OpenRequest] = {}  # requests that had tokens when they came, and none from here yet
        self._requests: dict[int, OpenRequest] = {}
        self._stats: deque[Future[EngineStats]] = deque()
        self._probes: dict[int, Future[None]] = {}
        self._num_probes = 0
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
            self._context, processes.folder, "engine", "upper", SchedulerToEngine
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
                self._requests[request.submit.request_id] = request
                if request.submit.num_moves:
                    self._unbegun[request.submit.request_id] = request
                self._channel.send(request.submit)

    def cancel(self, request_ids: Iterable[int]) -> None:
        """Ends requests without a word to their sinks. Ids that are not open any more are ignored. Does nothing in a
        fork: the requests are its parent's."""
        if not self._owner.is_this:
            return
        with self._lock:
            for request_id in request_ids:
                if self._forget(request_id) is not None and self._fault is None:
                    self._channel.send(Cancel(request_id))

    def stats(self, timeout_s: float) -> EngineStats:
        """A snapshot. Raises EngineDeadError when the scheduler does not answer in time."""
        try:
            return self.ask_stats().result(timeout_s)
        except FutureTimeoutError:
            raise EngineDeadError(f"the scheduler did not answer for {timeout_s:g} s: close the engine") from None

    def ask_stats(self, steps: bool = False) -> "Future[EngineStats]":
        """Asks for a snapshot and does not wait for it. steps: with those since the last such question."""
        self.check_process()
        answer: Future[EngineStats] = Future()
        with self._lock:
            self._raise_fault()
            self._stats.append(answer)
            self._channel.send(StatsRequest(steps))
        return answer

    def ask_probe(self) -> "Future[None]":
        """Is done when scheduler, worker and device have answered, behind the steps in flight."""
        self.check_process()
        answer: Future[None] = Future()
        with self._lock:
            self._raise_fault()
            self._num_probes += 1
            self._probes[self._num_probes] = answer
            self._channel.send(Probe(self._num_probes))
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
            requests, self._requests = list(self._requests.values()), {}
            self._unbegun.clear()
            waiting, self._stats = list(self._stats), deque()
            probes, self._probes = list(self._probes.values()), {}
            self._channel.send(Attach())  # whatever still waits to be sent to the old one is void for the new one
        _set_all((*waiting, *probes), error)
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

        def give_back() -> None:
            with self._lock:
                found = [self._requests.pop(one) for one in request_ids if one in self._requests]
                for request in found:
                    self._unbegun.pop(request.submit.request_id, None)
                    self._channel.send(Cancel(request.submit.request_id))
            take(found)

        self._jobs.append(give_back)

    def open_requests(self) -> list[OpenRequest]:
        """Those of this moment."""
        with self._lock:
            return list(self._requests.values())

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
                self._deliver_outputs(message)
                if self._after_outputs is not None:
                    self._after_outputs()
            case Rejected():
                self._refuse(message.request_id, refusal_of(message))
            case Blamed():
                for request_id, num_deaths in zip(message.request_ids, message.num_deaths, strict=True):
                    if (blamed := self._requests.get(request_id)) is not None:
                        blamed.hear_deaths(num_deaths)
            case EngineStats():
                with self._lock:
                    answer = self._stats.popleft() if self._stats else None
                if answer is not None:  # else it was asked of an engine that is gone
                    answer.set_result(message)
            case EngineReport():
                self._observer.reported(message)
            case Probe():
                with self._lock:
                    probed = self._probes.pop(message.probe_id, None)
                if probed is not None:
                    probed.set_result(None)
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

    def _deliver_outputs(self, message: Outputs) -> None:
        now_s = time.monotonic()
        if self._unbegun:
            self._find_begun(message)
        for output in message.outputs:
            request = self._requests.get(output.request_id)
            if request is not None:  # else it was cancelled while its tokens were on their way
                if output.token_ids and request.awaits_first_token:
                    self._observer.began(request, output.cached_tokens)
                request.hear(output)
                if output.token_ids:  # else it brings log-probabilities of the prompt, which go with the first token
                    self._give(request, output.token_ids, output.finish_reason, now_s, output.logprobs)
        for request_id, token_id in zip(message.request_ids, message.token_ids, strict=True):
            request = self._requests.get(request_id)
            if request is not None:
                self._give(request, (token_id,), None, now_s)

    def _find_begun(self, message: Outputs) -> None:
        """Of the requests that another engine had before."""
        for request_id in (*message.request_ids, *(one.request_id for one in message.outputs)):
            request = self._unbegun.pop(request_id, None)
            if request is not None and not request.awaits_first_token:
                self._observer.began(request, 0)

    def _give(
        self,
        request: OpenRequest,
        token_ids: tuple[int, ...],
        reason: FinishReason | None,
        now_s: float,
        logprobs: bytes = b"",
    ) -> None:
        """New tokens to the sink of a request; reason: why the scheduler ended it, if it has."""
        request_id = request.submit.request_id
        try:
            delivery, ended = request.take(token_ids, reason, now_s, logprobs)
        except Exception as error:  # text of this request that cannot be made must not end the others
            logger.exception("request %s failed in decoding", request.submit.log_id or request_id)
            self.cancel([request_id])
            deliver(request.sink, GraphgenError(f"decoding failed with {type(error).__name__}: {error}"))
            return
        if ended is not None:
            if reason is None:
                self.cancel([request_id])
            else:
                self._forget(request_id)
        if delivery is not None and not deliver(request.sink, delivery):
            self.cancel([request_id])

    def _forget(self, request_id: int) -> OpenRequest | None:
        with self._lock:
            self._unbegun.pop(request_id, None)
            request = self._requests.pop(request_id, None)
        if request is not None:
            self._observer.ended(request)
        return request

    def _refuse(self, request_id: int, error: GraphgenError) -> None:
        with self._lock:
            request = self._requests.get(request_id)
            if request is None:
                return
            if isinstance(error, OverloadedError) and self._observer.refused(request, error):
                del self._requests[request_id]
                return
        self._forget(request_id)
        deliver(request.sink, error)

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
            requests, self._requests = list(self._requests.values()), {}
            waiting, self._stats = list(self._stats), deque()
            probes, self._probes = list(self._probes.values()), {}
            if not self._attaches:
                self._channel.send(Shutdown())
        for request in requests:
            deliver(request.sink, type(error)(*error.args))
        _set_all((self._ready, *waiting, *probes), error)


def _set_all(futures: "Iterable[Future[Ready] | Future[EngineStats] | Future[None]]", error: GraphgenError) -> None:
    for future in futures:
        with contextlib.suppress(InvalidStateError):  # already answered
            future.set_exception(type(error)(*error.args))


def _log(notice: Notice) -> None:
    logger.warning("%s", notice.text)


def deliver(sink: Sink, delivery: Delivery) -> bool:
    """Whether the reader still exists: an event loop may have been closed under a stream."""
    try:
        sink(delivery)
    except RuntimeError:
        return False
    return True
