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
from graphgen.ipc.worker_messages import StepPlan
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
        self._steps = _Blocks(sampler, num_slots, num_slots, num_blocks)
        self._late = _Blocks(sampler, FILLED_TOGETHER, 0, LATE_BLOCKS)
        self._owned = torch.empty(num_slots, dtype=torch.int32, device=sampler.tables.masks.device)

    def send(self, plan: StepPlan, draws: Sequence[Draw]) -> None:
        """Brings the masks of the step's draws to the device, and lifts those of the owners before."""
        masks = [LateMask(draw.slot, draw.position, draw.mask) for draw in draws if draw.mask is not None]
        owned = [chunk.slot for chunk in plan.chunks if chunk.init is not None and chunk.slot in self._masked]
        self._masked = self._masked.difference(owned) | {draw.slot for draw in draws}
        if masks or owned:
            self._stream.join_beside()  # older masks of these slots come first
            host, num_words = self._steps.pack(masks, owned)
            self._stream.submit(lambda: self._load(host, len(masks), num_words, len(owned)))
            self._steps.ring.release(self._stream)

    def send_late(self, masks: Sequence[LateMask]) -> None:
        """The same, of FILLED_TOGETHER at most, beside the step that runs: its draws obey them or, if they come too
        late, do not. By one thread at a time."""
        host, _ = self._late.pack(masks)
        self._beside.submit(lambda: self._sampler.write_masks(host, len(masks)))
        self._late.ring.release(self._beside)

    def send_once(self) -> None:
        """A mask for nobody: what writes and lifts masks is compiled before a request needs it."""
        trash_slot = self._sampler.tables.trash_slot
        nothing = np.zeros(mask_words(self._sampler.tables.vocab_size), np.int32)
        self.send_late([LateMask(trash_slot, NOWHERE, nothing)])
        self._stream.join_beside()
        self._stream.submit(lambda: self._sampler.lift_masks(self._owned[:1].fill_(trash_slot)))

    def _load(self, host: Tensor, num_masks: int, num_words: int, num_owned: int) -> None:
        """num_words: of the masks, which the slots with new owners follow."""
        if num_owned:
            owned = self._owned[:num_owned]
            owned.copy_(host[num_words : num_words + num_owned], non_blocking=True)
            self._sampler.lift_masks(owned)
        if num_masks:
            self._sampler.write_masks(host, num_masks)


class _Blocks:
    """Masks and slots, packed into host blocks. Masks are read where they lie."""

    def __init__(self, sampler: Sampler, most_masks: int, most_slots: int, num_blocks: int) -> None:
        """most_slots: beside the masks."""
        self._num_words = mask_words(sampler.tables.vocab_size)
        num_words = most_masks * (2 + self._num_words) + most_slots
        self.ring = StagingRing(num_words, num_blocks, pinned=sampler.tables.masks.device.type == "cuda")

    def pack(self, masks: Sequence[LateMask], slots: Sequence[int] = ()) -> tuple[Tensor, int]:
        """(block: see `Sampler.write_masks`, and behind the masks the slots; words of the masks). To be released."""
        host = self.ring.acquire()
        words, num_masks = host.numpy(), len(masks)
        words[:num_masks] = [mask.slot for mask in masks]
        words[num_masks : 2 * num_masks] = [mask.position for mask in masks]
        end = 2 * num_masks
        for mask in masks:
            words[end : end + self._num_words] = mask.words
            end += self._num_words
        words[end : end + len(slots)] = slots
        return host, end
