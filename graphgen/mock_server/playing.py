"""One request of the mock server while its answer is played: which deltas are sent when.

Owns the counts, the text and the end of one request. Never touches a socket: it hands messages to its session and says
how long to wait. Driven by server.py.
"""

import codecs
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from graphgen.ipc.ggp.codes import CODES
from graphgen.ipc.ggp.messages import Accepted, Delta, Done, Error, Generate, ServerMessage, Timing, Usage
from graphgen.mock_server.script import Drain, Echo, Fail, Finish, Gap, Hang, Raw, Restart, Say, Silence, Step, Wait

FOREVER_S = 365 * 86_400.0


class Pause(NamedTuple):
    """Go on with this request after so many seconds."""

    seconds: float


Move = Pause | Silence | Raw | Restart | Drain
"""What a request asks the server to do before it goes on."""


class Playing:
    """One open request. `moves` is its course; `abort` ends it early."""

    def __init__(self, request: Generate, prompt: str, prompt_ids: list[int], send: Callable[[ServerMessage], None]):
        self._request = request
        self._prompt = prompt
        self._prompt_ids = prompt_ids
        self._send = send
        self._began_s = time.monotonic()
        self._first_token_ms = 0.0
        self._num_tokens = 0  # of each sample, all alike
        self._text = ""
        self._unsent_ids: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.ended = False

    def moves(self, steps: tuple[Step, ...]) -> Iterator[Move]:
        """Plays the steps to the request's end, or to its output limit."""
        if not (steps and isinstance(steps[0], Fail)):
            ids = self._prompt_ids if self._request.echo_ids else None
            self._send(Accepted(id=self._request.id, prompt_tokens=len(self._prompt_ids), prompt_ids=ids))
        for step in steps:
            match step:
                case Say():
                    yield from self._say(step.pieces, step.every_ms)
                case Echo():
                    yield from self._say(_words(self._prompt), step.every_ms)
                case Wait():
                    yield Pause(step.ms / 1000)
                case Hang():
                    yield Pause(FOREVER_S)
                case Gap():
                    self._num_tokens += step.tokens
                case Finish():
                    self.finish(step.reason)
                case Fail():
                    self._fail(step)
                case Silence() | Raw() | Restart() | Drain():
                    yield step
            if self.ended:
                return
        self.finish("stop")

    def finish(self, reason: str) -> None:
        """The last delta of each sample, and `done`."""
        if self.ended:
            return
        self.ended = True
        request, num_samples = self._request, self._request.sampling.n
        seq = self._num_tokens - len(self._unsent_ids)
        for sample in range(num_samples):
            self._send(
                Delta(id=request.id, seq=seq, sample=sample, ids=self._unsent_ids, text=self._text, finish=reason)
            )
        total_ms = (time.monotonic() - self._began_s) * 1000
        self._send(
            Done(
                id=request.id,
                finish=[reason] * num_samples,
                usage=Usage(prompt_tokens=len(self._prompt_ids), output_tokens=self._num_tokens * num_samples),
                timing=Timing(queued_ms=0.0, first_token_ms=self._first_token_ms, total_ms=total_ms),
            )
        )

    def _say(self, pieces: Sequence[str], every_ms: float) -> Iterator[Move]:
        limit = self._request.sampling.max_tokens
        for piece in pieces:
            if every_ms:
                yield Pause(every_ms / 1000)
            ids = list(piece.encode())
            if limit is not None:
                ids = ids[: limit - self._num_tokens]
            self._take(ids)
            if limit is not None and self._num_tokens >= limit:
                self.finish("length")
                return

    def _take(self, ids: list[int]) -> None:
        """New tokens of every sample: sent now, or kept for the end if the request is not streamed."""
        if not self._first_token_ms:
            self._first_token_ms = (time.monotonic() - self._began_s) * 1000
        text = self._decoder.decode(bytes(ids))  # holds half a character back
        self._num_tokens += len(ids)
        if not self._request.stream:
            self._unsent_ids += ids
            self._text += text
            return
        for sample in range(self._request.sampling.n):
            self._send(Delta(id=self._request.id, seq=self._num_tokens - len(ids), sample=sample, ids=ids, text=text))

    def _fail(self, step: Fail) -> None:
        self.ended = True
        self._send(error_of(step, self._request.id))


def error_of(step: Fail, request_id: int) -> Error:
    """Also with a code that is in no table, which clients must bear."""
    info = next((info for code, info in CODES.items() if code == step.code), None)
    return Error(
        code=step.code,
        message=step.message,
        retryable=info.retryable if info else False,
        retry_after_ms=step.retry_after_ms,
        id=request_id,
        about="generate",
    )


def _words(text: str) -> list[str]:
    """`to be` as `to ` and `be`, so that the pieces joined are the text."""
    pieces = text.split(" ")
    return [piece + " " for piece in pieces[:-1]] + pieces[-1:]
