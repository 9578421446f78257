"""The engines of one program or one server, as one: each request goes where the policy says, and goes on elsewhere
when its engine ends.

Owns the links, the router and the requests that no engine has for the moment. Never starts or ends an engine: whoever
keeps the engines (`graphgen.launch.engines`) says which has ended, and calls `tick` ten times a second. Used by
`graphgen.api.core` and the frontend of a server. With one engine all of it is that engine's link: nothing is routed,
and what is open when the engine ends has ended with it.

A request is moved on the receiving thread of the engine that it leaves, once all that this one said of it is delivered.
All links and this object share one lock, so that a request is never at two engines.
"""

import contextlib
import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from graphgen.base.owner import Owner
from graphgen.base.page_digests import prompt_digests
from graphgen.ipc.errors import (
    DeadlineError,
    EngineClosedError,
    EngineDeadError,
    GraphgenError,
    OverloadedError,
    PoisonedRequestError,
)
from graphgen.ipc.messages import EngineStats, Notice, Progress, Ready
from graphgen.ipc.reports import EngineReport
from graphgen.requests.link import Link, deliver
from graphgen.requests.link_ends import Processes
from graphgen.requests.open_request import OpenRequest
from graphgen.router.engine_stats import sum_of
from graphgen.router.policy import Router
from graphgen.router.records import MAX_DIGESTS, Capacity, Choice, Loss, Refusal, RoutedRequest

logger = logging.getLogger("graphgen")

POLL_S = 0.02
RETRY_S = 5.0
"""When to try again while no engine serves: about as long as a start with warm caches takes."""


