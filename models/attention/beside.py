"""Runs the decode rows of a step beside its chunks: the kernel of chunks computes and that of decodes reads memory, so
they share the device well. CUDA only; called inside the attention operators, also while a graph is captured.
"""

import functools
from collections.abc import Callable

import torch


def run_beside(chunks: Callable[[], None], decodes: Callable[[], None]) -> None:
    """Launches both; what is launched next waits for both."""
    main, side = torch.cuda.current_stream(), _side_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        decodes()
    chunks()
    main.wait_stream(side)


@functools.cache  # one process drives one device
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()
