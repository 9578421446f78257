"""From the bytes of a `generate` to requests that the scheduler can take: decoding, tokenizing, every check.

Owns the threads that do it, beside the server's loop: a prompt of a million tokens must not hold up anyone's tokens.
Each client has one prompt in work at a time, and the clients take turns.
"""

import dataclasses
import functools
import threading
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from msgspec import UNSET

from graphgen.base.salt import cache_salt
from graphgen.calls.outputs import Delivery
from graphgen.calls.prompts import Chat, one_prompt
from graphgen.calls.sampling_params import SamplingParams
from graphgen.calls.structured import of_wire
from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.errors import InvalidRequestError, OverloadedError, PromptTooLongError
from graphgen.ipc.ggp import limits
from graphgen.ipc.ggp.framing import FrameError, Framing, make_error
from graphgen.ipc.ggp.messages import (
    OF_CHATS,
    ChatMessage,
    ClientMessage,
    Generate,
    Sampling,
    SamplingDefaults,
    ServerMessage,
)
from graphgen.requests.core import AttachedCore
from graphgen.requests.open_request import OpenRequest
from graphgen.server.frontend.requests import Deaths, PublicRequest
from graphgen.server.frontend.settings import text_bytes_limit
from graphgen.server.frontend.turns import FairQueue

MAX_WAITING_BYTES = 64 << 20
"""Bytes of undecoded requests that wait for a thread; beyond that clients are told to come back."""
RETRY_AFTER_S = 1.0
USUAL_BYTES_PER_TOKEN = 4
"""Of text. One that is longer than this in a full context may have too many tokens for it."""
PIECE_LEN = 1 << 13
"""Characters."""
TOKENS_OF_A_CUT = 16
"""What a piece may have more than its share of the whole text: special tokens, and words that were cut."""

