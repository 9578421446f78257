"""At which engine each open request is, and where it goes on when it cannot stay there.

Owns the router and the requests that no engine has for the moment. Never starts, ends or watches an engine. Made and
called by `graphgen.router.links`; the links to the engines tell it, through a `Follower` each, what became of requests.

A request is moved on the receiving thread of the engine that it leaves, once all that this one said of it is delivered.
All links and this object share one lock, so that a request is never at two engines.
"""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from graphgen.base.page_digests import prompt_digests
from graphgen.ipc.engine_messages import Ready
from graphgen.ipc.errors import DeadlineError, EngineDeadError, GraphgenError, OverloadedError, PoisonedRequestError
from graphgen.ipc.reports import EngineReport
from graphgen.requests.link_ends import Nobody
from graphgen.requests.open_request import OpenRequest
from graphgen.requests.request_table import deliver
from graphgen.router.engine_link import EngineLink
from graphgen.router.engine_states import EngineStates
from graphgen.router.policy import Router
from graphgen.router.records import MAX_DIGESTS, Capacity, Choice, Loss, Refusal, RoutedRequest

logger = logging.getLogger("graphgen")

RETRY_S = 5.0
"""When to try again while no engine serves: about as long as a start with warm caches takes."""


class Places:
    """Of the requests of several engines. Any thread may submit, cancel and say what became of a request; what becomes
    of engines is said by who holds the lock."""

    def __init__(
        self, links: Mapping[int, EngineLink], states: EngineStates, lock: "threading.RLock", seed: int
    ) -> None:
        """links: to the engines, by number; nothing is sent to one before it serves. seed: of the router's chance."""
        self._links = links
        self._states = states
        self._lock = lock
        self._router = Router(seed=seed)
        self._at: dict[int, int] = {}  # open requests, and the number of the engine that has each
        self._lost: dict[int, OpenRequest] = {}  # open requests that no engine has for the moment
        self._joined: set[int] = set()  # engines that the router knows
        self._fault: GraphgenError | None = None

    # --- what callers ask --------------------------------------------------------------------------------------------

    def submit(self, opened: Sequence[OpenRequest]) -> None:
        """Sends each to the engine that the policy chooses. Raises with none opened."""
        routed = self._routed(opened)
        with self._lock:
            self.raise_fault()
            for place, (request, entry) in enumerate(zip(opened, routed, strict=True)):
                found = self._router.choose(entry, time.monotonic())
                if isinstance(found, Refusal):
                    self.cancel(one.submit.request_id for one in opened[:place])
                    raise _error_of(found)
                self._send(request, found)

    def cancel(self, request_ids: Iterable[int]) -> None:
        """Ends requests without a word to their sinks. Ids that are not open any more are ignored."""
        with self._lock:
            for request_id in request_ids:
                number = self._at.get(request_id)
                if number is not None:
                    self._links[number].cancel([request_id])
                if number is not None or request_id in self._lost:
                    self._end(request_id)  # also one that is on its way from one engine to another

    def raise_fault(self) -> None:
        """Raises what `fail` was given."""
        if self._fault is not None:
            raise type(self._fault)(*self._fault.args)

    def fail(self, error: GraphgenError) -> None:
        """From now on every call raises `error`; the first fault stays."""
        with self._lock:
            if self._fault is not None:
                return
            self._fault = error
            requests, self._lost = list(self._lost.values()), {}
        for request in requests:
            deliver(request.sink, type(error)(*error.args))

    # --- what links say of requests ----------------------------------------------------------------------------------

    def began(self, request: OpenRequest, cached_tokens: int) -> None:
        """Its first token at its engine has come."""
        with self._lock:
            if request.submit.request_id in self._at:
                self._router.first_token(request.submit.request_id, cached_tokens, time.monotonic())

    def refused(self, request: OpenRequest) -> bool:
        """Its engine has no room for it. Whether another one may have."""
        with self._lock:
            if request.submit.request_id not in self._at:
                return False
            choice = self._router.rejected(request.submit.request_id, time.monotonic())
            if choice is None:
                del self._at[request.submit.request_id]
                return False
            self._send(request, choice)
            return True

    def ended(self, request: OpenRequest) -> None:
        """Its engine has nothing more to say of it."""
        with self._lock:
            if request.submit.request_id in self._at:
                self._end(request.submit.request_id, request.num_tokens)

    def left(self, requests: Sequence[OpenRequest]) -> None:
        """Their engine, which lives, has ended them through no fault of theirs."""
        with self._lock:
            known = [one for one in requests if one.submit.request_id in self._at]
            self._note_tokens(known, time.monotonic())
            losses = self._router.lost([one.submit.request_id for one in known])
        self._go_on(losses, known)

    def reported(self, number: int, report: EngineReport) -> None:
        """How much an engine has to do, whoever sent it."""
        with self._lock:
            if number in self._states:
                self._router.report(_id_of(number), report, time.monotonic())

    # --- what becomes of engines -------------------------------------------------------------------------------------

    @property
    def has_engines(self) -> bool:
        """Whether any engine serves, or is to serve again."""
        return bool(self._joined)

    def knows(self, number: int) -> bool:
        """Whether an engine has served and is not given up."""
        return number in self._joined

    def join(self, number: int, ready: Ready) -> None:
        """An engine begins to serve: it may get requests."""
        now_s, engine_id = time.monotonic(), _id_of(number)
        if number in self._joined:
            self._router.renewed(engine_id, 0, now_s)
            self._router.undrain(engine_id)
        else:
            worker, times = ready.worker, ready.num_engines
            capacity = Capacity(
                ready.num_slots * times, worker.num_pages * times, worker.page_size, ready.token_budget * times
            )
            self._router.joined(engine_id, capacity, now_s)
            self._joined.add(number)
        self.find()

    def drain(self, number: int) -> None:
        """Nothing is sent there from here on."""
        with self._lock:
            if number in self._joined:
                self._router.drain(_id_of(number))

    def forget(self, number: int) -> None:
        """An engine that has nothing open is not there any more."""
        if number in self._joined:
            self._joined.discard(number)
            self._router.left(_id_of(number))

    def undrain(self, number: int) -> None:
        """It gets requests again."""
        if number in self._joined:
            self._router.undrain(_id_of(number))

    def tell_progress(self) -> None:
        """How many tokens the open requests have, to the router."""
        now_s = time.monotonic()
        for number, link in self._links.items():
            if number in self._joined:
                self._note_tokens(link.open_requests(), now_s)

    def take_back(self, number: int, requests: Sequence[OpenRequest], is_expected: bool) -> None:
        """What an engine had when it ended or was left; is_expected: another is started in its place. On the link's
        thread."""
        now_s, engine_id = time.monotonic(), _id_of(number)
        self._note_tokens([one for one in requests if one.submit.request_id in self._at], now_s)
        losses: Sequence[Loss] = ()
        if number in self._joined:
            if is_expected:
                losses = self._router.died(engine_id, now_s)
            else:
                self._joined.discard(number)
                losses = self._router.left(engine_id)
        self._go_on(losses, requests)

    def leave_silent(self, now_s: float) -> None:
        """Takes the requests from engines that live and have not gone on with them for too long."""
        losses = self._router.watch(now_s)
        for number in {int(loss.engine_id) for loss in losses}:
            gone = [loss for loss in losses if int(loss.engine_id) == number]
            ids = [loss.request_id for loss in gone]
            self._links[number].release(ids, functools.partial(self._go_on, gone))

    def find(self) -> None:
        """For the requests that no engine has, if any engine takes requests."""
        now_s = time.monotonic()
        for request_id, request in list(self._lost.items()):
            found = self._router.move(request_id, now_s)
            if isinstance(found, Refusal):
                return
            self._send(request, found)

    # --- one request -------------------------------------------------------------------------------------------------

    def _routed(self, requests: Sequence[OpenRequest]) -> list[RoutedRequest]:
        """What the router must know of them. The samples of a prompt have one chain of digests."""
        page_size = self._states.page_size
        digests: dict[tuple[int, str], tuple[bytes, ...]] = {}
        routed = []
        for request in requests:
            submit = request.submit
            key = id(submit.prompt_token_ids), submit.cache_salt
            if key not in digests:
                chain = prompt_digests(submit.prompt_token_ids, page_size, submit.cache_salt, MAX_DIGESTS)
                digests[key] = chain
            routed.append(
                RoutedRequest(
                    request_id=submit.request_id,
                    tenant=submit.tenant,
                    digests=digests[key],
                    prompt_len=request.prompt_len,
                    max_tokens=submit.max_tokens,
                    arrived_s=submit.arrived_s,
                    priority=submit.priority,
                    deadline_ms=submit.deadline_ms,
                    ttft_target_ms=submit.ttft_target_ms,
                    num_output=request.num_tokens,
                )
            )
        return routed

    def _note_tokens(self, requests: Iterable[OpenRequest], now_s: float) -> None:
        for request in requests:
            self._router.progress(request.submit.request_id, request.num_tokens, now_s)

    def _send(self, request: OpenRequest, choice: Choice) -> None:
        number, request_id = int(choice.engine_id), request.submit.request_id
        self._router.sent(choice)
        self._lost.pop(request_id, None)
        self._at[request_id] = number
        try:
            self._links[number].submit([request])
        except GraphgenError as error:
            logger.error("the link to engine %d is broken, and nothing is sent there any more: %s", number, error)
            self._leave(number)
            self._end(request_id)
            raise

    def _leave(self, number: int) -> None:
        """Nothing more is expected of an engine whose link has failed; what was open there has been told."""
        self._states.leave(number)
        self._joined.discard(number)
        for loss in self._router.left(_id_of(number)):
            if not loss.error:
                self._end(loss.request_id)

    def _end(self, request_id: int, num_output: int = 0) -> None:
        """It is open no more."""
        self._lost.pop(request_id, None)
        self._at.pop(request_id, None)
        with contextlib.suppress(KeyError):  # it has ended already
            self._router.finished(request_id, num_output)

    def _go_on(self, losses: Sequence[Loss], requests: Sequence[OpenRequest]) -> None:
        """Requests that their engine does not go on with. Those that were cancelled meanwhile are left out."""
        found = {loss.request_id: loss for loss in losses}
        failed: list[tuple[OpenRequest, GraphgenError]] = []
        with self._lock:
            for request in requests:
                request_id = request.submit.request_id
                loss = found.get(request_id)
                if self._at.pop(request_id, None) is None or loss is None:
                    continue
                if self._fault is not None:  # all ends at this moment
                    failed.append((request, type(self._fault)(*self._fault.args)))
                    continue
                if loss.error:
                    failed.append((request, PoisonedRequestError(loss.error)))
                    continue
                request.move(loss.num_losses)
                self._lost[request_id] = request
            self.find()
        for request, error in failed:
            deliver(request.sink, error)


