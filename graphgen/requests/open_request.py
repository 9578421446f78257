"""One request on the user's side, from its submission to its output.

Owns its text, its tokens and its times. Does no I/O and knows no thread: `graphgen.requests.request_table` feeds it
what the scheduler sends and passes on what it returns.
"""

from collections.abc import Callable, Sequence

from msgspec import structs

from graphgen.calls.logprobs import Logprobs, join, pack
from graphgen.calls.outputs import Delivery, Mark, RequestOutput, Sink, StreamPiece, Timing
from graphgen.calls.sampling_params import SamplingParams
from graphgen.ipc.codec import pack_int32, unpack_int32
from graphgen.ipc.engine_messages import FinishReason, Submit, TokenOutput
from graphgen.ipc.step_schema import WORD_BYTES, logprob_words
from graphgen.requests.text import Detokenizer, StopFinder
from graphgen.requests.tokenizer import Tokenizer


class OpenRequest:
    """A validated request. `streams` says whether its sink gets every piece or the whole output at the end."""

    def __init__(
        self,
        submit: Submit,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        tokenizer: Tokenizer | None,
        streams: bool,
        sink: Sink,
        sample_index: int = 0,
        marked_ids: frozenset[int] = frozenset(),
        on_deaths: Callable[[int], None] | None = None,
    ) -> None:
        """marked_ids: tokens whose places in the text the pieces of a stream say. on_deaths: hears how many deaths, of
        workers and engines that computed the request, count against it, each time that there is one more.

        A request that got tokens elsewhere, as `submit` says, has no text.
        """
        self.submit = submit  # the message that opens the request
        self.sampling = sampling
        self.sink = sink
        self._on_deaths = on_deaths
        self.started_s = submit.arrived_s  # when its first chunk was planned, once its first token is here
        self._cached_tokens = 0  # of its prompt, found in the prefix cache: from then on as well
        self._prompt_token_ids = tuple(prompt_token_ids)
        self._sample_index = sample_index
        self._min_tokens = sampling.min_tokens
        self._streams = streams
        self._token_bytes = _no_bytes if tokenizer is None else tokenizer.token_bytes
        self._logprobs: list[Logprobs] = []
        self._prompt_values = b""  # of its prompt, as they come
        self._decode = _decoder(tokenizer, sampling.skip_special_tokens)
        self._stops = StopFinder(sampling.stop_strings) if sampling.stop_strings else None
        # Without a reader on the way and without stop strings the text is decoded once, at the end.
        self._detokenizer = (
            Detokenizer(self._decode, frozenset() if tokenizer is None else tokenizer.byte_token_ids)
            if streams or self._stops
            else None
        )
        self._token_ids: list[int] = unpack_int32(submit.output_token_ids).tolist()
        first_s = submit.arrived_s if submit.first_token_s is None else submit.first_token_s
        self._token_times_s: list[float] = [first_s - submit.arrived_s] * len(self._token_ids)
        self._num_deaths = submit.num_deaths  # of workers at its engine
        self._death_len = len(self._token_ids)  # the tokens that it had at the last one
        self._text: list[str] = []
        self._marked_ids = marked_ids
        self._decoded_len = 0  # of the text, what stop strings hold back or cut off included

    @property
    def prompt_len(self) -> int:
        """Tokens of its prompt."""
        return len(self._prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of its output that it has."""
        return len(self._token_times_s)

    @property
    def cached_tokens(self) -> int:
        """Of its prompt, found in the prefix cache; 0 before its first token."""
        return self._cached_tokens

    @property
    def awaits_first_token(self) -> bool:
        """Whether it has no token so far."""
        return not self._token_times_s

    def hear(self, output: TokenOutput) -> None:
        """What the scheduler says of the request besides its tokens, which `take` gets after that."""
        if self.awaits_first_token or not self.submit.num_moves:  # a later engine says nothing of its beginning
            self.started_s, self._cached_tokens = output.started_s, output.cached_tokens
        self._prompt_values += output.prompt_logprobs

    def hear_deaths(self, num_deaths: int) -> None:
        """So many workers of its engine died while they computed it, since its last new token."""
        self._num_deaths, self._death_len = num_deaths, self.num_tokens
        if self._on_deaths is not None:
            self._on_deaths(num_deaths)

    def move(self, num_losses: int) -> None:
        """Its engine does not go on with it: from now on `submit` opens it at another one, behind the tokens it has.

        num_losses: of engines that had it, since its last new token. The deaths of workers go along as well.
        """
        num_deaths = num_losses + (self._num_deaths if self.num_tokens == self._death_len else 0)
        if self._on_deaths is not None:
            self._on_deaths(num_deaths)
        if self.awaits_first_token:
            self._prompt_values = b""
        self.submit = structs.replace(
            self.submit,
            num_moves=self.submit.num_moves + 1,
            output_token_ids=pack_int32(self._token_ids),
            first_token_s=None if self.awaits_first_token else self.submit.arrived_s + self._token_times_s[0],
            num_deaths=num_deaths,
        )

    def take(
        self, new_token_ids: Sequence[int], reason: FinishReason | None, now_s: float, logprobs: bytes = b""
    ) -> tuple[Delivery | None, FinishReason | None]:
        """New tokens, and why the scheduler ended the request if it has: (what its sink gets now, how it ended).

        logprobs: of the tokens, if it asks for them, as the scheduler sends them. A stop string may end it before the
        scheduler does; tokens after the one that completed it are dropped.
        """
        token_ids: list[int] = []
        pieces: list[str] = []
        marks: list[Mark] = []
        for token_id in new_token_ids:
            token_ids.append(token_id)
            text, stopped = self._add_token(token_id, marks)
            pieces.append(text)
            if stopped:
                reason = "stop"
                break
        else:
            stopped = False
        is_first = not self._token_times_s
        found = None if self.submit.logprobs is None else self._logprobs_of(tuple(token_ids), logprobs)
        self._token_times_s.extend([now_s - self.submit.arrived_s] * len(token_ids))
        if reason is not None and not stopped:
            pieces.append(self._finish_text())
        if self._detokenizer is not None:
            self._text.extend(pieces)
        if self._streams:
            text = "".join(pieces)
            prompt = self._cached_tokens, self._sample_index, len(self._prompt_token_ids)
            of_prompt = self._prompt_logprobs() if is_first else None
            return StreamPiece(text, tuple(token_ids), reason, *prompt, found, of_prompt, tuple(marks)), reason
        if found is not None:
            self._logprobs.append(found)
        return (None if reason is None else self._output(reason, now_s)), reason

    def _logprobs_of(self, token_ids: tuple[int, ...], values: bytes) -> Logprobs:
        """values: of these tokens, and perhaps of later ones that a stop string took away."""
        num_top = self.submit.logprobs or 0
        num_bytes = len(token_ids) * WORD_BYTES * logprob_words(num_top)
        return pack(num_top, token_ids, values[:num_bytes], self._token_bytes)

    def _prompt_logprobs(self) -> Logprobs | None:
        if self.submit.prompt_logprobs is None:
            return None
        first, *others = self._prompt_token_ids
        values, self._prompt_values = self._prompt_values, b""
        return pack(self.submit.prompt_logprobs, tuple(others), values, self._token_bytes, self._token_bytes(first))

    def _add_token(self, token_id: int, marks: list[Mark]) -> tuple[str, bool]:
        """(text that became certain, whether a stop string is complete). The token's mark, if it has one, is added."""
        self._token_ids.append(token_id)
        if self._detokenizer is None:
            return "", False
        piece = self._detokenizer.push(token_id)
        self._decoded_len += len(piece)
        if token_id in self._marked_ids:
            marks.append(self._mark(token_id, piece))
        if self._stops is None or len(self._token_ids) < self._min_tokens:
            return piece, False
        text, stopped = self._stops.push(piece)
        if not stopped and self._detokenizer.pending:
            more, stopped = self._stops.peek(self._detokenizer.pending)
            text += more if stopped else ""
        return text, stopped

    def _mark(self, token_id: int, piece: str) -> Mark:
        """Of the newest token, with which `piece` became certain: its own text is the end of it."""
        assert self._detokenizer is not None, "marks are of streams"
        own = self._decode([token_id])
        end = self._decoded_len + len(self._detokenizer.pending)
        return Mark(token_id, end - len(own) if piece.endswith(own) else end, end)

    def _finish_text(self) -> str:
        """The text still held back, when the last token has come and no stop string was found."""
        if self._detokenizer is None:
            return ""
        rest = self._detokenizer.finish()
        return rest if self._stops is None else self._stops.push(rest)[0] + self._stops.finish()

    def _output(self, reason: FinishReason, now_s: float) -> RequestOutput:
        times = tuple(self._token_times_s)
        return RequestOutput(
            request_id=self.submit.request_id,
            prompt_token_ids=self._prompt_token_ids,
            token_ids=tuple(self._token_ids),
            text=self._decode(self._token_ids) if self._detokenizer is None else "".join(self._text),
            finish_reason=reason,
            timing=Timing(
                queued_s=max(0.0, self.started_s - self.submit.arrived_s),
                first_token_s=times[0] if times else 0.0,
                total_s=now_s - self.submit.arrived_s,
                token_times_s=times,
            ),
            cached_tokens=self._cached_tokens,
            sample_index=self._sample_index,
            logprobs=join(self._logprobs),
            prompt_logprobs=self._prompt_logprobs(),
        )


def _no_bytes(token_id: int) -> bytes:
    return b""


def _decoder(tokenizer: Tokenizer | None, skip_special_tokens: bool) -> Callable[[Sequence[int]], str]:
    """A model without a tokenizer has no text."""
    if tokenizer is None:
        return lambda token_ids: ""
    return lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens)
