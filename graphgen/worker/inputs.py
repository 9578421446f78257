"""The input block of a step: what becomes of a plan on its way to the device.

Owns the layout of the block and the packing on the host; which fields there are, how long they are and what pads them
says `graphgen.ipc.step_schema`. A captured step has a bucket's rows and as many chunks and pages as any plan may bring;
a step without a graph has those of its plan. Called by runner.py.
"""

from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct

from graphgen.capture.buffers import BlockLayout, Field, Words
from graphgen.ipc.step_schema import (
    INPUT_FIELDS,
    InputField,
    Padding,
    StepBounds,
    StepShape,
    num_new_pages,
)
from graphgen.ipc.worker_messages import SlotInit, StepPlan


class RegionLengths(Struct, frozen=True):
    """What a host-planned attention kernel must know of a step, padded like the device's tables."""

    chunk_starts: Words
    chunk_kv_lens: Words
    decode_kv_lens: Words


def input_layout(step: StepShape, bounds: StepBounds, fields: Sequence[InputField] = INPUT_FIELDS) -> BlockLayout:
    """The block of one shape."""
    return BlockLayout([Field(field.name, field.length(step, bounds)) for field in fields])


class InputPacker:
    """Packs plans for every shape of step."""

    def __init__(
        self,
        bounds: StepBounds,
        pack_slot: Callable[[SlotInit], Words],
        fields: Sequence[InputField] = INPUT_FIELDS,
    ) -> None:
        """pack_slot: the words of a slot's parameters, [bounds.params_width]."""
        padding = {Padding.ZERO: 0, Padding.TRASH_SLOT: bounds.trash_slot, Padding.UNREAD: None}
        self._params_width = bounds.params_width
        self._pack_slot = pack_slot
        self._from_plan = [(one.name, one.source, padding[one.padding]) for one in fields if one.source is not None]
        self._last_name = fields[-1].name
        assert self._from_plan[-1][0] == self._last_name, "the plan tells how much of the last field is live"

    def pack(self, plan: StepPlan, layout: BlockLayout, block: Words, output_row: int) -> tuple[int, RegionLengths]:
        """Fills `block`; returns how many of its words the device needs, and the lengths attention plans with.

        Of the last field only the live part is needed. output_row: of the ring of outputs, for the step to write.
        """
        fields = layout.host_views(block)
        num_words = 0
        for name, source, padding in self._from_plan:
            field, num_words = fields[name], 0
            if not (length := len(field)):
                continue
            words = source(plan)
            values = np.frombuffer(words, np.int32) if isinstance(words, bytes) else words
            num_words = len(values)
            if num_words:
                field[:num_words] = values
            if padding is not None and num_words < length:
                field[num_words:] = padding
        lengths = _fill_starts(plan, fields)
        self._fill_params(plan, fields["slot_params"])
        fields["counts"][:] = (lengths.chunk_starts[-1], num_new_pages(plan), output_row)
        return layout.offset(self._last_name) + num_words, lengths

    def _fill_params(self, plan: StepPlan, params: Words) -> None:
        for row, chunk in zip(params.reshape(-1, self._params_width), plan.chunks, strict=False):
            if chunk.init is not None:
                row[:] = self._pack_slot(chunk.init)


def _fill_starts(plan: StepPlan, fields: dict[str, Words]) -> RegionLengths:
    """Fills `chunk_starts`, when the fields that come from the plan are there."""
    starts, chunks = fields["chunk_starts"], plan.chunks
    lengths = np.fromiter((chunk.length for chunk in chunks), np.int32, len(chunks))
    starts[0] = 0
    np.cumsum(lengths, out=starts[1 : len(chunks) + 1])
    starts[len(chunks) + 1 :] = starts[len(chunks)]
    # The caller plans from these after the block was handed on: copies, not views of it.
    return RegionLengths(
        chunk_starts=starts.copy(),
        chunk_kv_lens=fields["chunk_positions"] + (starts[1:] - starts[:-1]),
        decode_kv_lens=fields["decode_positions"] + 1,
    )
