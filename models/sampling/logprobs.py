"""Log-probabilities of tokens in torch, on any device: what the Triton kernels are held to, and what serves on the CPU.

Owns their meaning: the log-softmax of the logits as the model gives them, over all of them, before a temperature, a
penalty, a filter or a mask. Called through `Sampler` (package module) for drawing rows, and for rows whose next token
is known. It selects rows by value, which a captured graph cannot: on CUDA logprob_kernels.py computes the same.

Ranks count from 1. The likelier token comes first, of equal ones the lower id. NaN counts as -inf, +inf as the largest
float, as in a draw.

Shapes: `N` rows, `V` vocabulary. What is written of a row: `step_schema.LOGPROB_WORDS`.
"""

import torch
from torch import Tensor

from graphgen.ipc.step_schema import LOGPROB_WORDS
from graphgen.models.sampling.arithmetic import LARGEST_FLOAT

_MAX_INT32 = 2**31 - 1


def write_logprobs(
    logits: Tensor, token_ids: Tensor, asked: Tensor, places: Tensor, rings: Tensor, ring_row: Tensor
) -> None:
    """logits: [N, V] of any float type. token_ids: [N], whose log-probabilities are asked for.

    asked: 1 + the likeliest tokens that row `n` asks for lie at places[n]; 0 asks for nothing. rings: int32 [rows of a
    ring, N * LOGPROB_WORDS], of which the row ring_row, [1], is written, where something is asked for.
    """
    wanted = asked[places.long()]
    rows = wanted.nonzero().squeeze(1)
    if not len(rows):
        return
    num_top = int(wanted.max()) - 1
    scores = logits[rows].float().nan_to_num_(nan=float("-inf"), posinf=LARGEST_FLOAT, neginf=float("-inf"))
    chosen = token_ids[rows].long().clamp(min=0).unsqueeze(1)
    keys = _order_keys(scores)
    largest = scores.amax(1, keepdim=True)
    total = (scores - largest).nan_to_num_(nan=float("-inf")).exp_().sum(1, keepdim=True)
    log_total = largest + total.log()
    top = _MAX_INT32 - (keys.topk(num_top, dim=1).values & 0xFFFFFFFF)
    found = torch.cat((chosen, top), dim=1)
    # A row of nothing but -inf has no probabilities: -inf for all.
    values = (scores.gather(1, found) - log_total).nan_to_num_(nan=float("-inf"), neginf=float("-inf"))
    ranks = 1 + (keys > keys.gather(1, chosen)).sum(1, keepdim=True)
    words = torch.zeros(len(rows), LOGPROB_WORDS, dtype=torch.int32, device=logits.device)
    words[:, :1] = values[:, :1].view(torch.int32)
    words[:, 1:2] = ranks
    words[:, 2 : 2 + num_top] = top
    first = 2 + (LOGPROB_WORDS - 2) // 2
    words[:, first : first + num_top] = values[:, 1:].contiguous().view(torch.int32)
    rings.view(len(rings), -1, LOGPROB_WORDS)[int(ring_row), rows] = words


def _order_keys(scores: Tensor) -> Tensor:
    """int64 keys of which the larger one comes first: by score, of equal ones by the lower id. Zero has one key."""
    bits = (scores + 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & _MAX_INT32)).long()
    return (ordered << 32) | (_MAX_INT32 - torch.arange(scores.shape[1], device=scores.device))
