"""x @ weight.T in float32 on the CPU: which of torch's libraries multiplies, by the CPU and the sizes.

Owns the choice. Behind F.linear stands MKL. On CPUs that are not Intel's it multiplies a vector with SSE2 and matrices
without AVX512. oneDNN asks what the CPU has, whoever made it, and serves instead; for one to four short rows MKL's
small matrices do. Called by products.py, never inside a compiled layer.

CPU time of all products of a step of SmolLM2-135M in ms at 1 / 2 / 4 / 8 / 16 / 40 rows, one core of a Zen 5, MKL
2024.2, oneDNN 3.12, the median of six runs beside other work (of 40 rows the head multiplies one):

    F.linear           32 / 53 / 50 / 58 / 79 / 112
    oneDNN             23 / 33 / 33 / 38 / 47 / 60
    a block a time     18 / 24 / 27 / 59 / 84 / 128    the weight's blocks times the rows
"""

import functools
import math
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 64
"""Of a weight. Blocks of 1 to 192 rows differ by less than the runs do."""
BLOCKED_ROWS = range(4, 16)
"""So many rows are multiplied on Intel's CPUs by BLOCK_ROWS rows of the weight at a time, in one call: MKL has faster
kernels for small matrices than for x @ weight.T of a few rows. CPU time of all products of a step of SmolLM2-135M in ms
at 2 / 4 / 8 / 12 / 16 rows, one core with AVX512, MKL 2024.2, the least of seven runs beside other work: 48 / 86 / 116
/ 148 / 108, and in blocks of 96 rows 54 / 64 / 76 / 86 / 110."""

MOST_BLOCKED_ROWS = 4
"""That meet a weight in blocks on other CPUs,"""
MOST_BLOCKED_ELEMENTS = 4096
"""and of all these rows together. On that Zen 5, in us, blocks against oneDNN: one row with 4096 x 4096 2440 against
2693, with 2048 x 8192 3213 against 2627; two rows with 2048 x 2048 827 against 838; four rows with 3072 x 576 329
against 437, with 576 x 1536 288 against 204."""
LEAST_BLOCKED = 2**15
"""Elements of such a weight. With 128 x 128 F.linear takes 7.8 us for one row and 7.6 for two, blocks 6.3 and 8.4; with
256 x 256 it takes 23.1 and 22.9, blocks 13.8 and 18.5."""
LEAST_FOR_ONEDNN = 2**19
"""Multiplications from which oneDNN is faster than F.linear: a call of it takes 11 us longer."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, [T, N]. x: [T, K]; weight: [N, K], contiguous; bias: [N]."""
    num_rows, (size, depth) = len(x), weight.shape
    if mkl_is_held_back():
        few_and_short = num_rows <= MOST_BLOCKED_ROWS and x.numel() <= MOST_BLOCKED_ELEMENTS
        if few_and_short and size * depth >= LEAST_BLOCKED:
            blocks = weight.view(-1, math.gcd(size, BLOCK_ROWS), depth)
            # Transposed rows: of a column with strides of its own MKL makes a product that takes five times as long.
            sums = torch.bmm(blocks, x.t().expand(len(blocks), -1, -1))
            return _plus(sums.flatten(0, 1).t().contiguous(), bias)
        if num_rows * size * depth >= LEAST_FOR_ONEDNN:
            result: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
            return result
    elif num_rows in BLOCKED_ROWS and size % BLOCK_ROWS == 0:
        blocks = weight.view(-1, BLOCK_ROWS, depth).transpose(1, 2)
        return _plus(torch.matmul(x, blocks).transpose(0, 1).reshape(num_rows, size), bias)
    return F.linear(x, weight, bias)


def _plus(result: Tensor, bias: Tensor | None) -> Tensor:
    return result if bias is None else result.add_(bias)


CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def mkl_is_held_back(cpuinfo: Path = CPUINFO) -> bool:
    """Whether F.linear is MKL's on a CPU that is not Intel's, and there is oneDNN."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    with suppress(OSError), cpuinfo.open() as file:
        return "GenuineIntel" not in file.read(4096)  # of the first core
    return False
