"""Ways in which attention differs between models, and the formula written out for one row, in float64.

Every kernel is held to `by_hand`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from graphgen.models.attention.variant import AttentionVariant, Numbers, Scoring


class Rules(NamedTuple):
    """What a variant says, in the words of the formula."""

    scale: float | None = None  # None: 1 / sqrt(D)
    window: int = 0
    segment: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None
    slopes: Tensor | None = None

    def variant(self, head_dim: int) -> AttentionVariant:
        scoring = self.scoring(head_dim)
        return AttentionVariant(scoring.numbers.packed(), scoring.sinks, scoring.alibi_slopes)

    def scoring(self, head_dim: int) -> Scoring:
        scale = head_dim**-0.5 if self.scale is None else self.scale
        return Scoring(Numbers(scale, self.window, self.segment, self.softcap), self.sinks, self.slopes)


def rules(num_heads: int, window: int, segment: int) -> dict[str, Rules]:
    """Each trait alone, those that models have together, and all at once."""
    sinks = torch.linspace(-2.0, 3.0, num_heads)  # some larger than any score, some smaller
    slopes = torch.exp2(-torch.arange(1.0, num_heads + 1) * 8 / num_heads)
    return {
        "plain": Rules(),
        "scale": Rules(scale=0.7),
        "window": Rules(window=window),
        "window of one": Rules(window=1),
        "segment": Rules(segment=segment),
        "softcap": Rules(softcap=1.5),
        "sinks": Rules(sinks=sinks),
        "alibi": Rules(slopes=slopes),
        "sinks, window (gpt-oss)": Rules(window=window, sinks=sinks),
        "softcap, window, scale (Gemma 2)": Rules(0.3, window, softcap=2.0),
        "softcap, sinks": Rules(softcap=1.5, sinks=sinks),
        "alibi, window, sinks": Rules(window=window, sinks=sinks, slopes=slopes),
        "all": Rules(0.9, window, segment, 1.2, sinks, slopes),
    }


def by_hand(q: Tensor, k: Tensor, v: Tensor, rule: Rules) -> Tensor:
    """q [Hq, D] of the last position of k, v [positions, Hkv, D]; [Hq, D], one head after the other."""
    position, num_heads, group = len(k) - 1, len(q), len(q) // k.shape[1]
    seen = [
        other
        for other in range(position + 1)
        if (not rule.window or position - other < rule.window)
        and (not rule.segment or other // rule.segment == position // rule.segment)
    ]
    scale = 1 / math.sqrt(q.shape[1]) if rule.scale is None else rule.scale
    heads = []
    for head in range(num_heads):
        scores = scale * (k[seen, head // group].double() @ q[head].double())
        if rule.softcap:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        if rule.slopes is not None:
            scores = scores + rule.slopes[head].double() * (torch.tensor(seen) - position)
        weights = scores.exp()
        total = weights.sum() if rule.sinks is None else weights.sum() + rule.sinks[head].double().exp()
        heads.append(weights @ v[seen, head // group].double() / total)
    return torch.stack(heads).float()
