"""What all endpoints share: the connection to the frontend, what the model is called, and who asks.

Owns how a request becomes requests of the frontend: in whose name, with which priority and with whose cached pages.
Knows no endpoint.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import TypeVar

from msgspec import structs

from graphgen.base.salt import cache_salt
from graphgen.calls.outputs import Delivery, PromptTokens
from graphgen.calls.prompts import OnePrompt
from graphgen.calls.sampling_params import SamplingParams
from graphgen.calls.streams import Mailbox
from graphgen.gateway.answers import Answers
from graphgen.gateway.errors import ApiError
from graphgen.gateway.frontends import Frontends
from graphgen.gateway.http import Receive, Scope, read_json
from graphgen.gateway.keys import Holder
from graphgen.gateway.output_parsers.formats import ParserMaker
from graphgen.gateway.outputs import Pieces, Turn
from graphgen.gateway.request_ids import REQUEST_ID
from graphgen.gateway.settings import ModelFacts
from graphgen.gateway.tracing import SPAN, RequestSpan, TracedPieces
from graphgen.remote.core import RemoteCore
from graphgen.remote.requests import NO_PARSING, Parsing

Body = TypeVar("Body")

JSON_BYTES_PER_TEXT_BYTE = 6
"""Of JSON that escapes every character."""
OTHER_BYTES = 1 << 20
"""Of a body, beside its text: names of fields, ids as numbers."""
HOLDER = "graphgen.holder"
"""In a scope: whose key the request has, where keys are asked for."""


class Service:
    """The server behind the gateway, as its endpoints use it."""

    def __init__(
        self,
        core: RemoteCore,
        model_names: Sequence[str],
        model: ModelFacts,
        frontends: Frontends | None = None,
        open_requests: int | None = None,
    ) -> None:
        """core: of the frontend that serves its requests. frontends: all of the server; None: there is but this one.
        open_requests: see GatewaySettings."""
        self.core = core
        self.frontends = Frontends(core, ()) if frontends is None else frontends
        self.model_names = model_names
        self.answers = Answers(core)
        self.parsers = ParserMaker(model.output_format)
        self.tokenizer_info = model.tokenizer_info
        self.created = int(time.time())
        """When this gateway began, in seconds since 1970."""
        self._open_requests = open_requests
        self._turn: Turn | None = None
        self._body_bytes = JSON_BYTES_PER_TEXT_BYTE * core.welcome.limits.text_bytes + OTHER_BYTES

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together."""
        return self.core.welcome.limits.prompt_tokens

    async def read(self, scope: Scope, receive: Receive, kind: type[Body]) -> Body:
        """The body of a request. Raises ApiError, GoneError."""
        return await read_json(scope, receive, kind, self._body_bytes)

    def known(self, name: str | None) -> str:
        """What answers call the model that a request names; one that names none gets the first. Raises ApiError."""
        if name is None:
            return self.model_names[0]
        if name not in self.model_names:
            text = f"the model {name!r:.100} does not exist: this server has {', '.join(self.model_names)}"
            raise ApiError(404, text, "model_not_found", "model")
        return name

    def check_share(self, num_prompts: int, n: int) -> None:
        """n: samples of each prompt. Raises ApiError for more than a client may have open: waiting would not help."""
        limit, num_samples = self._open_requests, num_prompts * n
        if limit is not None and num_samples > limit:
            text = (
                f"{num_prompts} prompts with n = {n} are {num_samples} requests, a client may have {limit} open: give"
                " fewer prompts or samples at a time, or start the server with a higher --open-requests"
            )
            raise ApiError(400, text, "invalid_request", "n" if num_prompts == 1 else "prompt")

    def pieces(
        self,
        prompts: Sequence[OnePrompt],
        sampling: SamplingParams,
        scope: Scope,
        receive: Receive,
        parsing: Parsing = NO_PARSING,
    ) -> Pieces | TracedPieces:
        """Sends the prompts. Raises GraphgenError with nothing sent."""
        sampling = _within_key(sampling, scope)
        tenant, log_id = tenant_of(scope), scope[REQUEST_ID]
        pieces = Pieces(self.core, self._turn_of_loop(), prompts, sampling, tenant, log_id, receive, parsing)
        span: RequestSpan | None = scope.get(SPAN)
        if span is None:
            return pieces
        span.begin_outputs(self.model_names[0], sampling)
        return TracedPieces(pieces, span)

    async def read_prompt(
        self, prompt: OnePrompt, scope: Scope, *, special_tokens: bool = True, with_text: bool = False
    ) -> PromptTokens:
        """What a prompt is to the model, see `RemoteCore.read_prompt`. Raises GraphgenError."""
        found: asyncio.Queue[Delivery] = asyncio.Queue()
        mailbox = self._turn_of_loop().mailbox
        self.core.read_prompt(
            prompt,
            lambda delivery: mailbox.put(found, delivery),
            special_tokens=special_tokens,
            with_text=with_text,
            tenant=tenant_of(scope),
        )
        delivery = await found.get()
        if isinstance(delivery, Exception):
            raise delivery
        assert isinstance(delivery, PromptTokens), "it was all that was asked for"
        return delivery

    def _turn_of_loop(self) -> Turn:
        if self._turn is None:
            self._turn = Turn(Mailbox(asyncio.get_running_loop()))
        return self._turn


def _within_key(sampling: SamplingParams, scope: Scope) -> SamplingParams:
    """At most the priority that the key's requests get, and pages shared with that key alone."""
    holder: Holder | None = scope.get(HOLDER)
    if holder is None:
        return sampling
    priority = min(sampling.priority, holder.max_priority)
    return structs.replace(sampling, priority=priority, cache_salt=cache_salt(holder.name, sampling.cache_salt))


def tenant_of(scope: Scope) -> str:
    """Without keys, who comes from one address is one."""
    if HOLDER in scope:
        holder: Holder = scope[HOLDER]
        return holder.name
    client = scope.get("client")
    return client[0] if client else "-"
