"""What a user gets back: whole outputs and pieces of a stream. Plain values; made by `requests.open_request`
and `remote.requests`, and given to sinks."""

from collections.abc import Callable

from msgspec import Struct

from graphgen.calls.logprobs import Logprobs
from graphgen.ipc.engine_messages import FinishReason
from graphgen.ipc.short import short_repr


class Timing(Struct, frozen=True):
    """Seconds since the request was made, as its program saw them."""

    queued_s: float  # until its first chunk was planned
    first_token_s: float  # until its first token arrived (TTFT); 0 if it has none
    total_s: float  # until its last token arrived
    token_times_s: tuple[float, ...]  # until each token arrived; their differences are the ITL

    def __repr__(self) -> str:
        return short_repr(self)


class RequestOutput(Struct, frozen=True):
    """One finished request."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """All tokens drawn, a stop token included; after a stop string, up to the token that completed it."""
    text: str
    """The tokenizer's decoding of token_ids, cut before a stop string."""
    finish_reason: FinishReason
    """stop: a stop token or string; length: max_tokens or the end of the context; aborted: cancelled; error."""
    timing: Timing
    cached_tokens: int = 0
    """Tokens of the prompt whose pages were found in the prefix cache: they were not computed again."""
    sample_index: int = 0
    """Which of the n outputs of its prompt this is."""
    logprobs: Logprobs | None = None
    """Of token_ids, one each; None unless SamplingParams.logprobs asks for them."""
    prompt_logprobs: Logprobs | None = None
    """Of prompt_token_ids but the first, which nothing predicts; None unless SamplingParams.prompt_logprobs asks for
    them. The first of n outputs has them alone."""

    def __repr__(self) -> str:
        return short_repr(self)


class Mark(Struct, frozen=True):
    """Where the text of a sample has a token."""

    token_id: int
    start: int
    """In characters, from the beginning of the sample's text."""
    end: int
    """Equal to start where the text leaves the token out."""


class StreamPiece(Struct, frozen=True):
    """What one token added to a stream. Joined, the texts of all pieces of a sample are its whole text."""

    text: str
    """May be empty: half a character and a possible beginning of a stop string are held back."""
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    """None until the last piece."""
    cached_tokens: int = 0
    """As in RequestOutput; the same in every piece."""
    sample_index: int = 0
    """Which of the n outputs of the prompt it belongs to."""
    prompt_tokens: int = 0
    """Length of the prompt; the same in every piece."""
    logprobs: Logprobs | None = None
    """Of token_ids, as in RequestOutput."""
    prompt_logprobs: Logprobs | None = None
    """As in RequestOutput; in the first piece of sample 0 alone."""
    marks: tuple[Mark, ...] = ()
    """Of the tokens of this piece whose places in the text were asked for. They may be ahead of the text."""
    prompt_tail: str = ""
    """The end of the rendered chat, as far as it was asked for; the same in every piece."""

    def __repr__(self) -> str:
        return short_repr(self)


class PromptTokens(Struct, frozen=True):
    """What a prompt is to the model: the answer to who asks for nothing else."""

    token_ids: tuple[int, ...]
    text: str | None
    """The text of all tokens, special ones included, where it was asked for."""

    def __repr__(self) -> str:
        return short_repr(self)


Delivery = StreamPiece | RequestOutput | PromptTokens | Exception
Sink = Callable[[Delivery], None]
"""Where a request's pieces, its output or its error go. Called on the receiving thread; must not block."""
