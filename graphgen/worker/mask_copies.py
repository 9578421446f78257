"""The way of masks to the device: beside the input block of a step, and only where a step needs one.

Owns the host blocks and knows which slots' masks count on the device. Called by the runner before a step is launched,
in the order of the steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from graphgen.capture.buffers import StagingRing
from graphgen.capture.stream import DeviceStream
from graphgen.ipc.messages import StepPlan
from graphgen.models.sampling import Sampler, mask_words
from graphgen.worker.grammars import Draw


class MaskCopies:
    """Of one sampler."""

    def __init__(self, sampler: Sampler, stream: DeviceStream, num_blocks: int) -> None:
        """num_blocks: host blocks, as of a step's input."""
        self._sampler = sampler
        self._stream = stream
        self._num_words = mask_words(sampler.tables.vocab_size)
        self._masked: set[int] = set()  # slots whose masks count on the device, once the launched steps have run
        # Of a step in which every slot draws. Made at once: pinning memory would hold up the steps of others.
        device, num_words = sampler.tables.masks.device, (4 + self._num_words) * sampler.tables.trash_slot
        self._ring = StagingRing(num_words, num_blocks, pinned=device.type == "cuda")
        self._block = torch.empty(num_words, dtype=torch.int32, device=device)

    def send(self, plan: StepPlan, draws: Sequence[Draw]) -> None:
        """Brings the masks of the step's draws to the device, and lifts those that do not count in it."""
        masks = {draw.slot: draw.mask for draw in draws if draw.mask is not None or draw.slot in self._masked}
        if self._masked:
            owned = [chunk.slot for chunk in plan.chunks if chunk.init is not None]
            masks |= {slot: None for slot in owned if slot in self._masked and slot not in masks}
        again = [(draw.slot, draw.again) for draw in draws if draw.again is not None]
        if not masks and not again:
            return
        self._masked -= masks.keys()
        self._masked |= {slot for slot, mask in masks.items() if mask is not None}
        host = self._ring.acquire()
        words, num_slots, num_again = host.numpy(), len(masks), len(again)
        words[:num_slots] = list(masks)
        words[num_slots : 2 * num_slots] = [mask is not None for mask in masks.values()]
        start = 2 * num_slots
        for mask in masks.values():
            words[start : start + self._num_words] = 0 if mask is None else mask
            start += self._num_words
        words[start : start + num_again] = [slot for slot, _ in again]
        words[start + num_again : start + 2 * num_again] = [token_id for _, token_id in again]
        self._stream.submit(lambda: self._load(host, num_slots, num_again))
        self._ring.release(self._stream)

    def _load(self, host: Tensor, num_slots: int, num_again: int) -> None:
        sizes = (num_slots, num_slots, num_slots * self._num_words, num_again, num_again)
        words = self._block[: sum(sizes)]
        words.copy_(host[: sum(sizes)], non_blocking=True)
        slots, masked, masks, again_slots, again_ids = words.split(sizes)
        if num_slots:
            self._sampler.write_masks(slots, masked, masks.view(num_slots, self._num_words))
        if num_again:
            self._sampler.forget_inputs(again_slots, again_ids)
