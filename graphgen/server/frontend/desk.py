"""The life of a request in the frontend: refused or opened, prepared, held until its client's turn, submitted, ended.

Owns the clients' shares and turns. Never touches a public socket. Used on the server's loop; the client's receiving
thread and the preparing threads leave their results in the inbox.
"""

import functools
import itertools
import time
from collections.abc import Callable

import msgspec

from graphgen.base.inbox import Inbox
from graphgen.calls.outputs import Delivery, StreamPiece
from graphgen.ipc.errors import DeadlineError, GraphgenError, InvalidRequestError, OverloadedError
from graphgen.ipc.ggp.framing import Brief, make_error
from graphgen.ipc.ggp.limits import MAX_PRIORITY
from graphgen.ipc.ggp.messages import Error
from graphgen.ipc.ggp.statistics import OpenRequest
from graphgen.ipc.server_messages import RequestEnded
from graphgen.router.links import Links
from graphgen.server.frontend.errors import SERVERS_OWN, error_of
from graphgen.server.frontend.outbox import Outbox
from graphgen.server.frontend.prepare import Prepared, Preparer
from graphgen.server.frontend.requests import Deaths, PublicRequest
from graphgen.server.frontend.sessions import Session
from graphgen.server.frontend.settings import FrontendSettings
from graphgen.server.frontend.tallies import Tallies
from graphgen.server.frontend.turns import FairQueue, Shares

UNREAD_FACTOR = 2
"""A session may have so many times the open requests of a client with those that have ended and are not yet sent."""