class Reporter(Nobody):
    """Hears what the only engine has to do."""

    def __init__(self, states: EngineStates, number: int) -> None:
        self._states = states
        self._number = number

    def reported(self, report: EngineReport) -> None:
        self._states.take_report(self._number, report)


class Follower(Reporter):
    """Who follows the requests of one link beside others."""

    def __init__(self, places: Places, states: EngineStates, number: int) -> None:
        super().__init__(states, number)
        self._places = places

    def began(self, request: OpenRequest, cached_tokens: int) -> None:
        self._places.began(request, cached_tokens)

    def refused(self, request: OpenRequest, error: OverloadedError) -> bool:
        return self._places.refused(request)

    def ended(self, request: OpenRequest) -> None:
        self._places.ended(request)

    def left(self, requests: Sequence[OpenRequest]) -> None:
        self._places.left(requests)

    def leaving(self) -> None:
        self._places.drain(self._number)

    def reported(self, report: EngineReport) -> None:
        super().reported(report)
        self._places.reported(self._number, report)


def _id_of(number: int) -> str:
    """What the router calls an engine."""
    return str(number)


def _error_of(refusal: Refusal) -> GraphgenError:
    match refusal.error:
        case "DeadlineError":
            return DeadlineError(refusal.message)
        case "OverloadedError":
            return OverloadedError(refusal.message, refusal.retry_after_s or RETRY_S)
        case "EngineDeadError":
            return EngineDeadError(refusal.message)
