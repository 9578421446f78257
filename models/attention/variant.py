"""How a layer scores the positions that its rows see. Of a row at position p, a position j and a head:

    s = scale * q . k
    s = softcap * tanh(s / softcap)     if there is a soft cap
    s = s + slope * (j - p)             if there are ALiBi slopes (arXiv 2108.12409)
    weight = exp(s) / (sum of exp(s) over all j that the row sees + exp(sink))     without sinks the second term is 0

A row sees j <= p; with a window the last `window` of these, itself included; with segments those of its own, each of
which begins at a multiple of `segment` (Hugging Face: attention_chunk_size).

What differs by layer lies in tensors: layers that differ in numbers share one compiled graph. Having sinks or slopes is
another kind of layer. Owns no weight. Layers build a variant, the attention backends read it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FULL_ATTENTION = 0
"""The window that stands for «every earlier position»."""


class Numbers(NamedTuple):
    """The numbers of the formula; 0 stands for what a layer has not."""

    scale: float
    window: int = FULL_ATTENTION
    segment: int = 0
    softcap: float = 0.0

    def packed(self) -> Tensor:
        """[4] float64 on the host, read again by `unpacked`."""
        return torch.tensor(self, dtype=torch.float64, device="cpu")

    @classmethod
    def unpacked(cls, numbers: Tensor) -> "Numbers":
        scale, window, segment, softcap = numbers.tolist()
        return cls(scale, int(window), int(segment), softcap)

    def first_seen(self, position: int) -> int:
        """The oldest position that a row at `position` sees."""
        first = max(0, position - self.window + 1) if self.window else 0
        return max(first, position // self.segment * self.segment) if self.segment else first


class AttentionVariant(NamedTuple):
    """Of one layer, as it travels through a compiled graph."""

    numbers: Tensor
    """Numbers.packed: on the host, so that an operator can read them while a graph is captured."""
    sinks: Tensor | None = None
    """[Hq] float32"""
    alibi_slopes: Tensor | None = None
    """[Hq] float32"""


class Scoring(NamedTuple):
    """The same inside an operator."""

    numbers: Numbers
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None

    @property
    def only_masks(self) -> bool:
        """Whether scores are scaled and masked and no more."""
        return self.sinks is None and self.alibi_slopes is None and not self.numbers.softcap


def alibi_slopes(num_heads: int, max_bias: float = 8.0) -> Tensor:
    """[num_heads] float32: powers 1 to n of 2 ** (-max_bias / n), n the number of heads. Where that is no power of
    two, n is the next one, and every second of the powers comes first."""
    count = 1 << (num_heads - 1).bit_length()
    slopes = torch.exp2(-torch.arange(1, count + 1, dtype=torch.float64) * max_bias / count)
    if count != num_heads:
        slopes = torch.cat((slopes[1::2], slopes[::2]))[:num_heads]
    return slopes.float()


def temperatures(positions: Tensor, beta: float, length: int, offset: int = 0) -> Tensor:
    """[T] float32: factors of the queries of models that see further than they were trained for,
    1 + beta * ln(1 + (position + offset) // length)."""
    return 1.0 + beta * torch.log1p(torch.floor((positions + offset) / length)).float()
