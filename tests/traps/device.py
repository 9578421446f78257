"""Kernels that harm a GPU's worker: one that writes where no memory is, one that never ends.

Loaded in the worker's process by a trap that asks for one, see `tests.traps.in_worker`.
"""

import torch
import triton
import triton.language as tl

FAR = 1 << 44
"""Elements behind a tensor: no address of the device's memory."""


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _write_far_kernel(word: "tl.tensor", offset: "tl.tensor") -> None:
    tl.store(word + tl.load(offset), 1)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _spin_kernel(word: "tl.tensor") -> None:
    while tl.load(word, volatile=True) == 0:
        pass


def write_far() -> None:
    """What follows on the stream fails with an illegal memory access, and so does every later call of the process."""
    offset = torch.tensor([FAR], dtype=torch.int64, device="cuda")
    _write_far_kernel[(1,)](torch.zeros(1, dtype=torch.int32, device="cuda"), offset)


def spin() -> None:
    """Nothing that follows on the stream begins."""
    _spin_kernel[(1,)](torch.zeros(1, dtype=torch.int32, device="cuda"))
