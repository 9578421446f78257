"""Attention as `variant.py` defines it, in plain PyTorch: what every kernel is held to.

Owns the arithmetic alone. Called by live.py and reference.py, which know where keys and values lie.

Shapes: `B` requests, `L` positions, `Hq`/`Hkv` heads, `D` head size.
"""

import torch
from torch import Tensor

from graphgen.models.attention.variant import Numbers, Scoring


def attend_rows(q: Tensor, keys: Tensor, values: Tensor, own: Tensor, positions: Tensor, scoring: Scoring) -> Tensor:
    """q [B, rows, Hq, D] over keys, values [B, L, Hkv, D]; own [B, rows]: the position of each row; positions [L].
    Softmax in float32; a row that sees nothing is zero."""
    numbers = scoring.numbers
    grouped = q.float().unflatten(2, (keys.shape[2], -1))
    scores = torch.einsum("brhgd,blhd->bhgrl", grouped, keys.float()) * numbers.scale
    if numbers.softcap:
        scores = numbers.softcap * torch.tanh(scores / numbers.softcap)
    by_head = (1, keys.shape[2], -1, 1, 1)
    if scoring.alibi_slopes is not None:
        scores = scores + scoring.alibi_slopes.view(by_head) * (positions - own[..., None])[:, None, None]
    seen = visible(own[..., None], positions, numbers)[:, None, None]
    scores = scores.masked_fill(~seen, float("-inf"))
    if scoring.sinks is not None:
        scores = torch.cat((scores, scoring.sinks.view(by_head).expand(*scores.shape[:-1], 1)), dim=-1)
    weights = scores.softmax(dim=-1).nan_to_num(0.0)[..., : len(positions)]
    return torch.einsum("bhgrl,blhd->brhgd", weights, values.float()).flatten(2, 3).to(q.dtype)


def visible(own: Tensor, positions: Tensor, numbers: Numbers) -> Tensor:
    """Which positions a row at position `own` sees; the shapes broadcast."""
    seen = positions <= own
    if numbers.window:
        seen = seen & (positions > own - numbers.window)
    if numbers.segment:
        seen = seen & (positions >= own // numbers.segment * numbers.segment)
    return seen
