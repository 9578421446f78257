"""Chained kernels: launched before the one ahead is done, they wait inside for its data: programmatic dependent launch.

Owns the one condition and the one launch option. Called by whoever launches our Triton kernels.
"""

import functools

import torch


@functools.cache  # one process drives one device
def can_chain() -> bool:
    """Whether the device can: from SM90 on."""
    return torch.cuda.get_device_capability()[0] >= 9


def launch_options(chained: bool) -> dict[str, bool]:
    """Keyword arguments of a kernel's launch."""
    return {"launch_pdl": True} if chained else {}  # Triton has the option from SM90 on only
