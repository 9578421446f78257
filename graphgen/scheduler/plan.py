"""A step plan under construction, and the record of it that is kept until its tokens arrive.

Owns the layout of a plan (order of rows, packing), never the choice of what goes into it. Called by
`graphgen.scheduler.policy` and its parts.
"""

from array import array
from collections.abc import Iterable
from typing import NamedTuple

from msgspec import Struct

from graphgen.ipc.attended import Attended
from graphgen.ipc.codec import pack_int32
from graphgen.ipc.worker_messages import Bucket, Chunk, StepPlan
from graphgen.scheduler.decodes import DecodeSet
from graphgen.scheduler.request import Request, RunningRequest


class ChunkRecord(NamedTuple):
    """Tokens [start, start + length) of one request."""

    request: Request
    start: int
    length: int


class ScoredRecord(NamedTuple):
    """Rows [start, start + length) of one request's prompt, each asked what it says of the next token."""

    request: Request
    start: int
    length: int


class StepRecord(NamedTuple):
    """What a plan in flight did. Its result finds its requests here: slots may have new owners by then."""

    step_id: int
    bucket: Bucket
    """The one that was chosen: how long the step may take."""
    rows: Bucket
    """What the device runs: the same, or only the rows that hold a token."""
    chunks: list[ChunkRecord]
    decodes: list[Request]
    drawing: list[Request]
    """The requests that get a token, in the order of the step result."""
    constrained: list[Request]
    """Of these, the ones that follow a grammar."""
    scored: list[ScoredRecord]
    """Likewise those that get log-probabilities of their prompts."""
    planned_s: float
    num_padding_rows: int
    """Rows of the step that hold no token."""
    attended: Attended
    """What its rows attend to."""

    @property
    def requests(self) -> list[Request]:
        """Those that have rows in it."""
        return [chunk.request for chunk in self.chunks] + self.decodes


class StepDescription(Struct, frozen=True):
    """A plan in terms of requests, for the step log."""

    step_id: int
    bucket: Bucket
    chunks: tuple[tuple[int, int, int], ...]  # request id, start, length
    decode_request_ids: tuple[int, ...]
    padding_rows: int
    planned_s: float

    @classmethod
    def of(cls, record: StepRecord) -> "StepDescription":
        return cls(
            step_id=record.step_id,
            bucket=record.rows,
            chunks=tuple((chunk.request.request_id, chunk.start, chunk.length) for chunk in record.chunks),
            decode_request_ids=tuple(request.request_id for request in record.decodes),
            padding_rows=record.num_padding_rows,
            planned_s=record.planned_s,
        )