class Desk:
    """All requests of all sessions."""

    def __init__(
        self,
        links: Links,
        preparer: Preparer,
        inbox: Inbox,
        outbox: Outbox,
        settings: FrontendSettings,
        on_end: Callable[[RequestEnded], None],
    ) -> None:
        """on_end: hears of each request that ends, where requests are logged."""
        self.tallies = Tallies()
        self.links = links
        self._preparer = preparer
        self._inbox = inbox
        self._outbox = outbox
        self._on_end = on_end if settings.log_requests else None
        self._open_requests = settings.open_requests
        self._max_unstarted = settings.max_unstarted  # with one engine
        self._shares = Shares(settings.open_requests, settings.open_prompt_tokens, settings.total_prompt_tokens)
        self._open: dict[PublicRequest, None] = {}
        self._held: FairQueue[PublicRequest] = FairQueue()
        self._unstarted: dict[str, int] = {}  # by client: samples that were submitted and have no token so far
        self.num_refused = 0
        """Of the requests that were opened: those that ended without a token, through nobody's fault here."""

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_held(self) -> int:
        return len(self._held)

    def describe_open(self, most: int, now_s: float) -> list[OpenRequest]:
        """The oldest open requests."""
        return [request.describe(now_s) for request in itertools.islice(self._open, most)]

    def held_by_class(self) -> list[int]:
        """Requests that wait for their client's turn, by service class."""
        counts = [0] * (MAX_PRIORITY + 1)
        for request in self._held:
            assert request.prepared is not None, "only prepared requests are held"
            counts[request.prepared.priority] += 1
        return counts

    def open(self, session: Session, brief: Brief, frames: tuple[bytes, bytes], now_s: float) -> Error | None:
        """Takes a `generate` that has an id; an error when it is refused at once."""
        request_id, client = brief.id, tenant_of(brief.tenant) if brief.tenant else session.client
        assert request_id is not None
        if request_id in session.requests:
            message = f"request {request_id} of this session is open: choose another id"
            return make_error("duplicate_id", message, about="generate")
        if len(session.requests) >= UNREAD_FACTOR * self._open_requests and not session.is_trusted:
            message = f"{len(session.requests)} requests of this session are open or have ended unread: read their ends"
            return make_error("overloaded", message, request_id, "generate", 1000)
        try:
            self._shares.open_request(client, brief.num_samples)
        except (OverloadedError, InvalidRequestError) as refusal:
            return error_of(refusal, request_id)
        request = PublicRequest(session, request_id, client, brief.num_samples, now_s, brief.tenant, brief.log_id)
        session.requests[request_id] = request
        self._open[request] = None
        try:
            self._preparer.submit(request, frames, self._deliver, self._leave_prepared)
        except OverloadedError as refusal:
            self._fail(request, error_of(refusal, request_id))
        return None

    def cancel(self, session: Session, request_id: int) -> None:
        """Ends a request; one that is not open is ignored."""
        request = session.requests.get(request_id)
        if request is not None and not request.ended:
            self._stop(request)
            request.cancel()
            self._close(request)

    def end_session(self, session: Session) -> None:
        """Ends a session's requests without a word."""
        for request in list(session.requests.values()):
            if not request.ended:
                self._stop(request)
                request.cancel()
                self._close(request)
        session.requests.clear()
        session.news.clear()

    def fail_all(self, error: Error) -> int:
        """Ends every open request with the error; how many."""
        requests = list(self._open)
        for request in requests:
            self._fail(request, error)
        return len(requests)

    def lose_engine(self, number: int, final_reason: str | None, error: Error) -> bool:
        """An engine has ended. Whether its requests go on, see `Links.lose`; if not, every open request ends with the
        error, and the desk waits for the engine that takes its place."""
        if self.links.lose(number, final_reason):
            return True
        self.fail_all(error)
        return False

    def release(self) -> None:
        """Submits held requests as long as a client may have more samples in the scheduler's queue, in turn."""
        while (request := self._held.pop(self._may_submit)) is not None:
            assert request.prepared is not None, "only prepared requests are held"
            request.submitted = True
            self._unstarted[request.client] = self._unstarted.get(request.client, 0) + request.num_unstarted
            try:
                self.links.submit(request.prepared.opened)
            except GraphgenError as failure:  # the engine has died
                self._fail(request, error_of(failure, request.id))

    def close(self) -> None:
        """Ends the threads that prepare requests."""
        self._preparer.close()

    def tick(self, now_s: float) -> None:
        """Ten times a second. Ends held requests whose deadline has passed: those that a scheduler has are its own
        business."""
        self.links.tick()
        if not self._held:
            return
        for request in list(self._open):
            deadline_s = None if request.prepared is None else request.prepared.deadline_s
            if deadline_s is not None and now_s > deadline_s and not request.submitted:
                passed = DeadlineError("the deadline passed before the request's turn came: allow more time")
                self._fail(request, error_of(passed, request.id))

    def _deliver(self, request: PublicRequest, delivery: Delivery | Deaths) -> None:
        """The sink of every sample, on the client's receiving thread, which wakes the loop after a step's outputs."""
        self._inbox.put(functools.partial(self._take, request, delivery))
        if not isinstance(delivery, StreamPiece):
            self._inbox.wake()

    def _take(self, request: PublicRequest, delivery: Delivery | Deaths) -> None:
        if request.ended:
            return
        if isinstance(delivery, Deaths):
            request.take_deaths(delivery)
            self._outbox.add_news(request)
            return
        if not isinstance(delivery, StreamPiece):
            assert isinstance(delivery, Exception), "samples stream"
            self._fail(request, error_of(delivery, request.id, request.log_id))
            return
        num_unstarted, now_s = request.num_unstarted, time.monotonic()
        if request.prepared is not None:
            started_s = request.prepared.opened[delivery.sample_index].started_s
            self.tallies.took(request.clock, delivery, now_s, started_s)
        request.take(delivery, now_s)
        self._count_started(request, num_unstarted - request.num_unstarted)
        if request.ended:
            self._close(request)
        self._outbox.add_news(request)

    def _leave_prepared(self, request: PublicRequest, result: Prepared | Exception) -> None:
        """On a preparing thread."""
        self._inbox.put(functools.partial(self._take_prepared, request, result))
        self._inbox.wake()

    def _take_prepared(self, request: PublicRequest, result: Prepared | Exception) -> None:
        if request.ended:  # cancelled meanwhile
            return
        if isinstance(result, Exception):
            self._fail(request, error_of(result, request.id, request.log_id))
            return
        try:
            self._shares.add_prompt(request.client, result.num_prompt_tokens * len(result.opened))
        except OverloadedError as refusal:
            self._fail(request, error_of(refusal, request.id))
            return
        num_samples = len(result.opened)
        request.accept(result)
        if request.ended:
            self._close(request)
            return
        self._held.push(request.client, request, result.priority, num_samples)
        self._outbox.add_news(request)

    def _may_submit(self, client: str, request: PublicRequest) -> bool:
        num_unstarted = self._unstarted.get(client, 0)
        most = self._max_unstarted * max(1, self.links.num_engines)
        return not num_unstarted or num_unstarted + request.num_unstarted <= most

    def _fail(self, request: PublicRequest, error: Error) -> None:
        if request.ended:
            return
        self.num_refused += not request.started and error.code not in SERVERS_OWN
        self._stop(request)
        request.fail(msgspec.structs.replace(error, id=request.id))
        self._close(request)

    def _stop(self, request: PublicRequest) -> None:
        """Takes the request out of its queue or out of the scheduler, wherever it is."""
        if not request.submitted:
            self._held.discard(request.client, request)
            return
        self.links.cancel(request.internal_ids)
        self._count_started(request, request.num_unstarted)

    def _count_started(self, request: PublicRequest, num_samples: int) -> None:
        """So many samples more have a token, or never will."""
        left = self._unstarted.get(request.client, 0) - num_samples
        if left > 0:
            self._unstarted[request.client] = left
        else:
            self._unstarted.pop(request.client, None)

    def _close(self, request: PublicRequest) -> None:
        """After its end: gives its share back."""
        del self._open[request]
        self._shares.close_request(request.client, request.num_samples, request.prompt_tokens)
        report = request.report(time.monotonic())
        self.tallies.ended(request.clock, report.finish, request.has_failed)
        if self._on_end is not None:
            self._on_end(report)
        self._outbox.add_news(request)


def tenant_of(name: str) -> str:
    """The client that a trusted session acts for. No key and no session is called so."""
    return f"tenant {name}"
