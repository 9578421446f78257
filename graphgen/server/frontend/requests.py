"""One request of a session: what its samples have given and the client has not been sent yet.

Pure: no clock, no socket, no thread. The server's loop feeds it and asks it for the next message. Unsent tokens of a
sample join into one delta, so a reader that falls behind costs memory for its tokens and not for messages.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from graphgen.calls.logprobs import Logprobs
from graphgen.calls.outputs import StreamPiece
from graphgen.ipc.ggp import messages
from graphgen.ipc.ggp.messages import Accepted, Delta, Done, Error, Mark, Timing, Usage
from graphgen.ipc.ggp.statistics import OpenRequest
from graphgen.ipc.server_messages import RequestEnded
from graphgen.server.frontend.tallies import RequestClock

if TYPE_CHECKING:
    from graphgen.server.frontend.prepare import Prepared
    from graphgen.server.frontend.sessions import Session

ABORTED = "aborted"


class Deaths(NamedTuple):
    """How many deaths of engines and workers count against a request that was routed here, since its last token."""

    num_deaths: int


class _Sample:
    """Unsent output of one sample."""

    __slots__ = (
        "cached_tokens",
        "deaths",
        "ended",
        "finish",
        "finish_sent",
        "ids",
        "logprobs",
        "marks",
        "num_tokens",
        "prompt_logprobs",
        "started",
        "texts",
    )

    def __init__(self) -> None:
        self.started = False  # it has a token
        self.cached_tokens = 0
        self.num_tokens = 0  # sent in deltas
        self.deaths = 0  # that its client is to be told
        self.ids: list[int] = []
        self.texts: list[str] = []
        self.marks: list[Mark] = []
        self.logprobs: list[Logprobs] = []  # of `ids`, where they are asked for
        self.prompt_logprobs: Logprobs | None = None
        self.finish = ""  # how it ended
        self.ended = False
        self.finish_sent = False

    @property
    def has_news(self) -> bool:
        return bool(self.ids or self.texts or self.deaths) or (self.ended and not self.finish_sent)


class PublicRequest:
    """From `generate` to its end. It is preparing until `accept` gives it its samples."""

    def __init__(
        self,
        session: "Session",
        request_id: int,
        client: str,
        num_samples: int,
        arrived_s: float,
        tenant: str = "",
        log_id: str = "",
    ) -> None:
        """client: whose share it counts to; tenant: on whose behalf it came, if it did; log_id: what logs call it."""
        self.session = session
        self.id = request_id
        self.client = client
        self.tenant = tenant
        self.log_id = log_id
        self.arrived_s = arrived_s
        self.num_samples = num_samples  # as it says; its samples are made when it is prepared
        self.prepared: Prepared | None = None
        self.submitted = False  # the scheduler has it, until it ends
        self.started = False  # the scheduler gave it a first token
        self.num_unstarted = 0  # samples without a token, once it is accepted
        self.num_merged = 0  # pieces that joined others because the reader was behind
        self.clock = RequestClock(arrived_s, 0)  # without samples until it is prepared
        self._samples: list[_Sample] = []
        self._queued_ms = 0.0
        self._first_token_ms = 0.0
        self._last_token_ms = 0.0
        self._accepted_sent = False
        self._end: Done | Error | None = None
        self._end_sent = False

    @property
    def ended(self) -> bool:
        """Nothing more is taken for it; its end may still have to be sent."""
        return self._end is not None

    @property
    def internal_ids(self) -> list[int]:
        """The scheduler's names of its samples that have not ended."""
        if self.prepared is None:
            return []
        opened = zip(self.prepared.opened, self._samples, strict=True)
        return [request.submit.request_id for request, sample in opened if not sample.ended]

    @property
    def prompt_tokens(self) -> int:
        """Counted against the client's share."""
        return 0 if self.prepared is None else self.prepared.num_prompt_tokens * len(self._samples)

    @property
    def has_failed(self) -> bool:
        return isinstance(self._end, Error)

    def accept(self, prepared: "Prepared") -> None:
        """One whose prompt was all that was wanted ends with it."""
        self.prepared = prepared
        self.arrived_s = prepared.arrived_s
        if prepared.opened:
            submit = prepared.opened[0].submit
            targets_ms = submit.ttft_target_ms, submit.itl_target_ms, submit.tpot_target_ms
            self.clock = RequestClock(self.arrived_s, len(prepared.opened), *targets_ms)
        self._samples = [_Sample() for _ in prepared.opened]
        self.num_unstarted = len(self._samples)
        if not self._samples:
            self._finish(self._done())

    def take(self, piece: StreamPiece, now_s: float) -> None:
        """What a step gave to one of the samples."""
        if self.ended or self.prepared is None:
            return
        sample = self._samples[piece.sample_index]
        self.num_unstarted -= not sample.started
        sample.started = True
        if sample.has_news and self.prepared.stream:
            self.num_merged += 1
        sample.deaths = 0  # they count since the last token
        sample.ids.extend(piece.token_ids)
        if piece.text:
            sample.texts.append(piece.text)
        sample.marks += [Mark(id=mark.token_id, start=mark.start, end=mark.end) for mark in piece.marks]
        if piece.logprobs is not None:
            sample.logprobs.append(piece.logprobs)
        if piece.prompt_logprobs is not None:
            sample.prompt_logprobs = piece.prompt_logprobs
        self._last_token_ms = (now_s - self.arrived_s) * 1000
        if not self.started:
            self.started = True
            self._first_token_ms = self._last_token_ms
            started_s = self.prepared.opened[piece.sample_index].started_s
            self._queued_ms = max(0.0, started_s - self.arrived_s) * 1000
        sample.cached_tokens = piece.cached_tokens
        if piece.finish_reason is not None:
            sample.ended, sample.finish = True, piece.finish_reason
            if all(one.ended for one in self._samples):
                self._finish(self._done())

    def take_deaths(self, deaths: Deaths) -> None:
        """An engine or a worker ended that computed it; of a request that was routed here, which has one sample."""
        if not self.ended and self._samples:
            self._samples[0].deaths = deaths.num_deaths

    def cancel(self) -> None:
        """Its client wants no more: samples that have not ended are aborted."""
        if self.ended:
            return
        for sample in self._samples:
            if not sample.ended:
                sample.ended, sample.finish = True, ABORTED
        self._finish(self._done())

    def fail(self, error: Error) -> None:
        """Ends it with an error, behind the tokens it has already given."""
        if self.ended:
            return
        for sample in self._samples:
            if not sample.ended:
                sample.ended = sample.finish_sent = True  # the error says it
        self._finish(error)

    def _finish(self, end: Done | Error) -> None:
        """Lets go of the engine's requests, whose sinks hold this one: prompts should not wait for the collector."""
        self._end = end
        if self.prepared is not None:
            self.prepared.opened.clear()

    def describe(self, now_s: float) -> OpenRequest:
        """What who watches the engine may know of it while it is open."""
        prepared = self.prepared
        samples = [] if prepared is None else prepared.opened
        state = "held" if not self.submitted else "running" if self.started else "waiting"
        return OpenRequest(
            age_ms=round((now_s - self.arrived_s) * 1000, 1),
            priority=0 if prepared is None else prepared.priority,
            prompt_tokens=0 if prepared is None else prepared.num_prompt_tokens,
            cached_tokens=self._samples[0].cached_tokens if self._samples else 0,
            output_tokens=sum(self.clock.num_tokens),
            max_tokens=sum(one.submit.max_tokens for one in samples),
            itl_target_ms=None if self.clock.itl_target_s is None else round(self.clock.itl_target_s * 1000, 3),
            state=state,
        )

    def report(self, now_s: float) -> RequestEnded:
        """What an operator is told of it, now that it has ended."""
        done = self._done()
        return RequestEnded(
            request_id=self.id,
            key=self.session.key,
            address=self.tenant or self.session.address,
            prompt_tokens=done.usage.prompt_tokens,
            cached_tokens=done.usage.cached_tokens,
            output_tokens=done.usage.output_tokens,
            finish=(self._end.code,) if isinstance(self._end, Error) else tuple(done.finish),
            first_token_ms=done.timing.first_token_ms,
            total_ms=round((now_s - self.arrived_s) * 1000, 3),
            log_id=self.log_id,
        )

    def peek(self) -> Accepted | Delta | Done | Error | None:
        """The message to send next, or None while there is nothing to say."""
        if self.prepared is not None and not self._accepted_sent:
            return Accepted(
                id=self.id,
                prompt_tokens=self.prepared.num_prompt_tokens,
                prompt_ids=self.prepared.prompt_ids,
                prompt_text=self.prepared.prompt_text,
                tail=self.prepared.tail,
            )
        return next(self.deltas(), None) or (None if self._end_sent else self._end)

    def deltas(self) -> Iterator[Delta]:
        """Those that may be sent next, one of a sample, once it is accepted."""
        if self.prepared is not None and self._accepted_sent and (self.prepared.stream or self.ended):
            for index, sample in enumerate(self._samples):
                if sample.has_news:
                    yield self._delta(index, sample)

    def sent(self, message: Accepted | Delta | Done | Error) -> None:
        """The message that `peek` gave has left."""
        match message:
            case Accepted():
                self._accepted_sent = True
            case Delta():
                sample = self._samples[message.sample]
                sample.num_tokens += len(sample.ids)
                sample.ids, sample.texts, sample.marks = [], [], []
                sample.logprobs, sample.prompt_logprobs = [], None
                sample.deaths = 0
                sample.finish_sent = sample.finish_sent or message.finish is not None
            case Done() | Error():
                self._end_sent = True

    def _delta(self, index: int, sample: _Sample) -> Delta:
        assert self.prepared is not None, "what is not accepted has no deltas"
        return Delta(
            id=self.id,
            seq=sample.num_tokens,
            sample=index,
            ids=sample.ids,
            text="".join(sample.texts),
            finish=sample.finish if sample.ended and not sample.finish_sent else None,
            cached_tokens=0 if sample.num_tokens else sample.cached_tokens,
            marks=sample.marks,
            logprobs=_of_output(sample.logprobs),
            prompt_logprobs=None if sample.prompt_logprobs is None else _of_prompt(sample.prompt_logprobs),
            queued_ms=round(self._queued_ms, 3) if self.prepared.is_routed and not sample.num_tokens else 0.0,
            deaths=sample.deaths,
        )

    def _done(self) -> Done:
        num_prompt_tokens = 0 if self.prepared is None else self.prepared.num_prompt_tokens
        return Done(
            id=self.id,
            finish=[ABORTED] * self.num_samples if self.prepared is None else [one.finish for one in self._samples],
            usage=Usage(
                prompt_tokens=num_prompt_tokens,
                output_tokens=sum(sample.num_tokens + len(sample.ids) for sample in self._samples),
                cached_tokens=self._samples[0].cached_tokens if self._samples else 0,
            ),
            timing=Timing(
                queued_ms=round(self._queued_ms, 3),
                first_token_ms=round(self._first_token_ms, 3),
                total_ms=round(self._last_token_ms, 3),
            ),
        )


def _of_output(parts: list[Logprobs]) -> messages.Logprobs | None:
    """What the protocol says of tokens that are a delta's."""
    if not parts:
        return None
    values, tokens = b"".join(part.values for part in parts), [token for part in parts for token in part.tokens]
    return messages.Logprobs(top=parts[0].num_top, values=values, tokens=tokens)


def _of_prompt(found: Logprobs) -> messages.Logprobs:
    return messages.Logprobs(
        top=found.num_top,
        values=found.values,
        tokens=list(found.tokens),
        ids=list(found.token_ids),
        before=found.before,
    )