PieceSink = Callable[[PublicRequest, Delivery | Deaths], None]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request that was checked."""

    opened: list[OpenRequest]  # one for each sample; none: its prompt was all that was wanted
    num_prompt_tokens: int
    prompt_ids: list[int] | None  # where the client asks for them
    prompt_text: str | None  # the same
    priority: int
    deadline_s: float | None  # as time.monotonic()
    stream: bool
    tail: str  # of the rendered chat
    arrived_s: float = 0.0  # here, or at the frontend that routed it here
    is_routed: bool = False


class Preparer:
    """Makes a Prepared, or the exception that stands in its way, of each `generate`."""

    def __init__(
        self,
        core: AttachedCore,
        framing: Framing[ServerMessage, ClientMessage],
        num_threads: int,
        max_priority: Callable[[str], int],
    ) -> None:
        """max_priority: the most that a request of a CURVE key gets; asked for each request, on the threads."""
        self._core = core
        self._framing = framing
        self._max_priority = max_priority
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="prepare")
        self._lock = threading.Lock()
        self._waiting: FairQueue[_Job] = FairQueue()
        self._waiting_bytes = 0
        self._at_work: set[str] = set()  # clients
        self._idle_threads = num_threads

    def submit(self, request: PublicRequest, frames: tuple[bytes, bytes], sink: PieceSink, done: "Done") -> None:
        """`done` is called on one of the threads, and later `sink`, with the samples' pieces, on the receiving thread
        of the engine's client. Raises OverloadedError when too much waits already.
        """
        with self._lock:
            num_bytes = len(frames[1])
            if self._waiting_bytes + num_bytes > MAX_WAITING_BYTES:
                raise OverloadedError(
                    f"{self._waiting_bytes} bytes of requests wait to be tokenized, the limit is {MAX_WAITING_BYTES}:"
                    " try again later",
                    RETRY_AFTER_S,
                )
            self._waiting_bytes += num_bytes
            self._waiting.push(request.client, _Job(request, frames, sink, done))
            self._start_next()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start_next(self) -> None:
        """With the lock: gives work to idle threads."""
        while self._idle_threads and (job := self._waiting.pop(lambda client, _: client not in self._at_work)):
            self._idle_threads -= 1
            self._at_work.add(job.request.client)
            self._pool.submit(self._work, job)

    def _work(self, job: "_Job") -> None:
        try:
            result: Prepared | Exception = self.prepare(job.request, job.frames, job.sink)
        except Exception as error:  # whatever one request does to us, the others go on
            result = error
        with self._lock:
            self._idle_threads += 1
            self._waiting_bytes -= len(job.frames[1])
            self._at_work.discard(job.request.client)
            self._start_next()
        job.done(job.request, result)
        del result  # the traceback of an exception holds this frame: no cycle for the collector

    def prepare(self, request: PublicRequest, frames: tuple[bytes, bytes], sink: PieceSink) -> Prepared:
        """Raises FrameError or InvalidRequestError for what cannot be served."""
        message = self._framing.decode(frames)
        assert isinstance(message, Generate), "only generate is prepared"
        check_routed(message, request.session.routes)
        token_ids, tail = self._prompt_ids(message)
        sampling = message.sampling if request.session.is_trusted else self._capped(message, request.session.key)
        if message.prompt_only:
            self._core.check_prompt(token_ids)
            opened = []
        else:
            check_frame(message, len(token_ids))
            opened = self._open(request, message, token_ids, sampling, sink)
        deadline_ms = sampling.deadline_ms
        arrived_s = opened[0].submit.arrived_s if opened else request.arrived_s
        return Prepared(
            opened=opened,
            num_prompt_tokens=len(token_ids),
            prompt_ids=token_ids if message.echo_ids else None,
            prompt_text=self._core.tokenizer.decode(token_ids, False) if message.echo_text else None,
            priority=sampling.priority,
            deadline_s=None if deadline_ms is None else arrived_s + deadline_ms / 1000,
            stream=message.stream,
            tail=tail,
            arrived_s=arrived_s,
            is_routed=message.routed is not None,
        )

    def _open(
        self, request: PublicRequest, message: Generate, token_ids: list[int], sampling: Sampling, sink: PieceSink
    ) -> list[OpenRequest]:
        parameters = sampling_params(sampling, request.session.cache_key)
        deliver = functools.partial(sink, request)
        if message.routed is None:
            return self._core.prepare(
                token_ids,
                parameters,
                deliver,
                request.arrived_s,
                request.client,
                frozenset(message.marked_ids),
                request.log_id,
            )
        arrived_s = request.arrived_s - message.routed.age_ms / 1000
        tell = _deaths_to(sink, request)
        known = request.client, request.log_id, message.routed
        return [self._core.prepare_routed(token_ids, parameters, deliver, arrived_s, *known, tell)]

    def _capped(self, message: Generate, key: str) -> Sampling:
        """Asking for more than the operator grants is no error: a client need not know its cap."""
        priority = min(message.sampling.priority, self._max_priority(key))
        return msgspec.structs.replace(message.sampling, priority=priority)

    def _prompt_ids(self, message: Generate) -> tuple[list[int], str]:
        """(the prompt, as much of the end of its text as is asked for)."""
        given = [
            name for name in ("text", "messages", "prompt_ids", "prompt_u32") if getattr(message, name) is not None
        ]
        if len(given) != 1:
            raise InvalidRequestError(
                f"the prompt is given as {' and '.join(given) or 'nothing'}: give one of text, messages, prompt_ids and"
                " prompt_u32"
            )
        if not message.special_tokens and message.text is None:
            raise InvalidRequestError("special_tokens is false: give the prompt as text, or leave special_tokens out")
        further = [name for name in OF_CHATS if getattr(message, name) is not None]
        if further and message.messages is None:
            raise InvalidRequestError(f"{' and '.join(further)} belong to a chat: give messages, or leave them out")
        if message.prompt_ids is not None:
            return message.prompt_ids, ""
        if message.prompt_u32 is not None:
            return unpack_prompt(message.prompt_u32), ""
        if message.text is not None:
            self._check_text([message.text], message.prompt_only)
            if not message.special_tokens:
                return self._core.tokenizer.encode_bare(message.text), ""
            return list(self._core.token_ids([message.text])[0]), ""
        messages = [_given_keys(one) for one in message.messages or []]
        chat = one_prompt(Chat(messages, message.tools, message.documents, message.chat_template_kwargs))
        assert isinstance(chat, Chat)
        self._check_text(_texts_of(chat), message.prompt_only)
        tokenizer = self._core.tokenizer
        text = tokenizer.render_chat(chat.messages, chat.tools, chat.documents, chat.chat_template_kwargs)
        return tokenizer.encode_bare(text), text[max(0, len(text) - message.tail_len) :]

    def _check_text(self, texts: Sequence[str], prompt_only: bool) -> None:
        """Before any work is put into it."""
        limit = text_bytes_limit(self._core.launch.max_model_len)
        num_bytes = sum(len(text.encode(errors="surrogatepass")) for text in texts)
        if num_bytes > limit:
            message = f"the prompt has {num_bytes} bytes of text, the limit is {limit}: shorten it"
            raise FrameError(make_error("too_large", message))
        context_len = self._core.launch.max_model_len
        most_tokens = self._core.most_told if prompt_only else context_len
        if num_bytes > USUAL_BYTES_PER_TOKEN * most_tokens:
            reason = f"at most {most_tokens} are told of one: split it"
            self._refuse_more_tokens(
                texts, most_tokens, reason if prompt_only else f"max_model_len is {context_len}: shorten it"
            )

    def _refuse_more_tokens(self, texts: Sequence[str], limit: int, reason: str) -> None:
        """A text that hardly fits is counted in pieces first, which ends with the piece that is too much: at once its
        tokens would take 200 bytes each, a megabyte of text 200 MiB."""
        if not self._core.has_tokenizer:
            return
        tokenizer, num_tokens = self._core.tokenizer, 0
        for text in texts:
            for start in range(0, len(text), PIECE_LEN):
                piece = tokenizer.encode(text[start : start + PIECE_LEN])
                num_tokens += max(0, len(piece) - TOKENS_OF_A_CUT)
                if num_tokens > limit:
                    raise PromptTooLongError(f"the prompt has more than {limit} tokens, {reason}")


Done = Callable[[PublicRequest, Prepared | Exception], None]


@dataclasses.dataclass(frozen=True)
class _Job:
    request: PublicRequest
    frames: tuple[bytes, bytes]
    sink: PieceSink
    done: Done


def _given_keys(message: ChatMessage) -> dict[str, Any]:
    return {name: value for name, value in msgspec.structs.asdict(message).items() if value is not None}


def _texts_of(chat: Chat) -> list[str]:
    """What a template may write: contents, and all else as JSON."""
    texts = [message["content"] for message in chat.messages]
    further = [{**message, "role": "", "content": ""} for message in chat.messages if len(message) > 2]
    for values in (further, chat.tools, chat.documents, chat.chat_template_kwargs):
        if values:
            texts.append(msgspec.json.encode(values).decode())
    return texts


def _deaths_to(sink: PieceSink, request: PublicRequest) -> Callable[[int], None]:
    return lambda num_deaths: sink(request, Deaths(num_deaths))


def check_routed(message: Generate, may_route: bool) -> None:
    """Raises FrameError for who may not route requests of others, InvalidRequestError for what makes no sense then."""
    if message.routed is None:
        return
    if not may_route:
        text = "this connection routes no requests of others: leave routed out"
        raise FrameError(make_error("forbidden", text, message.id, "generate"))
    sampling = message.sampling
    has_ids = message.prompt_u32 is not None or message.prompt_ids is not None
    if not has_ids or sampling.n != 1 or sampling.stop or not message.stream or message.prompt_only:
        raise InvalidRequestError(
            "routed is of one sample of token ids that streams, without stop strings: give prompt_u32, n 1 and no stop,"
            " and leave prompt_only out"
        )


def check_frame(message: Generate, num_prompt_tokens: int) -> None:
    """Log-probabilities that come in one message must fit into its frame. Raises InvalidRequestError."""
    sampling, most = message.sampling, limits.MAX_LOGPROB_ITEMS
    of_prompt = 0 if sampling.prompt_logprobs is None else num_prompt_tokens * (1 + sampling.prompt_logprobs)
    if of_prompt > most:
        raise InvalidRequestError(
            f"prompt_logprobs is {sampling.prompt_logprobs} and the prompt has {num_prompt_tokens} tokens, which makes"
            f" {of_prompt} log-probabilities, the limit is {most}: ask for less, or shorten the prompt"
        )
    if sampling.logprobs is not None and not message.stream:
        max_tokens = sampling.max_tokens or most
        if max_tokens * (1 + sampling.logprobs) > most:
            raise InvalidRequestError(
                f"logprobs is {sampling.logprobs}, max_tokens is {sampling.max_tokens} and stream is false: the limit"
                f" is {most} log-probabilities in one message: ask for less, or stream"
            )


def sampling_params(sampling: Sampling, key: str) -> SamplingParams:
    """The engine's parameters. Raises InvalidRequestError."""
    values = msgspec.structs.asdict(sampling)
    defaults = {} if values.pop("model_defaults") else msgspec.structs.asdict(SamplingDefaults())
    for name, value in values.items():
        if value is UNSET:
            values[name] = defaults.get(name)  # None: the model's
    values["cache_salt"] = cache_salt(key, sampling.cache_salt)
    values["logit_bias"] = _biases(sampling)
    values["structured"] = None if sampling.structured is None else of_wire(sampling.structured)
    return SamplingParams(**values)


def _biases(sampling: Sampling) -> dict[int, float]:
    """Raises InvalidRequestError."""
    biases: dict[int, float] = {}
    for token_id, bias in sampling.logit_bias or []:
        if token_id in biases:
            raise InvalidRequestError(f"logit_bias has token {token_id} twice: give one bias of a token")
        biases[token_id] = bias
    return biases


def unpack_prompt(packed: bytes) -> list[int]:
    """Ids of `prompt_u32`. Raises InvalidRequestError when its length is no multiple of 4, or an id is above 2^31-1."""
    if len(packed) % 4:
        raise InvalidRequestError(f"prompt_u32 has {len(packed)} bytes: give 4 for each token id, little-endian")
    token_ids: array[int] = unpack_int32(packed)
    if min(token_ids) < 0:
        raise InvalidRequestError("prompt_u32 has a token id above 2^31-1: use ids of this model's tokenizer")
    return token_ids.tolist()
