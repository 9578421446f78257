"""From what a client asks to prompts and sampling parameters, and the pieces of all its outputs as they come.

Owns which fields of a request become which of SamplingParams, what is refused because it is not served, and the queue
in which pieces, ticks and the client's leaving meet. Used by the endpoints, on the event loop.
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from graphgen.calls.outputs import Delivery, StreamPiece
from graphgen.calls.prompts import Chat, OnePrompt, batch_of, one_prompt
from graphgen.calls.sampling_params import SamplingParams
from graphgen.calls.streams import Mailbox
from graphgen.gateway.errors import ApiError
from graphgen.gateway.http import GoneError, Receive, until_gone
from graphgen.gateway.schema import (
    ChatRequest,
    CompletionRequest,
    Generation,
    PromptTokensDetails,
    TokenizeRequest,
    Usage,
)
from graphgen.gateway.structured import structured_of
from graphgen.ipc.errors import InvalidRequestError
from graphgen.ipc.messages import MAX_LOGPROBS
from graphgen.ipc.short import short
from graphgen.remote.core import RemoteCore
from graphgen.remote.requests import Parsing

TICK_S = 10.0
"""A stream that has had nothing to say for so long sends a comment: proxies cut silent ones."""
MAX_TOKEN_ID_LEN = 10
"""Digits of the largest token id."""
COMPLETION_MAX_TOKENS = 16
"""Of /v1/completions, where a request says nothing."""

_SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "priority",
    "cache_salt",
    "deadline_ms",
    "itl_target_ms",
    "ttft_target_ms",
    "tpot_target_ms",
)
_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


UNSERVED = {
    "allowed_token_ids": "a choice of tokens",
    "bad_words": "words that never come",
    "logits_processors": "code of a client",
    "use_beam_search": "beam search",
    "truncate_prompt_tokens": "a prompt that is cut",
    "include_stop_str_in_output": "a stop string in the text",
    "return_token_ids": "token ids",
    "prompt_embeds": "a prompt of vectors",
    "chat_template": "a template of a client",
    "continue_final_message": "a chat that is not the model's turn",
    "add_special_tokens": "tokens around what the chat template writes",
    "functions": "functions in their old form",
    "function_call": "functions in their old form",
}
"""What would change an output, by its field, and is not what the field asks for: a client that got another answer in
silence would look for the reason elsewhere."""


def sampling_of(request: Generation, max_tokens: int | None) -> SamplingParams:
    """Raises ApiError with the field that is wrong."""
    values = {name: value for name in _SAMPLING_FIELDS if (value := getattr(request, name)) is not None}
    values |= _logprobs_of(request)
    if request.logit_bias:
        values["logit_bias"] = _biases_of(request.logit_bias)
    structured = structured_of(request)
    try:
        return SamplingParams(max_tokens=max_tokens, structured=structured, **values)
    except InvalidRequestError as error:
        param = str(error).partition(" ")[0].rstrip(":")
        is_field = param in (*_SAMPLING_FIELDS, "logprobs", "logit_bias")
        raise ApiError(400, str(error), "invalid_request", param if is_field else None) from None


def _biases_of(given: dict[str, float]) -> dict[int, float]:
    """JSON has no numbers for keys."""
    biases: dict[int, float] = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= MAX_TOKEN_ID_LEN):
            text = f"logit_bias has the key {short(key)}: give token ids, as /tokenize tells them"
            raise ApiError(400, text, "invalid_request", "logit_bias")
        if int(key) in biases:
            raise ApiError(
                400, f"logit_bias has token {int(key)} twice: give one bias", "invalid_request", "logit_bias"
            )
        biases[int(key)] = bias
    return biases


def _logprobs_of(request: Generation) -> dict[str, int]:
    """What is asked for of log-probabilities, which chats and completions say in ways of their own."""
    if isinstance(request, ChatRequest):
        num_top = request.top_logprobs or 0
        if num_top and not request.logprobs:
            text = f"top_logprobs is {num_top} without logprobs: say logprobs: true, or leave it out"
            raise ApiError(400, text, "invalid_request", "top_logprobs")
        if not 0 <= num_top <= MAX_LOGPROBS:
            text = f"top_logprobs is {num_top}: use a value from 0 to {MAX_LOGPROBS}"
            raise ApiError(400, text, "invalid_request", "top_logprobs")
        return {"logprobs": num_top} if request.logprobs else {}
    if not isinstance(request, CompletionRequest) or request.logprobs is None:
        return {}
    if not request.echo:
        return {"logprobs": request.logprobs}
    if request.stream and (request.n or 1) > 1:
        raise not_served("n", "several outputs behind an echo with log-probabilities, as a stream", "do not stream")
    return {"logprobs": request.logprobs, "prompt_logprobs": request.logprobs}


def chat_prompt(request: ChatRequest, tools: list[dict[str, Any]] | None) -> Chat:
    """tools: what the template is told of. Raises ApiError."""
    _check_common(request)
    if request.echo:
        raise not_served("echo", "a chat before its answer")
    if request.add_generation_prompt is False:
        raise not_served("add_generation_prompt", "a chat that is not the model's turn")
    if set(request.modalities or ()) - {"text"}:
        raise not_served("modalities", "sound")
    return chat_of(request, tools)


def chat_of(request: ChatRequest | TokenizeRequest, tools: list[dict[str, Any]] | None) -> Chat:
    """What the model's template is given. Raises ApiError."""
    switches = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        switches.setdefault("reasoning_effort", request.reasoning_effort)
    messages = [_known_fields(message) for message in request.messages or []]
    return _checked(Chat(messages, tools, request.documents, switches or None), "messages")


