"""Input of a step: one block of int32 words, filled on the host, copied to the device at once, read at fixed addresses.

    layout = BlockLayout([Field("chunk_slot", 8), Field("tokens", 128)])
    ring   = StagingRing(size, slots=3, ...)        # pinned host blocks, reused only after their copy has run
    views  = layout.views(device_block)             # named tensors a graph reads

Owns layout and staging; knows nothing of what the words mean.
"""

from collections.abc import Sequence

import numpy as np
import torch
from msgspec import Struct
from torch import Tensor

from graphgen.capture.stream import Mark, Queue


class Field(Struct, frozen=True):
    """`length` int32 words called `name`."""

    name: str
    length: int


class BlockLayout:
    """Where each field lies in a block. Fields follow each other in the order given."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self._spans: dict[str, tuple[int, int]] = {}
        offset = 0
        for field in fields:
            self._spans[field.name] = (offset, offset + field.length)
            offset += field.length
        self.num_words = offset

    def offset(self, name: str) -> int:
        """First word of a field."""
        return self._spans[name][0]

    def views(self, block: Tensor) -> dict[str, Tensor]:
        """Named int32 views of a device block, at least `num_words` long, or of a stack of blocks, [..., num_words]."""
        return {name: block[..., start:end] for name, (start, end) in self._spans.items()}

    def host_views(self, block: "np.ndarray[tuple[int], np.dtype[np.int32]]") -> dict[str, "Words"]:
        """Named int32 views of a host block."""
        return {name: block[start:end] for name, (start, end) in self._spans.items()}


Words = np.ndarray[tuple[int], np.dtype[np.int32]]
"""int32 words on the host."""


class StagingRing:
    """Host blocks that wait for their copy to the device; pinned when the device is a GPU.

    With steps in flight, the block of step N must not be rewritten for step N + k before the device has copied it.
    `acquire` waits for exactly that.
    """

    def __init__(self, num_words: int, num_blocks: int, pinned: bool) -> None:
        self._blocks = [torch.zeros(num_words, dtype=torch.int32, pin_memory=pinned) for _ in range(num_blocks)]
        self._copied: list[Mark | None] = [None] * num_blocks
        self._next = 0

    def acquire(self) -> Tensor:
        """A block that nothing reads any more."""
        mark = self._copied[self._next]
        if mark is not None:
            mark.wait()
            self._copied[self._next] = None
        return self._blocks[self._next]

    def release(self, stream: Queue) -> None:
        """The acquired block's copy was submitted: it is free once the stream gets here."""
        self._copied[self._next] = stream.mark()
        self._next = (self._next + 1) % len(self._blocks)
