"""One request at a server: what is sent for it, and what its samples have brought back.

Does no I/O and knows no thread: the connection feeds it. Used by `graphgen.remote.connection`.
"""

import time
from collections.abc import Sequence
from typing import NoReturn, cast

import msgspec
from msgspec import UNSET, Struct

from graphgen.calls.logprobs import Logprobs, join
from graphgen.calls.outputs import Delivery, Mark, PromptTokens, RequestOutput, Sink, StreamPiece, Timing
from graphgen.calls.prompts import Chat, OnePrompt
from graphgen.calls.sampling_params import SamplingParams
from graphgen.calls.structured import to_wire
from graphgen.ipc.codec import pack_int32
from graphgen.ipc.engine_messages import FinishReason
from graphgen.ipc.errors import (
    DeadlineError,
    EngineDeadError,
    GraphgenError,
    InvalidRequestError,
    NumericalError,
    OverloadedError,
    PoisonedRequestError,
    PromptTooLongError,
    ServerError,
)
from graphgen.ipc.ggp import messages
from graphgen.ipc.ggp.limits import MAX_INT
from graphgen.ipc.ggp.messages import Accepted, Delta, Done, Error, Generate, Sampling, SamplingDefaults
from graphgen.ipc.step_schema import WORD_BYTES, logprob_words


class RemoteRequest:
    """A request from its `generate` to its end. Its sink gets every piece if it streams, else the whole outputs."""

    def __init__(self, message: Generate, prompt: OnePrompt, streams: bool, sink: Sink) -> None:
        self.message = message
        self.sink = sink
        self.accepted = False
        self._streams = streams
        self._sent_s = time.monotonic()
        self._prompt_ids = tuple(prompt) if not isinstance(prompt, (str, Chat)) else ()
        self._token_ids: list[list[int]] = [[] for _ in range(message.sampling.n)]
        self._texts: list[list[str]] = [[] for _ in range(message.sampling.n)]
        self._times_s: list[list[float]] = [[] for _ in range(message.sampling.n)]
        self._logprobs: list[list[Logprobs]] = [[] for _ in range(message.sampling.n)]
        self._prompt_logprobs: Logprobs | None = None
        self._num_tokens = [0] * message.sampling.n
        self._num_open = message.sampling.n
        self._num_prompt_tokens = 0
        self._prompt_tail = ""
        self._cached_tokens = [0] * message.sampling.n

    def accept(self, accepted: Accepted) -> None:
        self.accepted = True
        self._num_prompt_tokens = accepted.prompt_tokens
        self._prompt_tail = accepted.tail
        if accepted.prompt_ids is not None:
            self._prompt_ids = tuple(accepted.prompt_ids)

    def take_delta(self, delta: Delta) -> Delivery | None:
        """What its sink gets of a delta. Raises ServerError when tokens are missing, which no server may do."""
        sample, token_ids = delta.sample, delta.ids
        if delta.seq != self._num_tokens[sample]:
            raise ServerError(
                f"the server sent token {delta.seq} of sample {sample} after {self._num_tokens[sample]}: report this",
                code="internal",
            )
        self._num_tokens[sample] += len(token_ids)
        self._cached_tokens[sample] += delta.cached_tokens
        if delta.finish is not None:
            self._num_open -= 1
        logprobs = None if delta.logprobs is None else _logprobs(delta.logprobs, token_ids)
        told = delta.prompt_logprobs
        of_prompt = None if told is None else _logprobs(told, told.ids)
        if not self._streams:
            self._keep(delta, logprobs, of_prompt)
            return None
        return StreamPiece(
            text=delta.text,
            token_ids=tuple(token_ids),
            finish_reason=_finish_reason(delta.finish),
            cached_tokens=self._cached_tokens[sample],
            sample_index=sample,
            prompt_tokens=self._num_prompt_tokens,
            marks=tuple(Mark(mark.id, mark.start, mark.end) for mark in delta.marks) if delta.marks else (),
            prompt_tail=self._prompt_tail,
            logprobs=logprobs,
            prompt_logprobs=of_prompt,
        )

    def _keep(self, delta: Delta, logprobs: Logprobs | None, of_prompt: Logprobs | None) -> None:
        """For the whole output of a sample."""
        sample = delta.sample
        now_s = time.monotonic() - self._sent_s
        self._token_ids[sample].extend(delta.ids)
        self._texts[sample].append(delta.text)
        self._times_s[sample].extend([now_s] * len(delta.ids))
        if logprobs is not None:
            self._logprobs[sample].append(logprobs)
        if of_prompt is not None:
            self._prompt_logprobs = of_prompt

    def take_done(self, done: Done) -> list[Delivery]:
        """What its sink gets at the end: for a stream nothing, since its last piece said so."""
        if self._streams:
            return []
        return [self._output(sample, done) for sample in range(len(self._token_ids))]

    def take_failure(self, error: GraphgenError) -> list[Delivery]:
        """What its sink gets when the request is lost: for a stream that has ended nothing, though its done is due."""
        return [error] if self._num_open or not self._streams else []

    def _output(self, sample: int, done: Done) -> RequestOutput:
        times = tuple(self._times_s[sample])
        reason = _finish_reason(done.finish[sample])
        assert reason is not None, "a done says how each sample ended"
        return RequestOutput(
            request_id=self.message.id,
            prompt_token_ids=self._prompt_ids,
            token_ids=tuple(self._token_ids[sample]),
            text="".join(self._texts[sample]),
            finish_reason=reason,
            timing=Timing(
                queued_s=done.timing.queued_ms / 1000,
                first_token_s=times[0] if times else 0.0,
                total_s=time.monotonic() - self._sent_s,
                token_times_s=times,
            ),
            cached_tokens=done.usage.cached_tokens,
            sample_index=sample,
            logprobs=join(self._logprobs[sample]),
            prompt_logprobs=None if sample else self._prompt_logprobs,
        )


