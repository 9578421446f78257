"""The way of biases to the device: beside the input block of a step, and only where a new owner of a slot has some.

Owns the host blocks. Called by the runner before a step is launched, in the order of the steps.
"""

import torch
from torch import Tensor

from graphgen.capture.buffers import StagingRing
from graphgen.capture.stream import DeviceStream
from graphgen.ipc.worker_messages import StepPlan
from graphgen.models.sampling import BIAS_WIDTH, Sampler, pack_biases


class BiasCopies:
    """Of one sampler."""

    def __init__(self, sampler: Sampler, stream: DeviceStream, num_blocks: int, max_chunks: int) -> None:
        """num_blocks: host blocks, as of a step's input. max_chunks: of a step."""
        self._sampler = sampler
        self._stream = stream
        # Of a step in which every chunk has them. Made at once: pinning memory would hold up the steps of others.
        device, num_words = sampler.tables.biases.device, (1 + BIAS_WIDTH) * max_chunks
        self._ring = StagingRing(num_words, num_blocks, pinned=device.type == "cuda")
        self._block = torch.empty(num_words, dtype=torch.int32, device=device)

    def send(self, plan: StepPlan) -> None:
        """Brings the biases of the step's new owners to the device."""
        owners = [(chunk.slot, chunk.init.sampler) for chunk in plan.chunks if chunk.init and chunk.init.sampler.biases]
        if not owners:
            return
        host = self._ring.acquire()
        words, num_owners = host.numpy(), len(owners)
        words[:num_owners] = [slot for slot, _ in owners]
        rows = words[num_owners : num_owners * (1 + BIAS_WIDTH)].reshape(num_owners, BIAS_WIDTH)
        for row, (_, sampler) in zip(rows, owners, strict=True):
            row[:] = pack_biases(sampler)
        self._stream.submit(lambda: self._load(host, num_owners))
        self._ring.release(self._stream)

    def _load(self, host: Tensor, num_owners: int) -> None:
        num_words = num_owners * (1 + BIAS_WIDTH)
        words = self._block[:num_words]
        words.copy_(host[:num_words], non_blocking=True)
        self._sampler.write_biases(words[:num_owners], words[num_owners:].view(num_owners, BIAS_WIDTH))
