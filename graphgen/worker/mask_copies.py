"""The way of masks to the device: beside the input block of a step, and only where a step needs one; and beside a step
that runs already, for a draw whose token before it was not known when the step was launched.

Owns the host blocks and knows which slots have masks on the device. Called by the runner before a step is launched, in
the order of the steps (`send`), and by a thread of grammars (`send_late`).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from graphgen.capture.buffers import StagingRing
from graphgen.capture.stream import DeviceStream
from graphgen.ipc.messages import StepPlan
from graphgen.models.sampling import Sampler, mask_words
from graphgen.worker.grammars import FILLED_TOGETHER, Draw, LateMask

LATE_BLOCKS = 16
"""Of masks beside a step: that many may be on their way, and no thread waits for the first to have arrived."""


NOWHERE = -1
"""The position of a mask that no draw obeys."""


class MaskCopies:
    """Of one sampler."""

    def __init__(self, sampler: Sampler, stream: DeviceStream, num_blocks: int) -> None:
        """num_blocks: host blocks, as of a step's input."""
        self._sampler = sampler
        self._stream = stream
        self._beside = stream.beside
        self._masked: set[int] = set()  # slots that may have a mask on the device
        # Of a step in which every slot draws. Made at once: pinning memory would hold up the steps of others.
        num_slots = sampler.tables.trash_slot
        self._steps = _Blocks(sampler, num_slots, 3 * num_slots, num_blocks)
        self._late = _Blocks(sampler, FILLED_TOGETHER, 0, LATE_BLOCKS)

    def send(self, plan: StepPlan, draws: Sequence[Draw]) -> None:
        """Brings the masks of the step's draws to the device, and lifts those of the owners before."""
        masks = [LateMask(draw.slot, draw.position, draw.mask) for draw in draws if draw.mask is not None]
        owned = [chunk.slot for chunk in plan.chunks if chunk.init is not None and chunk.slot in self._masked]
        again = [(draw.slot, draw.again) for draw in draws if draw.again is not None]
        self._masked = self._masked.difference(owned) | {draw.slot for draw in draws}
        if owned:
            self._stream.join_beside()
        if masks or owned or again:
            numbers = [owned, [slot for slot, _ in again], [token_id for _, token_id in again]]
            host, sizes = self._steps.pack(masks, numbers)
            self._stream.submit(lambda: self._load(host, len(masks), sizes))
            self._steps.ring.release(self._stream)

    def send_late(self, masks: Sequence[LateMask]) -> None:
        """The same, of FILLED_TOGETHER at most, beside the step that runs: its draws obey them or, if they come too
        late, do not. By one thread at a time."""
        host, _ = self._late.pack(masks, [])
        self._beside.submit(lambda: self._sampler.write_masks(host, len(masks)))
        self._late.ring.release(self._beside)

    def send_once(self) -> None:
        """A mask for nobody: what writes masks is compiled before a request needs it."""
        nothing = np.zeros(mask_words(self._sampler.tables.vocab_size), np.int32)
        self.send_late([LateMask(self._sampler.tables.trash_slot, NOWHERE, nothing)])

    def _load(self, host: Tensor, num_masks: int, sizes: Sequence[int]) -> None:
        owned, again_slots, again_ids = self._steps.arrived(host, sizes)
        if len(owned):
            self._sampler.lift_masks(owned)
        if num_masks:
            self._sampler.write_masks(host, num_masks)
        if len(again_slots):
            self._sampler.forget_inputs(again_slots, again_ids)


class _Blocks:
    """Masks, which are read where they lie, and further numbers, packed into host blocks."""

    def __init__(self, sampler: Sampler, most_masks: int, most_numbers: int, num_blocks: int) -> None:
        """most_numbers: beside the masks."""
        self._num_words = mask_words(sampler.tables.vocab_size)
        device = sampler.tables.masks.device
        num_words = most_masks * (2 + self._num_words) + most_numbers
        self.ring = StagingRing(num_words, num_blocks, pinned=device.type == "cuda")
        self._numbers = torch.empty(most_numbers, dtype=torch.int32, device=device)

    def pack(self, masks: Sequence[LateMask], numbers: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
        """(block, sizes of what it holds: all of the masks, then each of the numbers). To be released."""
        host = self.ring.acquire()
        words, num_masks = host.numpy(), len(masks)
        words[:num_masks] = [mask.slot for mask in masks]
        words[num_masks : 2 * num_masks] = [mask.position for mask in masks]
        start = 2 * num_masks
        for mask in masks:
            words[start : start + self._num_words] = mask.words
            start += self._num_words
        sizes = [start]
        for some in numbers:
            words[start : start + len(some)] = some
            start += len(some)
            sizes.append(len(some))
        return host, sizes

    def arrived(self, host: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        """The numbers on the device."""
        start, *nums = sizes
        numbers = self._numbers[: sum(nums)]
        if len(numbers):
            numbers.copy_(host[start : start + len(numbers)], non_blocking=True)
        parts: Sequence[Tensor] = numbers.split(nums)
        return parts