class Links:
    """One or several engines. Has the calls of a `Link`; the calls for those who keep the engines say which one."""

    def __init__(
        self,
        engines: Sequence[Processes],
        on_progress: Callable[[Progress], None] | None = None,
        attaches: bool = False,
        after_outputs: Callable[[], None] | None = None,
        on_notice: Callable[[Notice], None] | None = None,
    ) -> None:
        """engines: their processes, or what stands for them. The other arguments: see `Link`."""
        self._owner = Owner("the engine")
        self._lock = threading.RLock()
        self._router = Router()
        self._on_ready: Callable[[int, Ready], None] | None = None
        self._at: dict[int, int] = {}  # open requests, and the number of the engine that has each
        self._lost: dict[int, OpenRequest] = {}  # open requests that no engine has for the moment
        self._ready: dict[int, Ready] = {}  # of the engines that serve
        self._joined: set[int] = set()  # engines that the router knows
        self._drained: dict[int, Callable[[int], None]] = {}  # engines that drain: who is told when nothing is left
        self._drains_by_s: dict[int, float] = {}
        self._at_rest: set[int] = set()  # engines that have drained, and may still be ending
        self._fault: GraphgenError | None = None
        self._is_one = len(engines) == 1
        several = not self._is_one
        self._links: list[Link] = []
        try:
            for number, processes in enumerate(engines):
                self._links.append(
                    Link(
                        processes,
                        on_progress if number == 0 else None,
                        attaches,
                        after_outputs,
                        functools.partial(_name_engine, on_notice, number) if several and on_notice else on_notice,
                        is_kept=several,
                        observer=_Follower(self, number) if several else None,
                        lock=self._lock,
                    )
                )
                self._links[number].when_ready(functools.partial(self._take_ready, number))
        except BaseException:
            for link in self._links:
                link.close()
            raise

    def __len__(self) -> int:
        return len(self._links)

    # --- what a link does ----------------------------------------------------------------------------------------

    def wait_ready(self, timeout_s: float, least: int | None = None) -> Ready:
        """When all engines serve, or at least so many: what the one with least room said. Raises as `Link.wait_ready`
        does."""
        deadline_s = time.monotonic() + timeout_s
        if least is not None and least < len(self._links):
            while self.num_serving < least:
                if time.monotonic() >= deadline_s:
                    raise EngineDeadError(f"{self.num_serving} engines serve after {timeout_s:g} s, not {least}")
                time.sleep(POLL_S)
            return self.ready
        for number, link in enumerate(self._links):
            self._serve(number, link.wait_ready(max(0.0, deadline_s - time.monotonic())))
        return self.ready

    @property
    def ready(self) -> Ready:
        """Of the engines that serve, what the one with least room said: what fits there fits everywhere. Raises
        EngineDeadError where none serves."""
        with self._lock:
            found = min(self._ready.values(), key=_room_of, default=None)
        if found is None:
            raise EngineDeadError("no engine serves at the moment: try again")
        return found

    @property
    def num_serving(self) -> int:
        """Engines that serve now."""
        return len(self._ready)

    def serves(self, number: int) -> bool:
        """Whether an engine serves now."""
        return number in self._ready

    @property
    def is_own(self) -> bool:
        """False in a fork of the program."""
        return self._owner.is_this

    def check_process(self) -> None:
        """Raises EngineDeadError in a fork of the program: the receiving threads are the parent's."""
        self._owner.check()

    def submit(self, requests: Iterable[OpenRequest]) -> None:
        """Opens the requests; from now on their sinks are called. Raises with none opened: what keeps an engine from
        taking them, or OverloadedError and DeadlineError where no engine would serve one in time."""
        self.check_process()
        if self._is_one:
            self._links[0].submit(requests)
            return
        opened = list(requests)
        routed = self._routed(opened)
        with self._lock:
            self._raise_fault()
            for place, (request, entry) in enumerate(zip(opened, routed, strict=True)):
                found = self._router.choose(entry, time.monotonic())
                if isinstance(found, Refusal):
                    self.cancel(one.submit.request_id for one in opened[:place])
                    raise _error_of(found)
                self._send(request, found)

    def cancel(self, request_ids: Iterable[int]) -> None:
        """Ends requests without a word to their sinks. Ids that are not open any more are ignored."""
        if not self._owner.is_this:
            return
        if self._is_one:
            self._links[0].cancel(request_ids)
            return
        with self._lock:
            for request_id in request_ids:
                number = self._at.get(request_id)
                if number is not None:
                    self._links[number].cancel([request_id])
                if number is not None or request_id in self._lost:
                    self._end(request_id)  # also one that is on its way from one engine to another

    def stats(self, timeout_s: float) -> EngineStats:
        """A snapshot of all that serve. Raises EngineDeadError when one of them does not answer in time."""
        try:
            return self.ask_stats().result(timeout_s)
        except FutureTimeoutError:
            raise EngineDeadError(f"a scheduler did not answer for {timeout_s:g} s: close the engine") from None

    def ask_stats(self, steps: bool = False) -> "Future[EngineStats]":
        """Asks for a snapshot and does not wait for it. steps: with those since the last such question."""
        self.check_process()
        if self._is_one:
            return self._links[0].ask_stats(steps)
        with self._lock:
            self._raise_fault()
            asked = {number: self._links[number].ask_stats(steps) for number in sorted(self._ready)}
        return _gathered(asked, len(self._links))

    def ask_probe(self) -> "Future[None]":
        """Is done when scheduler, worker and device of some engine have answered, behind the steps in flight."""
        self.check_process()
        if self._is_one:
            return self._links[0].ask_probe()
        with self._lock:
            self._raise_fault()
            asked = [self._links[number].ask_probe() for number in sorted(self._ready)]
        return _first_of(asked)

    def when_ready(self, call: Callable[[int, Ready], None]) -> None:
        """From now on `call` is made, on a receiving thread, each time that an engine begins to serve."""
        self._on_ready = call

    def when_noticed(self, call: Callable[[Notice], None]) -> None:
        """From now on `call` gets what an operator should know, on a receiving thread."""
        for number, link in enumerate(self._links):
            link.when_noticed(functools.partial(_name_engine, call, number) if not self._is_one else call)

    def close(self) -> None:
        """Ends the engines, then the threads. Open requests get EngineClosedError. Idempotent."""
        if not self._owner.is_this:
            return
        self._fail(EngineClosedError("the engine was closed: make a new Engine"))
        for link in self._links:
            link.begin_close()
        for link in self._links:
            link.close()

    # --- for those who keep the engines ----------------------------------------------------------------------------

    def lose(self, number: int, final_reason: str | None = None) -> bool:
        """An engine has ended. Returns whether its requests go on, at another engine or as soon as one serves; False:
        there is but this one, and they are forgotten.

        final_reason: why it ended, if no other is started in its place; when none is left, all ends with
        EngineDeadError.
        """
        with self._lock:
            self._ready.pop(number, None)
            self._drains_by_s.pop(number, None)
            if self._is_one:
                self._links[0].await_another_engine()
                return False
            if number in self._joined:
                self._router.drain(_id_of(number))  # nothing is sent there from here on
        self._links[number].lose(functools.partial(self._take_lost, number, final_reason))
        return True

    def drain(self, number: int, grace_s: float, when_drained: Callable[[int], None]) -> None:
        """An engine gets no new requests from here on. `when_drained` is called when it has none left; those that are
        open after `grace_s` go on at other engines. Whoever keeps the engine ends it then.

        Raises EngineDeadError where no other engine serves, and for one that does not serve itself.
        """
        with self._lock:
            if number not in self._ready:
                raise EngineDeadError(f"engine {number} does not serve, so there is nothing to drain")
            if len(self._ready.keys() - self._drained.keys()) < 2:
                raise EngineDeadError(f"engine {number} is the only one that serves: let another one serve first")
            self._drained[number] = when_drained
            self._drains_by_s[number] = time.monotonic() + grace_s
            self._router.drain(_id_of(number))

    def expect(self, number: int) -> None:
        """An engine that has drained is about to be started again."""
        with self._lock:
            self._at_rest.discard(number)

    def tick(self) -> None:
        """Ten times a second: what has been waited for long enough."""
        if self._is_one:
            return
        now_s = time.monotonic()
        with self._lock:
            self._tell_progress()
            for number in self._ready:
                self._links[number].ask_report()
            losses = self._router.watch(now_s)
            for number in {int(loss.engine_id) for loss in losses}:
                gone = [loss for loss in losses if int(loss.engine_id) == number]
                ids = [loss.request_id for loss in gone]
                self._links[number].release(ids, functools.partial(self._go_on, gone))
            for number in list(self._drains_by_s):
                self._look_after_drain(number, now_s)
            self._find_places()

    # --- requests --------------------------------------------------------------------------------------------------

    def _routed(self, requests: Sequence[OpenRequest]) -> list[RoutedRequest]:
        """What the router must know of them. The samples of a prompt have one chain of digests."""
        page_size = next((ready.worker.page_size for ready in list(self._ready.values())), 1)
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
                )
            )
        return routed

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
        self._ready.pop(number, None)
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

    def reported(self, number: int, report: EngineReport) -> None:
        """How much an engine has to do, whoever sent it."""
        with self._lock:
            if number in self._ready:
                self._router.report(_id_of(number), report, time.monotonic())

    # --- engines -----------------------------------------------------------------------------------------------------

    def _take_ready(self, number: int, ready: Ready) -> None:
        if self._serve(number, ready) and self._on_ready is not None:
            self._on_ready(number, ready)

    def _serve(self, number: int, ready: Ready) -> bool:
        """Whether it did not serve before."""
        now_s = time.monotonic()
        with self._lock:
            if number in self._ready or number in self._at_rest:
                return False
            self._ready[number] = ready
            if self._is_one:
                return True
            engine_id = _id_of(number)
            if number in self._joined:
                self._router.renewed(engine_id, 0, now_s)
                self._router.undrain(engine_id)
            else:
                worker = ready.worker
                capacity = Capacity(ready.num_slots, worker.num_pages, worker.page_size, ready.token_budget)
                self._router.joined(engine_id, capacity, now_s)
                self._joined.add(number)
            self._find_places()
            return True

    def _tell_progress(self) -> None:
        now_s = time.monotonic()
        for number, link in enumerate(self._links):
            if number in self._joined:
                for request in link.open_requests():
                    self._router.progress(request.submit.request_id, request.num_tokens, now_s)

    def _take_lost(self, number: int, final_reason: str | None, requests: list[OpenRequest]) -> None:
        """What an engine had when it ended or was left. On the link's thread."""
        now_s, engine_id = time.monotonic(), _id_of(number)
        with self._lock:
            when_drained = self._drained.pop(number, None)
            for request in requests:
                if request.submit.request_id in self._at:
                    self._router.progress(request.submit.request_id, request.num_tokens, now_s)
            losses: Sequence[Loss] = ()
            if number in self._joined:
                if when_drained is not None:
                    self._at_rest.add(number)
                if when_drained is None and final_reason is None:
                    losses = self._router.died(engine_id, now_s)
                else:
                    self._joined.discard(number)
                    losses = self._router.left(engine_id)
            self._go_on(losses, requests)
            is_last = final_reason is not None and not self._joined
        if when_drained is not None:
            when_drained(number)
        if is_last:
            self._fail(EngineDeadError(f"no engine is left, the last one ended: {final_reason}\nMake a new Engine"))

    def _go_on(self, losses: Sequence[Loss], requests: list[OpenRequest]) -> None:
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
            self._find_places()
        for request, error in failed:
            deliver(request.sink, error)

    def _find_places(self) -> None:
        """For the requests that no engine has, if any engine takes requests."""
        now_s = time.monotonic()
        for request_id, request in list(self._lost.items()):
            found = self._router.move(request_id, now_s)
            if isinstance(found, Refusal):
                return
            self._send(request, found)

    def _look_after_drain(self, number: int, now_s: float) -> None:
        left = [request.submit.request_id for request in self._links[number].open_requests()]
        if left and now_s < self._drains_by_s[number]:
            return
        self.lose(number)  # what is left goes on elsewhere, as if it had ended

    # --- the end -----------------------------------------------------------------------------------------------------

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise type(self._fault)(*self._fault.args)

    def _fail(self, error: GraphgenError) -> None:
        """From now on every call raises `error`; the first fault stays."""
        with self._lock:
            if self._fault is not None:
                return
            self._fault = error
            requests, self._lost = list(self._lost.values()), {}
        for request in requests:
            deliver(request.sink, type(error)(*error.args))


