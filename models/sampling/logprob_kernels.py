# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton functions take Triton's own types, for which there is no type information.)
"""Log-probabilities on CUDA: what logprobs.py does, in two Triton launches a graph may capture.

Owns the launches and their scratch. A row that asks for nothing costs a program that reads one word and ends. Called
through `Sampler` (package module). One compilation serves all buckets, wherever their fields lie.

1. `_part_kernel`   (row, tile of the vocabulary): its largest score, the sum of exponentials under it, how many tokens
                    come before the chosen one, and its likeliest tokens, as keys that order like the tokens do.
2. `_merge_kernel`  a row: puts the tiles together.

Scores and tokens are ordered by one int64 key, so that no two are equal, and the largest key of a tile is found as
often as likeliest tokens are asked for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphgen.ipc import step_schema
from graphgen.ipc.worker_messages import MAX_LOGPROBS
from graphgen.models.sampling.device import (
    LARGEST_FLOAT,
    MAX_INT32,
    MINUS_INF,
    exp_not_positive,
    log_positive,
    ordered_key,
)

LOGPROB_WORDS = tl.constexpr(step_schema.LOGPROB_WORDS)
MOST_TOP = tl.constexpr(MAX_LOGPROBS)
KEYS = tl.constexpr(32)  # of a part; a power of two above MAX_LOGPROBS
LOWEST_KEY = tl.constexpr(-(2**63))

_TILE = 4096


@triton.jit
def _cleaned(scores):
    # NaN is the one value that differs from itself.
    return tl.where(scores != scores, MINUS_INF, tl.minimum(scores, LARGEST_FLOAT))


@triton.jit
def _order_key(scores, token_ids):
    return (ordered_key(scores).to(tl.int64) << 32) | (token_ids ^ MAX_INT32).to(tl.int64)


@triton.jit
def _score_of(keys):
    ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & MAX_INT32)).to(tl.float32, bitcast=True)


@triton.jit
def _chosen_score(logits, token_ids, vocab_size):
    """The row's own token, which is none where nothing could be drawn, and its score."""
    token = tl.minimum(tl.maximum(tl.load(token_ids).to(tl.int32), 0), vocab_size - 1)
    return token, _cleaned(tl.load(logits + token).to(tl.float32))


@triton.jit(do_not_specialize=["token_ids", "asked", "places", "token_stride", "asked_stride", "num_parts"])
def _part_kernel(
    logits,
    row_stride,
    token_ids,
    token_stride,
    asked,
    asked_stride,
    places,
    part_largest,
    part_totals,
    part_ahead,
    part_keys,
    vocab_size,
    num_parts,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    num_top = tl.load(asked + tl.load(places + row).to(tl.int64) * asked_stride) - 1
    if num_top < 0:
        return
    part = tl.program_id(1)
    logits += row * row_stride
    token, score = _chosen_score(logits, token_ids + row * token_stride, vocab_size)
    ids = part * TILE + tl.arange(0, TILE)
    inside = ids < vocab_size
    scores = _cleaned(tl.load(logits + ids, mask=inside, other=MINUS_INF).to(tl.float32))
    keys = tl.where(inside, _order_key(scores, ids), LOWEST_KEY)
    largest = tl.max(scores, axis=0)
    total = tl.sum(tl.where(scores > MINUS_INF, exp_not_positive(scores - largest), 0.0), axis=0)
    ahead = tl.sum((keys > _order_key(score, token)).to(tl.int32), axis=0)
    place = row * num_parts + part
    tl.store(part_largest + place, largest)
    tl.store(part_totals + place, total)
    tl.store(part_ahead + place, ahead)
    number = tl.full([], 0, tl.int32)
    while number < num_top:
        best = tl.max(keys, axis=0)
        tl.store(part_keys + place * KEYS + number, best)
        keys = tl.where(keys == best, LOWEST_KEY, keys)
        number += 1


@triton.jit(
    do_not_specialize=[
        *("token_ids", "asked", "places", "rings", "ring_row"),
        *("token_stride", "asked_stride", "num_parts", "ring_stride"),
    ]
)
def _merge_kernel(
    logits,
    row_stride,
    token_ids,
    token_stride,
    asked,
    asked_stride,
    places,
    part_largest,
    part_totals,
    part_ahead,
    part_keys,
    rings,
    ring_row,
    ring_stride,
    vocab_size,
    num_parts,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    num_top = tl.load(asked + tl.load(places + row).to(tl.int64) * asked_stride) - 1
    if num_top < 0:
        return
    _, score = _chosen_score(logits + row * row_stride, token_ids + row * token_stride, vocab_size)
    parts = tl.arange(0, PARTS)
    inside = parts < num_parts
    largest = tl.load(part_largest + row * num_parts + parts, mask=inside, other=MINUS_INF)
    totals = tl.load(part_totals + row * num_parts + parts, mask=inside, other=0.0)
    ahead = tl.sum(tl.load(part_ahead + row * num_parts + parts, mask=inside, other=0), axis=0)
    row_largest = tl.max(largest, axis=0)
    total = tl.sum(tl.where(totals > 0.0, totals * exp_not_positive(largest - row_largest), 0.0), axis=0)
    # A row of nothing but -inf has a total of 0, and no probabilities: -inf for all.
    log_total = row_largest + log_positive(tl.maximum(total, 1.0))

    out = rings + tl.load(ring_row).to(tl.int64) * ring_stride + row * LOGPROB_WORDS
    value = tl.where(total > 0.0, score - log_total, MINUS_INF)
    tl.store(out, value.to(tl.int32, bitcast=True))
    tl.store(out + 1, ahead + 1)
    numbers = tl.arange(0, KEYS)
    known = inside[:, None] & (numbers < num_top)[None, :]
    keys = tl.load(
        part_keys + (row * num_parts + parts)[:, None] * KEYS + numbers[None, :], mask=known, other=LOWEST_KEY
    )
    number = tl.full([], 0, tl.int32)
    while number < num_top:
        best = tl.max(tl.max(keys, axis=1), axis=0)
        value = tl.where(total > 0.0, _score_of(best) - log_total, MINUS_INF)
        tl.store(out + 2 + number, (best & 0xFFFFFFFF).to(tl.int32) ^ MAX_INT32)
        tl.store(out + 2 + MOST_TOP + number, value.to(tl.int32, bitcast=True))
        keys = tl.where(keys == best, LOWEST_KEY, keys)
        number += 1


def write_logprobs(
    logits: Tensor, token_ids: Tensor, asked: Tensor, places: Tensor, rings: Tensor, ring_row: Tensor
) -> None:
    """As logprobs.write_logprobs."""
    num_rows, vocab_size = logits.shape
    num_parts = triton.cdiv(vocab_size, _TILE)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_rows, num_parts, *shape, dtype=dtype, device=logits.device)

    scratch = (
        empty(dtype=torch.float32),
        empty(dtype=torch.float32),
        empty(dtype=torch.int32),
        empty(KEYS.value, dtype=torch.int64),
    )
    inputs = (logits, logits.stride(0), token_ids, token_ids.stride(0), asked, asked.stride(0), places, *scratch)
    _part_kernel[(num_rows, num_parts)](*inputs, vocab_size, num_parts, TILE=_TILE, num_warps=8)
    _merge_kernel[(num_rows,)](
        *inputs,
        rings,
        ring_row,
        rings.stride(0),
        vocab_size,
        num_parts,
        PARTS=triton.next_power_of_2(num_parts),
    )
