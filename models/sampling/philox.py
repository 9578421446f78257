"""Philox4x32-10 in plain torch: random bits that are a function of their counter and nothing else.

Owns the generator and the counter of a draw: key = the request's seed, counter = (token id // 4, position, 0, 0),
word token id % 4. So a request's noise depends on its seed, the token and the position alone: not on its slot, its
row, the other requests or the device. Called by reference.py; device.py is the same for Triton.

The generator: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

WORDS = 4
"""32-bit words one counter gives."""

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of random bits for each counter. All tensors int64 in [0, 2**32); they broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def vocabulary_bits(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """The random word of every token: [N] int64 seeds and [N] positions give [N, V] int64 in [0, 2**32)."""
    groups = torch.arange((vocab_size + WORDS - 1) // WORDS, device=seeds.device).unsqueeze(0)
    zero = torch.zeros_like(groups)
    seeds = seeds.unsqueeze(1)
    key = (seeds & _LOW, (seeds >> 32) & _LOW)
    words = philox4x32((groups, positions.unsqueeze(1).long() & _LOW, zero, zero), key)
    return torch.stack(words, dim=2).flatten(1)[:, :vocab_size]


def _multiply(value: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of a product of two words. int64 wraps around, which leaves its 64 bits right."""
    product = value * multiplier
    return (product >> 32) & _LOW, product & _LOW