class _Follower:
    """Who follows the requests of one link."""

    def __init__(self, links: Links, number: int) -> None:
        self._links = links
        self._number = number

    def began(self, request: OpenRequest, cached_tokens: int) -> None:
        self._links.began(request, cached_tokens)

    def refused(self, request: OpenRequest, error: OverloadedError) -> bool:
        return self._links.refused(request)

    def ended(self, request: OpenRequest) -> None:
        self._links.ended(request)

    def reported(self, report: EngineReport) -> None:
        self._links.reported(self._number, report)


def _id_of(number: int) -> str:
    """What the router calls an engine."""
    return str(number)


def _room_of(ready: Ready) -> int:
    return ready.worker.num_pages * ready.worker.page_size


def _error_of(refusal: Refusal) -> GraphgenError:
    match refusal.error:
        case "DeadlineError":
            return DeadlineError(refusal.message)
        case "OverloadedError":
            return OverloadedError(refusal.message, refusal.retry_after_s or RETRY_S)
        case "EngineDeadError":
            return EngineDeadError(refusal.message)


def _name_engine(tell: Callable[[Notice], None], number: int, notice: Notice) -> None:
    tell(Notice(f"engine {number}: {notice.text}"))


def _gathered(asked: "dict[int, Future[EngineStats]]", num_engines: int) -> "Future[EngineStats]":
    """Done when all are: the sum of those that answered, and each for itself."""
    answer: Future[EngineStats] = Future()
    left = itertools.count(len(asked) - 1, -1)

    def take(_: "Future[EngineStats]") -> None:
        if next(left) == 0:
            found = {number: one.result() for number, one in asked.items() if one.exception() is None}
            answer.set_result(sum_of([found.get(number) for number in range(num_engines)]))

    for future in asked.values():
        future.add_done_callback(take)
    if not asked:
        answer.set_result(sum_of([None] * num_engines))
    return answer


def _first_of(asked: "list[Future[None]]") -> "Future[None]":
    """Done when one is; fails when all have failed."""
    answer: Future[None] = Future()
    lock = threading.Lock()
    left = itertools.count(len(asked) - 1, -1)

    def take(future: "Future[None]") -> None:
        with lock:
            is_last = next(left) == 0
            if answer.done():
                return
            if future.exception() is None:
                answer.set_result(None)
            elif is_last:
                answer.set_exception(future.exception())

    for future in asked:
        future.add_done_callback(take)
    if not asked:
        answer.set_exception(EngineDeadError("no engine serves at the moment: try again"))
    return answer
