"""The input block of a step: which words a plan becomes, in which order, and what pads them.

Owns the shape of a step, the layout that follows from it, and the packing on the host. step.py reads the same fields on
the device. A captured step has a bucket's rows and as many chunks and pages as any plan may bring; a step without a
graph has those of its plan.

Fields, in words (C chunks, P prefill rows, R decode rows, N new pages, W words of a slot's parameters):

    counts            [3]      live prefill rows, new pages, row of the token ring to write
    chunk_slots       [C]      padded with the trash slot
    chunk_positions   [C]      position of the chunk's first token
    chunk_starts      [C + 1]  first row of each chunk, padded with the live prefill rows
    chunk_samples     [C]      1 where the chunk's last row draws a token
    chunk_inits       [C]      1 where the slot has a new owner
    slot_params       [C * W]  the new owner's parameters
    chunk_token_ids   [P]
    decode_slots      [R]      padded with the trash slot
    decode_positions  [R]
    page_copies       [C * 2]  (source, destination); only those of the plan are read
    new_pages         [N * 3]  (slot, index, page); only `counts[1]` of them are copied and read
"""

from collections.abc import Callable

import numpy as np
from msgspec import Struct

from graphgen.capture.buffers import BlockLayout, Field, Words
from graphgen.ipc.messages import Bucket, SlotInit, StepPlan

NUM_COUNTS = 3


class StepShape(Struct, frozen=True):
    """What a step has room for. Steps of one shape run the same kernels at the same addresses."""

    bucket: Bucket  # its rows
    num_chunks: int
    num_new_pages: int

    @property
    def num_draws(self) -> int:
        """Rows whose logits are computed: the last of each chunk, and the decode rows."""
        return self.num_chunks + self.bucket.decode_rows


class InputShape(Struct, frozen=True):
    """What bounds the input block of every step."""

    max_chunks: int
    trash_slot: int
    pages_per_slot: int
    params_width: int

    def any_plan(self, bucket: Bucket) -> StepShape:
        """Room for every plan of this bucket: admissions bring whole block tables, a decode row one page."""
        num_chunks = min(self.max_chunks, bucket.prefill_rows)
        return StepShape(bucket, num_chunks, num_chunks * self.pages_per_slot + bucket.decode_rows)

    def this_plan(self, plan: StepPlan) -> StepShape:
        """No more room than this plan needs; prefill rows belong to one chunk at least."""
        num_chunks = max(len(plan.chunks), min(1, plan.bucket.prefill_rows))
        return StepShape(plan.bucket, num_chunks, len(plan.new_pages) // 12)


class RegionLengths(Struct, frozen=True):
    """What a host-planned attention kernel must know of a step, padded like the device's tables."""

    chunk_starts: Words
    chunk_kv_lens: Words
    decode_kv_lens: Words


def input_layout(step: StepShape, shape: InputShape) -> BlockLayout:
    """The block of one shape. `new_pages` comes last, so that only its live part is copied."""
    num_chunks, bucket = step.num_chunks, step.bucket
    return BlockLayout(
        [
            Field("counts", NUM_COUNTS),
            Field("chunk_slots", num_chunks),
            Field("chunk_positions", num_chunks),
            Field("chunk_starts", num_chunks + 1),
            Field("chunk_samples", num_chunks),
            Field("chunk_inits", num_chunks),
            Field("slot_params", num_chunks * shape.params_width),
            Field("chunk_token_ids", bucket.prefill_rows),
            Field("decode_slots", bucket.decode_rows),
            Field("decode_positions", bucket.decode_rows),
            Field("page_copies", num_chunks * 2),
            Field("new_pages", step.num_new_pages * 3),
        ]
    )


def pack_plan(
    plan: StepPlan,
    layout: BlockLayout,
    shape: InputShape,
    block: Words,
    ring_row: int,
    pack_slot: Callable[[SlotInit], Words],
) -> tuple[int, RegionLengths]:
    """Fills `block`; returns how many of its words the device needs, and the lengths attention plans with."""
    fields = layout.host_views(block)
    chunks = plan.chunks
    num_chunks = len(chunks)
    lengths = np.fromiter((chunk.length for chunk in chunks), np.int32, num_chunks)
    positions = np.fromiter((chunk.start for chunk in chunks), np.int32, num_chunks)

    starts = fields["chunk_starts"]
    starts[0] = 0
    np.cumsum(lengths, out=starts[1 : num_chunks + 1])
    num_prefill_rows = int(starts[num_chunks])
    starts[num_chunks + 1 :] = num_prefill_rows
    _fill(fields["chunk_slots"], [chunk.slot for chunk in chunks], shape.trash_slot)
    _fill(fields["chunk_positions"], positions, 0)
    _fill(fields["chunk_samples"], [chunk.samples for chunk in chunks], 0)
    _fill(fields["chunk_inits"], [chunk.init is not None for chunk in chunks], 0)
    params = fields["slot_params"].reshape(-1, shape.params_width)
    for row, chunk in zip(params, chunks, strict=False):
        if chunk.init is not None:
            row[:] = pack_slot(chunk.init)
    _fill(fields["chunk_token_ids"], np.frombuffer(plan.chunk_token_ids, np.int32), 0)

    decode_positions = np.frombuffer(plan.decode_positions, np.int32)
    _fill(fields["decode_slots"], np.frombuffer(plan.decode_slots, np.int32), shape.trash_slot)
    _fill(fields["decode_positions"], decode_positions, 0)
    page_copies = np.frombuffer(plan.page_copies, np.int32)
    fields["page_copies"][: len(page_copies)] = page_copies
    new_pages = np.frombuffer(plan.new_pages, np.int32)
    fields["new_pages"][: len(new_pages)] = new_pages
    fields["counts"][:] = (num_prefill_rows, len(new_pages) // 3, ring_row)

    chunk_kv_lens = np.zeros(len(fields["chunk_slots"]), np.int32)
    chunk_kv_lens[:num_chunks] = positions + lengths
    decode_kv_lens = np.ones(plan.bucket.decode_rows, np.int32)
    decode_kv_lens[: len(decode_positions)] = decode_positions + 1
    # The caller plans from these after the block was handed on: a copy, not a view of it.
    return layout.offset("new_pages") + len(new_pages), RegionLengths(starts.copy(), chunk_kv_lens, decode_kv_lens)


def _fill(field: Words, values: "Words | list[int] | list[bool]", padding: int) -> None:
    field[: len(values)] = values
    field[len(values) :] = padding
