"""The open requests of a link: which there are, and what of the engine's outputs each of them gets.

Owns the table, from `open` until a request has its last token, is cancelled, refused or given back. Knows no socket and
no thread of its own: `graphgen.requests.link` makes it and gives it what its receiving thread hears. Tokens become text
in `graphgen.requests.open_request`.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection

from graphgen.calls.outputs import Delivery, Sink
from graphgen.ipc.engine_messages import Blamed, FinishReason, Outputs
from graphgen.ipc.errors import GraphgenError, OverloadedError
from graphgen.requests.link_ends import Observer
from graphgen.requests.open_request import OpenRequest

logger = logging.getLogger("graphgen")


class RequestTable:
    """Requests are opened and cancelled by any thread; what the engine says of them comes on the receiving thread."""

    def __init__(self, lock: "threading.RLock", observer: Observer, send_cancel: Callable[[int], None]) -> None:
        """lock: the link's, reentrant. send_cancel: tells the engine to end a request; called with the lock held."""
        self._lock = lock
        self._observer = observer
        self._send_cancel = send_cancel
        self._requests: dict[int, OpenRequest] = {}
        self._unbegun: dict[int, OpenRequest] = {}  # requests that had tokens when they came, and none from here yet

    def open(self, request: OpenRequest) -> None:
        """From now on its sink is called. Called with the lock held."""
        self._requests[request.submit.request_id] = request
        if request.submit.num_moves:
            self._unbegun[request.submit.request_id] = request

    def cancel(self, request_id: int) -> None:
        """Ends a request without a word to its sink, if it is open."""
        with self._lock:
            if self._forget(request_id) is not None:
                self._send_cancel(request_id)

    def find(self, request_id: int) -> OpenRequest | None:
        """The request, if it is open."""
        return self._requests.get(request_id)

    def snapshot(self) -> list[OpenRequest]:
        """Those of this moment."""
        with self._lock:
            return list(self._requests.values())

    def take_all(self) -> list[OpenRequest]:
        """Those that were open: none is, from here on."""
        with self._lock:
            requests, self._requests = list(self._requests.values()), {}
            self._unbegun.clear()
        return requests

    def release(self, request_ids: Collection[int]) -> list[OpenRequest]:
        """Those of them that were open: the engine is told to end them, and nothing more is heard of them."""
        with self._lock:
            found = [self._requests.pop(one) for one in request_ids if one in self._requests]
            for request in found:
                self._unbegun.pop(request.submit.request_id, None)
                self._send_cancel(request.submit.request_id)
        return found

    # --- what the engine says ----------------------------------------------------------------------------------------

    def deliver_outputs(self, message: Outputs) -> None:
        """The tokens of a step, each to its request and what it makes of them to its sink."""
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

    def refuse(self, request_id: int, error: GraphgenError) -> None:
        """The engine does not go on with a request: it goes elsewhere, or its sink gets the error."""
        with self._lock:
            request = self._requests.get(request_id)
            if request is None:
                return
            if isinstance(error, OverloadedError) and self._observer.refused(request, error):
                del self._requests[request_id]
                return
        self._forget(request_id)
        deliver(request.sink, error)

    def hear_deaths(self, message: Blamed) -> None:
        """How many deaths count against requests by now."""
        for request_id, num_deaths in zip(message.request_ids, message.num_deaths, strict=True):
            if (blamed := self._requests.get(request_id)) is not None:
                blamed.hear_deaths(num_deaths)

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
            self.cancel(request_id)
            deliver(request.sink, GraphgenError(f"decoding failed with {type(error).__name__}: {error}"))
            return
        if ended is not None:
            if reason is None:
                self.cancel(request_id)
            else:
                self._forget(request_id)
        if delivery is not None and not deliver(request.sink, delivery):
            self.cancel(request_id)

    def _forget(self, request_id: int) -> OpenRequest | None:
        with self._lock:
            self._unbegun.pop(request_id, None)
            request = self._requests.pop(request_id, None)
        if request is not None:
            self._observer.ended(request)
        return request


def deliver(sink: Sink, delivery: Delivery) -> bool:
    """Whether the reader still exists: an event loop may have been closed under a stream."""
    try:
        sink(delivery)
    except RuntimeError:
        return False
    return True
