"""The requests that were sent to a server elsewhere: what each is called there, and how many of its tokens have come.

Owns the ids on the wire. A request that comes back to a server gets another one, so that what was still on its way when
it left is not taken for its own. Used by `graphgen.router.remote_link`, on its thread.
"""

import itertools
from typing import NamedTuple

from msgspec import Struct

from graphgen.ipc.engine_messages import Outputs, TokenOutput
from graphgen.ipc.ggp.messages import Cancel, Delta, Generate
from graphgen.requests.open_request import OpenRequest
from graphgen.router.remote_messages import generate_of, output_of


class _Sent(Struct):
    request: OpenRequest
    num_tokens: int = 0  # that have come from this server


class Taken(NamedTuple):
    """What some deltas have brought."""

    outputs: Outputs
    deaths: list[tuple[OpenRequest, int]]  # how many count against a request, once it has its tokens
    broken: list[tuple[OpenRequest, str]]  # requests whose deltas cannot be, and why


class SentRequests:
    """By their ids on the wire, until they have ended here or there."""

    def __init__(self) -> None:
        self._ids = itertools.count()
        self._sent: dict[int, _Sent] = {}
        self._wire_ids: dict[int, int] = {}  # by the requests' own

    def __len__(self) -> int:
        return len(self._sent)

    def open(self, request: OpenRequest, eos_token_ids: frozenset[int]) -> Generate:
        """What opens a request at the server, behind the tokens that it has. eos_token_ids: the server's."""
        wire_id = next(self._ids)
        self._sent[wire_id] = _Sent(request)
        self._wire_ids[request.submit.request_id] = wire_id
        return generate_of(request, wire_id, eos_token_ids)

    def cancel(self, request_id: int) -> Cancel | None:
        """What ends a request at the server; None if it is not there. Nothing more is heard of it."""
        wire_id = self._wire_ids.pop(request_id, None)
        if wire_id is None:
            return None
        del self._sent[wire_id]
        return Cancel(id=wire_id)

    def end(self, wire_id: int) -> OpenRequest | None:
        """The server has ended it. None: it was cancelled before."""
        sent = self._sent.pop(wire_id, None)
        if sent is None:
            return None
        self._wire_ids.pop(sent.request.submit.request_id, None)
        return sent.request

    def clear(self) -> None:
        """The server knows none of them any more."""
        self._sent.clear()
        self._wire_ids.clear()

    def take(self, deltas: list[Delta]) -> Taken:
        """Those of requests that were cancelled meanwhile are left out."""
        outputs: list[TokenOutput] = []
        request_ids: list[int] = []
        token_ids: list[int] = []
        deaths: list[tuple[OpenRequest, int]] = []
        broken: list[tuple[OpenRequest, str]] = []
        for delta in deltas:
            sent = self._sent.get(delta.id)
            if sent is None:
                continue
            request = sent.request
            if delta.deaths:
                deaths.append((request, delta.deaths))
            if delta.seq != sent.num_tokens or (delta.finish is not None and not delta.ids):
                what = f"token {delta.seq} of a request after {sent.num_tokens}, finish {delta.finish}"
                broken.append((request, what))
                continue
            is_plain = sent.num_tokens and delta.finish is None and delta.logprobs is None and len(delta.ids) == 1
            sent.num_tokens += len(delta.ids)
            if is_plain:
                request_ids.append(request.submit.request_id)
                token_ids += delta.ids
            elif delta.ids:
                outputs.append(output_of(delta, request))
        return Taken(Outputs(tuple(outputs), tuple(request_ids), tuple(token_ids)), deaths, broken)
