"""One request on the user's side, from its submission to its output.

Owns its text, its tokens and its times. Does no I/O and knows no thread: `graphgen.requests.link` feeds it what the
scheduler sends and passes on what it returns.
"""

from collections.abc import Callable, Sequence

from graphgen.calls.outputs import Delivery, RequestOutput, Sink, StreamPiece, Timing
from graphgen.calls.sampling_params import SamplingParams
from graphgen.ipc.messages import FinishReason, Submit, TokenOutput
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
    ) -> None:
        self.submit = submit  # the message that opens the request
        self.sink = sink
        self.started_s = submit.arrived_s  # when its first chunk was planned, once its first token is here
        self._cached_tokens = 0  # of its prompt, found in the prefix cache: from then on as well
        self._prompt_token_ids = tuple(prompt_token_ids)
        self._sample_index = sample_index
        self._min_tokens = sampling.min_tokens
        self._streams = streams
        self._decode = _decoder(tokenizer, sampling.skip_special_tokens)
        self._stops = StopFinder(sampling.stop_strings) if sampling.stop_strings else None
        # Without a reader on the way and without stop strings the text is decoded once, at the end.
        self._detokenizer = (
            Detokenizer(self._decode, frozenset() if tokenizer is None else tokenizer.byte_token_ids)
            if streams or self._stops
            else None
        )
        self._token_ids: list[int] = []
        self._token_times_s: list[float] = []
        self._text: list[str] = []

    def hear(self, output: TokenOutput) -> None:
        """What the scheduler says of the request besides its tokens, which `take` gets after that."""
        self.started_s, self._cached_tokens = output.started_s, output.cached_tokens

    def take(
        self, new_token_ids: Sequence[int], reason: FinishReason | None, now_s: float
    ) -> tuple[Delivery | None, FinishReason | None]:
        """New tokens, and why the scheduler ended the request if it has: (what its sink gets now, how it ended).

        A stop string may end it before the scheduler does; tokens after the one that completed it are dropped.
        """
        token_ids: list[int] = []
        pieces: list[str] = []
        for token_id in new_token_ids:
            token_ids.append(token_id)
            text, stopped = self._add_token(token_id)
            pieces.append(text)
            if stopped:
                reason = "stop"
                break
        else:
            stopped = False
        self._token_times_s.extend([now_s - self.submit.arrived_s] * len(token_ids))
        if reason is not None and not stopped:
            pieces.append(self._finish_text())
        if self._detokenizer is not None:
            self._text.extend(pieces)
        if self._streams:
            text = "".join(pieces)
            prompt = self._cached_tokens, self._sample_index, len(self._prompt_token_ids)
            return StreamPiece(text, tuple(token_ids), reason, *prompt), reason
        return (None if reason is None else self._output(reason, now_s)), reason

    def _add_token(self, token_id: int) -> tuple[str, bool]:
        """(text that became certain, whether a stop string is complete)."""
        self._token_ids.append(token_id)
        if self._detokenizer is None:
            return "", False
        piece = self._detokenizer.push(token_id)
        if self._stops is None or len(self._token_ids) < self._min_tokens:
            return piece, False
        text, stopped = self._stops.push(piece)
        if not stopped and self._detokenizer.pending:
            more, stopped = self._stops.peek(self._detokenizer.pending)
            text += more if stopped else ""
        return text, stopped

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
        )


def _decoder(tokenizer: Tokenizer | None, skip_special_tokens: bool) -> Callable[[Sequence[int]], str]:
    """A model without a tokenizer has no text."""
    if tokenizer is None:
        return lambda token_ids: ""
    return lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens)
