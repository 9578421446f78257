"""What a step gives: the words of its drawing rows, on the device and on their way to the scheduler.

Owns their layout and the ring that lets a step's outputs stay on the device while later steps run; which fields there
are says `graphgen.ipc.step_schema`. A step writes all drawing rows of its shape; the plan says which of them are live.
Called by runner.py and process.py.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from msgspec import Struct
from torch import Tensor

from graphgen.capture.buffers import BlockLayout, Field, Words
from graphgen.capture.stream import DeviceStream, Mark
from graphgen.ipc.step_schema import LOGPROBS, OUTPUT_FIELDS, OutputField, StepShape
from graphgen.ipc.worker_messages import MAX_LOGPROBS, DrawnRows, StepPlan
from graphgen.models.sampling import NO_TOKEN

OUTPUT_RING = 4
"""Steps whose outputs are kept: two in flight, and two that may still be on their way to the host."""

LAYOUTS_KEPT = 256
"""Layouts of input blocks and of outputs: more than a ladder has buckets."""


def output_layout(step: StepShape, fields: Sequence[OutputField] = OUTPUT_FIELDS) -> BlockLayout:
    """The outputs of one shape: field after field, each the words of all drawing rows; log-probabilities last."""
    return BlockLayout([Field(field.name, step.num_drawing_rows * field.words) for field in (*fields, LOGPROBS)])


class StepOutputs(Struct, frozen=True):
    """The outputs of one step, on the host."""

    columns: Mapping[str, npt.NDArray[np.int32]]  # by field, [all drawing rows of the step's shape, words of a row]
    live_rows: Words  # those of the plan, in the order of the step result
    asked: Words | None = None  # of these what each is asked for, see `pack_logprobs`; None: none is asked

    @property
    def token_ids(self) -> Sequence[int]:
        """Of the plan's drawing rows; NO_TOKEN where nothing could be drawn."""
        found: list[int] = self.columns["token_ids"][self.live_rows, 0].tolist()
        return found

    def read(self, kind: type[DrawnRows] = DrawnRows) -> tuple[DrawnRows, tuple[int, ...]]:
        """What the plan's drawing rows got, and the places among them for which nothing could be drawn.

        kind: has an attribute for every field.
        """
        columns = {name: words[self.live_rows] for name, words in self.columns.items() if name != LOGPROBS.name}
        token_ids = columns["token_ids"]
        failed: list[int] = np.flatnonzero(token_ids == NO_TOKEN).tolist()
        columns["token_ids"] = np.maximum(token_ids, 0)
        packed = {name: words.astype("<i4", copy=False).tobytes() for name, words in columns.items()}
        return kind(**packed), tuple(failed)

    def logprobs(self) -> bytes:
        """Those of the live rows that are asked for them."""
        return b"" if self.asked is None else pack_logprobs(self.columns[LOGPROBS.name][self.live_rows], self.asked)


class OutputRing:
    """The outputs of the newest steps: OUTPUT_RING rows on the device, and as many on the host."""

    def __init__(self, widest: StepShape, device: torch.device, fields: Sequence[OutputField] = OUTPUT_FIELDS) -> None:
        """widest: no step has more drawing rows."""
        num_words = output_layout(widest, fields).num_words
        self._fields = fields
        self._layout_of = lru_cache(LAYOUTS_KEPT)(lambda step: output_layout(step, fields))
        self._on_device = torch.zeros(OUTPUT_RING, num_words, dtype=torch.int32, device=device)
        self._on_host = torch.zeros(OUTPUT_RING, num_words, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._next = 0

    def next_row(self) -> int:
        """The row of the step that is launched next."""
        row, self._next = self._next, (self._next + 1) % OUTPUT_RING
        return row

    def views(self, step: StepShape) -> dict[str, Tensor]:
        """Where a step of this shape writes each field: [OUTPUT_RING, drawing rows * words of a row] on the device."""
        return self._layout_of(step).views(self._on_device)

    def fetch(
        self, row: int, step: StepShape, live_rows: Words, stream: DeviceStream, asked: Words | None = None
    ) -> tuple[Mark, StepOutputs]:
        """Copies a step's outputs to the host, beside what runs after it; they are there when the mark is reached.

        asked: see StepOutputs; None leaves log-probabilities on the device.
        """
        layout = self._layout_of(step)
        end = layout.offset(LOGPROBS.name) if asked is None else layout.num_words
        fetched = stream.fetch(self._on_device[row, :end], self._on_host[row, :end])
        views = layout.host_views(self._on_host[row].numpy())
        columns = {field.name: views[field.name].reshape(-1, field.words) for field in (*self._fields, LOGPROBS)}
        return fetched, StepOutputs(columns, live_rows, asked)


_PLACES = np.concatenate(([-1, -1], np.arange(MAX_LOGPROBS), np.arange(MAX_LOGPROBS)))
"""Of each word of a row, which of the likeliest tokens it is about."""


def pack_logprobs(words: npt.NDArray[np.int32], asked: Words) -> bytes:
    """`step_schema.logprob_words` of each row that is asked for some. words: [rows, LOGPROB_WORDS], as the device
    writes them. asked: [rows], 1 + the likeliest tokens, 0 for nothing."""
    return words[asked[:, None] - 1 > _PLACES].astype("<i4", copy=False).tobytes()


def live_drawing_rows(plan: StepPlan, step: StepShape) -> Words:
    """Which of the shape's drawing rows the plan asked for: of its chunk rows those that draw, then its decode rows."""
    chunks = [index for index, chunk in enumerate(plan.chunks) if chunk.draws]
    decodes = np.arange(step.num_chunks, step.num_chunks + plan.num_decodes, dtype=np.int32)
    return np.concatenate((np.asarray(chunks, np.int32), decodes))
