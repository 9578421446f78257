"""The way of known tokens back to the device: beside the input block of a step, and only where one is computed again,
since the token that was drawn behind it was refused.

Owns the host blocks. Called by the runner before a step is launched, in the order of the steps.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphgen.capture.buffers import StagingRing
from graphgen.capture.stream import DeviceStream
from graphgen.ipc.worker_messages import StepPlan
from graphgen.models.sampling import Sampler


class RedrawCopies:
    """Of one sampler."""

    def __init__(self, sampler: Sampler, last_token: Tensor, stream: DeviceStream, num_blocks: int) -> None:
        """last_token: see SlotTables. num_blocks: host blocks, as of a step's input."""
        self._sampler = sampler
        self._last_token = last_token
        self._stream = stream
        # Of a step in which every slot has one. Made at once: pinning memory would hold up the steps of others.
        device, num_words = last_token.device, 2 * len(last_token)
        self._ring = StagingRing(num_words, num_blocks, pinned=device.type == "cuda")
        self._block = torch.empty(num_words, dtype=torch.int32, device=device)

    def send(self, plan: StepPlan) -> None:
        """Makes them the last tokens of their slots. What sampling has counted of them it forgets: it will count them
        again."""
        if plan.redrawn:
            self._bring(np.frombuffer(plan.redrawn, "<i4").reshape(-1, 3))

    def send_once(self) -> None:
        """One for nobody: kernels that bring tokens are loaded before a request needs them."""
        trash_slot = len(self._last_token) - 1
        self._bring(np.array([[trash_slot, 0, 1]], np.int32))

    def _bring(self, redrawn: npt.NDArray[np.int32]) -> None:
        """redrawn: [rows, 3], as in StepPlan."""
        slots, token_ids, of_output = redrawn.T
        order = (1 - of_output).argsort(kind="stable")  # those of the output first: of a prompt's none is counted
        host, num_rows, num_counted = self._ring.acquire(), len(order), int(of_output.sum())
        words = host.numpy()
        words[:num_rows], words[num_rows : 2 * num_rows] = slots[order], token_ids[order]
        self._stream.submit(lambda: self._load(host, num_rows, num_counted))
        self._ring.release(self._stream)

    def _load(self, host: Tensor, num_rows: int, num_counted: int) -> None:
        words = self._block[: 2 * num_rows]
        words.copy_(host[: 2 * num_rows], non_blocking=True)
        slots, token_ids = words.split(num_rows)
        self._last_token.index_copy_(0, slots.long(), token_ids.long())
        if num_counted:
            self._sampler.forget_inputs(slots[:num_counted], token_ids[:num_counted])
