"""Which experts a row goes to, and how much each counts.

Owns the formulas of spec.Router, all in float32. No weights and no wait for the device. Called by block.py.

Shapes: `T` token rows, `E` experts, `K` of them chosen.
"""

import torch
from torch import Tensor

from graphgen.models.spec import Router

_NO_ZERO = 1e-20
"""Added to a sum before the division by it; too little to change one that is not zero."""


def route(logits: Tensor, correction: Tensor | None, router: Router, top_k: int) -> tuple[Tensor, Tensor]:
    """logits: [T, E] float32. correction: [E]. Weights, [T, K] float32, and numbers of the experts, [T, K] int64."""
    if router.score == "sparsemixer":
        weights, experts = _sparsemixer(logits, router.jitter, top_k)
    else:
        scores = logits.softmax(-1) if router.score == "softmax" else logits.sigmoid()
        # Scores of large products are equal where the products are not, but both have one order.
        by_logits = correction is None and router.group_score == "max"
        choice = logits if by_logits else scores if correction is None else scores + correction
        if router.kept_groups < router.num_groups:
            choice = _of_best_groups(choice, router)
        experts = choice.topk(top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
    if router.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + _NO_ZERO)
    return weights if router.scale == 1.0 else weights * router.scale, experts


def _of_best_groups(choice: Tensor, router: Router) -> Tensor:
    """The scores, -inf outside the best groups."""
    grouped = choice.unflatten(-1, (router.num_groups, -1))
    scores = grouped.amax(-1) if router.group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
    kept = scores.topk(router.kept_groups, dim=-1).indices
    mask = torch.full_like(scores, float("-inf")).scatter(-1, kept, 0.0)
    masked: Tensor = grouped + mask.unsqueeze(-1)
    return masked.flatten(-2)


def _sparsemixer(scores: Tensor, jitter: float, top_k: int) -> tuple[Tensor, Tensor]:
    weights, experts, left = [], [], scores
    for _ in range(top_k):
        best, expert = left.max(-1, keepdim=True)
        far = (best - scores) / torch.maximum(scores.abs(), best) > 2 * jitter
        weights.append(left.masked_fill(far, float("-inf")).softmax(-1).gather(-1, expert))
        experts.append(expert)
        left = left.scatter(-1, expert, float("-inf"))
    return torch.cat(weights, -1), torch.cat(experts, -1)