def _known_fields(message: Mapping[str, Any]) -> dict[str, Any]:
    """What programs send back of an answer has fields that no template reads."""
    found = {name: value for name in _MESSAGE_FIELDS if (value := message.get(name)) not in (None, [])}
    if found.get("role") == "developer":  # OpenAI's newer word, which few templates know
        found["role"] = "system"
    if "reasoning_content" not in found and isinstance(message.get("reasoning"), str):
        found["reasoning_content"] = message["reasoning"]
    return found


def _checked(chat: Chat, param: str) -> Chat:
    try:
        checked = one_prompt(chat)
    except InvalidRequestError as error:
        raise ApiError(400, str(error), "invalid_request", param) from None
    assert isinstance(checked, Chat)
    return checked


def completion_prompts(request: CompletionRequest) -> list[OnePrompt]:
    """Raises ApiError."""
    if request.suffix:
        raise not_served("suffix", "text behind the output")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise not_served("best_of", "a choice among outputs")
    _check_common(request)
    try:
        return batch_of(request.prompt)
    except InvalidRequestError as error:
        raise ApiError(400, str(error), "invalid_request", "prompt") from None


def _check_common(request: Generation) -> None:
    for name, what in UNSERVED.items():
        if getattr(request, name, None) not in (None, False, "none") and getattr(request, name) != []:
            raise not_served(name, what)


def not_served(param: str, what: str, remedy: str = "leave it out") -> ApiError:
    """Of a field that is known and cannot be obeyed."""
    return ApiError(400, f"{param}: {what} cannot be served by this server: {remedy}", "unsupported_parameter", param)


class Tally:
    """Counts the tokens of a request."""

    def __init__(self, num_prompts: int, without_output: bool = False) -> None:
        """without_output: of a request that wants its prompt alone."""
        self._without_output = without_output
        self._prompt_tokens = [0] * num_prompts
        self._cached_tokens = [0] * num_prompts
        self._output_tokens = 0

    def add(self, number: int, piece: StreamPiece) -> None:
        """A piece of prompt `number`."""
        self._prompt_tokens[number] = piece.prompt_tokens
        if piece.sample_index == 0:
            self._cached_tokens[number] = piece.cached_tokens
        self._output_tokens += 0 if self._without_output else len(piece.token_ids)

    @property
    def usage(self) -> Usage:
        prompt = sum(self._prompt_tokens)
        details = PromptTokensDetails(sum(self._cached_tokens))
        return Usage(prompt, self._output_tokens, prompt + self._output_tokens, details)


class Outputs(Protocol):
    """The outputs of a request, as they come."""

    def batches(self) -> AsyncIterator[list[tuple[int, StreamPiece]]]:
        """What has come, as (number of the prompt, piece), until all outputs have ended; empty after a silence."""


class NoOutputs:
    """The outputs of prompts that are echoed alone: nothing is computed."""

    def __init__(self, prompt_lens: Sequence[int], n: int) -> None:
        self._prompt_lens = prompt_lens
        self._n = n

    async def batches(self) -> AsyncIterator[list[tuple[int, StreamPiece]]]:
        """See Outputs."""
        yield [
            (number, StreamPiece("", (), "length", cached_tokens=0, sample_index=index, prompt_tokens=length))
            for number, length in enumerate(self._prompt_lens)
            for index in range(self._n)
        ]


class Pieces:
    """The pieces of all outputs of a request. Left early, for whatever reason, it ends the request."""

    def __init__(
        self,
        core: RemoteCore,
        mailbox: Mailbox,
        prompts: Sequence[OnePrompt],
        sampling: SamplingParams,
        tenant: str,
        log_id: str,
        receive: Receive,
        parsing: Parsing,
    ) -> None:
        """log_id: what logs call it. receive: of the request, read to its end. Raises GraphgenError with nothing
        sent."""
        self._core = core
        self._receive = receive
        self._arrived: asyncio.Queue[tuple[int, Delivery | None]] = asyncio.Queue()  # None: a tick
        sinks = [functools.partial(self._put, mailbox, number) for number in range(len(prompts))]
        self._request_ids = core.open(
            prompts, sampling, streams=True, sinks=sinks, tenant=tenant, parsing=parsing, log_id=log_id
        )
        self._num_open = len(self._request_ids)
        self._beside: list[asyncio.Task[None]] = []

    def _put(self, mailbox: Mailbox, number: int, delivery: Delivery) -> None:
        """The sink of prompt `number`, on the connection's thread."""
        mailbox.put(self._arrived, (number, delivery))

    async def __aenter__(self) -> Self:
        self._beside = [asyncio.create_task(work()) for work in (self._watch, self._tick)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._beside:
            task.cancel()
        if self._num_open:
            self._num_open = 0
            self._core.cancel(self._request_ids)

    async def batches(self) -> AsyncIterator[list[tuple[int, StreamPiece]]]:
        """See Outputs. Raises what ended the request, GoneError when its client left."""
        while self._num_open:
            arrived = [await self._arrived.get()]
            while not self._arrived.empty():
                arrived.append(self._arrived.get_nowait())
            pieces = [(number, piece) for number, piece in arrived if isinstance(piece, StreamPiece)]
            self._num_open -= sum(piece.finish_reason is not None for _, piece in pieces)
            failure = next((one for _, one in arrived if isinstance(one, Exception)), None)
            if pieces or failure is None:
                yield pieces
            if failure is not None:
                raise failure

    async def _watch(self) -> None:
        await until_gone(self._receive)
        self._arrived.put_nowait((0, GoneError()))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            if self._arrived.empty():
                self._arrived.put_nowait((0, None))