class PromptRequest:
    """A request whose prompt is all that is wanted. Its sink gets a PromptTokens."""

    def __init__(self, message: Generate, sink: Sink) -> None:
        self.message = message
        self.sink = sink
        self.accepted = False
        self._prompt = PromptTokens((), None)

    def accept(self, accepted: Accepted) -> None:
        self.accepted = True
        self._prompt = PromptTokens(tuple(accepted.prompt_ids or ()), accepted.prompt_text)

    def take_delta(self, delta: Delta) -> NoReturn:
        raise ServerError("the server sent tokens of a request that wants none: report this", code="internal")

    def take_done(self, done: Done) -> list[Delivery]:
        return [self._prompt]

    def take_failure(self, error: GraphgenError) -> list[Delivery]:
        return [error]


class Parsing(Struct, frozen=True):
    """What who parses outputs asks for beside their text: `generate.marked_ids` and `tail_len`."""

    marked_ids: tuple[int, ...] = ()
    tail_len: int = 0


NO_PARSING = Parsing()


def make_generate(
    request_id: int,
    prompt: OnePrompt,
    sampling: SamplingParams,
    streams: bool,
    tenant: str = "",
    parsing: Parsing = NO_PARSING,
    log_id: str = "",
) -> Generate:
    """tenant, log_id: see `generate`. Raises InvalidRequestError for what cannot be written down in the protocol."""
    wire = wire_sampling(sampling)
    if isinstance(prompt, str):
        message = Generate(id=request_id, text=_valid_text(prompt), echo_ids=not streams)
    elif isinstance(prompt, Chat):
        message = msgspec.structs.replace(
            _generate_chat(request_id, prompt),
            echo_ids=not streams,
            marked_ids=list(parsing.marked_ids),
            tail_len=parsing.tail_len,
        )
    else:
        message = _generate_ids(request_id, prompt)
    return msgspec.structs.replace(message, sampling=wire, tenant=tenant, log_id=log_id)


def _generate_ids(request_id: int, prompt: Sequence[int]) -> Generate:
    if not prompt:
        raise InvalidRequestError("the prompt is empty: give at least one token")
    try:
        return Generate(id=request_id, prompt_u32=pack_int32(prompt))
    except (OverflowError, TypeError) as error:
        raise InvalidRequestError(f"a prompt holds what is no token id ({error}): give plain ints") from None


def _generate_chat(request_id: int, chat: Chat) -> Generate:
    values = {
        "id": request_id,
        "messages": [dict(message) for message in chat.messages],
        "tools": chat.tools,
        "documents": chat.documents,
        "chat_template_kwargs": chat.chat_template_kwargs,
    }
    try:
        msgspec.msgpack.encode(values)
        return msgspec.convert(values, Generate)
    except (msgspec.ValidationError, UnicodeEncodeError, OverflowError) as error:
        raise InvalidRequestError(f"a chat cannot be sent ({error}): shorten it, or mend its text") from None


def wire_sampling(sampling: SamplingParams) -> Sampling:
    """SamplingParams as the protocol writes them."""
    if sampling.seed is not None and sampling.seed > MAX_INT:
        raise InvalidRequestError(f"seed is {sampling.seed}, the protocol's limit is {MAX_INT}: use a smaller one")
    values = msgspec.structs.asdict(sampling)
    values["structured"] = None if sampling.structured is None else to_wire(sampling.structured)
    for name in SamplingDefaults.__struct_fields__:
        if values[name] is None:
            values[name] = UNSET  # the model's
    if sampling.top_k == -1:
        values["top_k"] = 0
    values["logit_bias"] = None if sampling.logit_bias is None else list(sampling.logit_bias.items())
    values["stop"] = [_valid_text(text) for text in sampling.stop_strings]
    values["stop_token_ids"] = list(sampling.stop_token_ids)
    return Sampling(**values, model_defaults=True)


def exception_of(error: Error) -> GraphgenError:
    """What an in-process engine would have raised; ServerError for what only a server can say."""
    match error.code:
        case "bad_request":
            return InvalidRequestError(error.message)
        case "never_fits" | "too_large":
            return PromptTooLongError(error.message)
        case "overloaded":
            return OverloadedError(error.message, (error.retry_after_ms or 0) / 1000)
        case "deadline":
            return DeadlineError(error.message)
        case "poisoned":
            return PoisonedRequestError(error.message)
        case "numerical":
            return NumericalError(error.message)
        case "engine_lost":
            return EngineDeadError(error.message)
        case code:
            return ServerError(error.message, code, error.retryable)


def _logprobs(found: messages.Logprobs, token_ids: Sequence[int]) -> Logprobs:
    """Raises ServerError where they are not those of so many tokens."""
    num_values, num_tokens = len(token_ids) * WORD_BYTES * logprob_words(found.top), len(token_ids) * (1 + found.top)
    if (len(found.values), len(found.tokens)) != (num_values, num_tokens):
        raise ServerError("the server sent log-probabilities of other tokens than it sent: report this", "internal")
    return Logprobs(found.top, tuple(token_ids), found.values, tuple(found.tokens), found.before)


def _valid_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"a text is no valid Unicode ({error}): remove its lone surrogates") from None
    return text


def _finish_reason(reason: str | None) -> FinishReason | None:
    """A reason of a later server than this client knows is an error to it."""
    if reason is None or reason in ("stop", "length", "aborted", "error"):
        return cast("FinishReason | None", reason)
    return "error"