class PlanDraft:
    """Rows and pages of one step while the policy picks them.

    Adding a chunk advances its request (`num_prefilled`), so a chunk that was added stays.
    """

    def __init__(self) -> None:
        self.num_chunk_tokens = 0
        self.prompts: list[RunningRequest] = []
        """Requests that have a chunk in it."""
        self.drawing: list[RunningRequest] = []
        """Requests whose chunk reaches the last token they know, and draws the next."""
        self._chunks: list[Chunk] = []
        self._chunk_records: list[ChunkRecord] = []
        self._chunk_token_ids = array("i")
        self._scored_rows = array("i")
        self._scored: list[ScoredRecord] = []
        self._attended = Attended()
        self._decodes: list[Request] = []
        self._constrained_decodes: list[Request] = []
        self._decode_slots = b""
        self._decode_positions = b""
        self._redrawn = array("i")
        self._new_pages: list[int] = []
        self._page_copies: list[int] = []
        self.grown: list[RunningRequest] = []
        """Decodes that get a page in it."""
        self.ending: list[RunningRequest] = []
        """Decodes whose last row is in it; known when it is made."""
        self.held: list[int] = []
        """Pages that the plan copies and that would else be handed out while it is made."""

    @property
    def num_chunks(self) -> int:
        return len(self._chunks)

    @property
    def num_decodes(self) -> int:
        return len(self._decodes)

    def send_pages(self, running: RunningRequest) -> None:
        """Tells the worker those entries of the request's block tables that it does not know."""
        slot, new_pages = running.slot, self._new_pages
        for group, table in enumerate(running.tables):
            sent, end = table.num_sent, table.end
            if sent < end:
                for index, page in enumerate(table.part(sent, end), sent):
                    new_pages += (group, slot, index, page)
                table.num_sent = end

    def copy_page(self, source: int, destination: int) -> None:
        """`destination` gets what `source` holds, before the step writes anything."""
        self._page_copies += (source, destination)

    def set_decodes(
        self, decodes: DecodeSet, constrained: Iterable[RunningRequest], redrawn: Iterable[RunningRequest]
    ) -> None:
        """One row for each: the slot's last token, at the next position. constrained: those that follow a grammar.
        redrawn: of these, those whose last known token it is instead."""
        self._constrained_decodes = [running.request for running in constrained]
        self._decode_slots, self._decode_positions, self._decodes = decodes.rows()
        self._attended = self._attended._replace(decode_positions=decodes.num_positions)
        for running in redrawn:
            tokens, position = running.request.tokens, decodes.position(running)
            self._redrawn.extend((running.slot, *tokens.part(position, position + 1)))
            self._redrawn.append(position >= running.request.prompt_len)

    def add_chunk(self, running: RunningRequest, length: int) -> None:
        """The next `length` known tokens. Only the chunk that reaches the last of them draws a token."""
        request, start = running.request, running.num_prefilled
        end = start + length
        draws = end == running.prefill_end
        init = None if running.is_announced else request.init_slot()
        running.is_announced = True
        self.send_pages(running)
        self.prompts.append(running)
        self._chunks.append(Chunk(slot=running.slot, start=start, length=length, draws=draws, init=init))
        self._chunk_records.append(ChunkRecord(request, start, length))
        if request.is_scored:
            self._score(request, start, end)
        self._chunk_token_ids += request.tokens.part(start, end)
        self._attended = self._attended.with_chunk(start, length)
        self.num_chunk_tokens += length
        running.num_prefilled = end
        if draws:
            self.drawing.append(running)

    def _score(self, request: Request, start: int, end: int) -> None:
        """The rows of its next chunk whose log-probabilities have not arrived and that have a next token in the prompt.

        Those in flight are asked again if the request was preempted meanwhile: what comes twice is told by its place.
        """
        first, last = max(start, request.num_scored), min(end, request.prompt_len - 1)
        if first >= last or request.prompt_logprobs is None:
            return
        asked, first_row = 1 + request.prompt_logprobs, self.num_chunk_tokens + first - start
        for row, token_id in enumerate(request.tokens.part(first + 1, last + 1), first_row):
            self._scored_rows.extend((row, token_id, asked))
        self._scored.append(ScoredRecord(request, first, last - first))

    def build(self, step_id: int, bucket: Bucket, pads: bool, now_s: float) -> tuple[StepPlan, StepRecord]:
        """The message to the worker, and the record that its result is matched with. pads: see SchedulerLimits."""
        num_decodes = len(self._decodes)
        drawing = [running.request for running in self.drawing]
        rows = bucket if pads else Bucket(self.num_chunk_tokens, num_decodes)
        plan = StepPlan(
            step_id=step_id,
            bucket=rows,
            chunks=tuple(self._chunks),
            chunk_token_ids=pack_int32(self._chunk_token_ids),
            decode_slots=self._decode_slots,
            decode_positions=self._decode_positions,
            redrawn=pack_int32(self._redrawn),
            new_pages=pack_int32(self._new_pages),
            page_copies=pack_int32(self._page_copies),
            scored_rows=pack_int32(self._scored_rows),
            planned_s=now_s,
        )
        return plan, StepRecord(
            step_id=step_id,
            bucket=bucket,
            rows=rows,
            chunks=self._chunk_records,
            decodes=self._decodes,
            drawing=drawing + self._decodes,
            scored=self._scored,
            constrained=[request for request in drawing if request.is_constrained] + self._constrained_decodes,
            planned_s=now_s,
            num_padding_rows=rows.num_rows - self.num_chunk_tokens - num_decodes,
            attended=self._attended,
        )
