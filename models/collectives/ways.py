"""Which way of adding up serves how many bytes, as it was measured.

Pure data. Called by group.py.

Two H200s and four H200s of one host (NV18), torch 2.11, NCCL 2.28.9, multicast off, bfloat16, microseconds a call of
twenty in one CUDA graph, measured on 2026-11-28; `python -m benchmarks.collectives` measures anew:

                           8 KB  64 KB  256 KB  512 KB  1 MB  2 MB  4 MB  8 MB
    two ranks   NCCL        9.1    9.8    11.2    12.7  16.5  29.6  34.7  48.4
                one-shot    6.6    6.9     8.5     9.8  13.4  19.0  30.7  53.6
                two-shot    6.7    7.4     7.7     8.1  10.2  13.3  20.1  32.9
    four ranks  NCCL       12.9   15.1    14.9    17.5  21.1  29.6  42.0  62.8
                one-shot    8.0    9.2    11.2    14.0  18.7  28.3  48.4  87.6
                two-shot    7.4   10.0     9.6    10.3  12.9  18.6  28.2  50.2

These read a buffer that the ranks share. A layer's result lies elsewhere: one-shot takes it there in the same kernel,
two-shot needs a copy before it, some 2 us. So one-shot serves up to where it is 2 us slower.
"""

from collections.abc import Mapping
from typing import NamedTuple

KIB, MIB = 2**10, 2**20


class Ways(NamedTuple):
    """Most bytes that each way serves, the first that does; NCCL serves all."""

    one_shot: int
    """Each rank reads all parts. One kernel."""
    two_shot: int
    """Each rank adds up its share of all parts, and all read the sums."""


NCCL_ALONE = Ways(0, 0)

MEASURED: Mapping[int, Ways] = {2: Ways(512 * KIB, 8 * MIB), 4: Ways(256 * KIB, 8 * MIB)}
"""Of so many ranks. Of other numbers nothing is known, and NCCL serves them."""


def ways_of(num_ranks: int) -> Ways:
    return MEASURED.get(num_ranks, NCCL_ALONE)
