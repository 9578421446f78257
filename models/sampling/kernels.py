# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton functions take Triton's own types, for which there is no type information.)
"""Sampling on CUDA: the rules of reference.py as Triton kernels, the same tokens from equal logits.

Owns the kernels, their scratch and their launches. Never waits for the device and allocates only scratch, so a graph
may capture every function. Called through `Sampler` (package module) by the worker's step.

A draw is four launches over (row, part of the vocabulary), the decision what a row needs is taken on the device:
1. `_best_kernel`     all rows. Greedy rows and rows that draw from all tokens: the best of each part. Others: the
                      largest score of each part. One reading of the logits.
2. `_outline_kernel`  rows that draw from fewer: how many tokens, or how much mass, lie above 16 levels under the
                      row's largest score.
3. `_collect_kernel`  the same rows: the outline says how deep the kept tokens can reach at most; the tokens down to
                      there are gathered as candidates.
4. `_finish_kernel`   one program a row: the best of the parts; or the exact threshold by bisection over the ordered
                      bits of the candidates' scores, and the draw. If the candidates were too many for their
                      buffer, it works on the whole row, slower and with the same result.
Nothing is sorted. Counts and masses that decide are integers, so the order of sums and of gathering cannot matter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphgen.models.sampling.device import (
    IN_PROMPT,
    MAX_INT32,
    MIN_P,
    MINUS_INF,
    PROMPT_LEN,
    ROW_WIDTH,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    float_setting,
    has_filter,
    has_rank_filter,
    log_positive,
    lowest_best,
    mass,
    exp_not_positive,
    ordered_key,
    seed_setting,
    tile_noise,
    tile_scores,
    token_noise,
)
from graphgen.models.sampling.tables import SamplerTables

CANDIDATES = 8192
"""Candidates gathered per row; a row with more is searched in place."""

_TILE = 1024
_FINISH_TILE = 2048
_PROGRAMS = 4096
"""Programs a launch over all rows aims at: some waves over any device of today."""
_MOST_PARTS = 128
_COUNT_TILE = 256
_CLEAR_TILE = 8192

LEVELS = tl.constexpr(16)
PIVOTS = tl.constexpr(8)
# Masses are summed as floats where they only outline; far more than those sums err, far less than matters.
OUTLINE_ERROR = tl.constexpr(1e-5)


# --- Slots and counts ------------------------------------------------------------------------------------------


@triton.jit
def _write_slots_kernel(
    settings, occurrences, rows, slots, inits, vocab_size, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    chunk = tl.program_id(0)
    if tl.load(inits + chunk) == 0:
        return
    slot = tl.load(slots + chunk).to(tl.int64)
    if tl.program_id(1) == 0:
        columns = tl.arange(0, WIDTH)
        row = tl.load(rows + chunk * ROW_WIDTH + columns, mask=columns < ROW_WIDTH)
        tl.store(settings + slot * ROW_WIDTH + columns, row, mask=columns < ROW_WIDTH)
    token_ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    nothing = tl.zeros([TILE], tl.int32)
    tl.store(occurrences + slot * vocab_size + token_ids, nothing, mask=token_ids < vocab_size)


@triton.jit
def _count_kernel(
    settings, occurrences, token_ids, slots, positions, num_rows, trash_slot, vocab_size, TILE: tl.constexpr
):
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    slot = tl.load(slots + rows, mask=rows < num_rows, other=trash_slot).to(tl.int64)
    live = slot != trash_slot
    token_id = tl.load(token_ids + rows, mask=live, other=0)
    position = tl.load(positions + rows, mask=live, other=0)
    in_prompt = position < tl.load(settings + slot * ROW_WIDTH + PROMPT_LEN, mask=live, other=0)
    entry = occurrences + slot * vocab_size + token_id
    tl.atomic_or(entry, tl.full([TILE], IN_PROMPT, tl.int32), mask=live & in_prompt, sem="relaxed")
    tl.atomic_add(entry, tl.full([TILE], 1, tl.int32), mask=live & (position >= 0) & ~in_prompt, sem="relaxed")


# --- The draw --------------------------------------------------------------------------------------------------


@triton.jit
def _best_kernel(
    logits,
    row_stride,
    settings,
    occurrences,
    slots,
    positions,
    part_scores,
    part_ids,
    num_candidates,
    vocab_size,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row).to(tl.int32)
    settings += slot * ROW_WIDTH
    filtered = has_filter(settings, vocab_size)
    noisy = (float_setting(settings, TEMPERATURE) > 0.0) & (not filtered)
    seed = seed_setting(settings)
    first = part * TILES * TILE
    best_scores = tl.full([TILE], MINUS_INF, tl.float32)
    best_ids = first + tl.arange(0, TILE)
    for tile in range(TILES):
        start = first + tile * TILE
        token_ids = start + tl.arange(0, TILE)
        scores = tile_scores(
            logits + row * row_stride, occurrences + slot * vocab_size, settings, position, token_ids, vocab_size
        )
        if noisy:
            scores += tile_noise(seed, position, start, TILE)
        better = scores > best_scores
        best_scores = tl.where(better, scores, best_scores)
        best_ids = tl.where(better, token_ids, best_ids)
    best, best_id = lowest_best(best_scores, best_ids)
    tl.store(part_scores + row * PARTS + part, best)
    tl.store(part_ids + row * PARTS + part, best_id)
    if part == 0:
        tl.store(num_candidates + row, 0)


@triton.jit
def _row_max(part_scores, row, PARTS: tl.constexpr, PADDED: tl.constexpr):
    parts = tl.arange(0, PADDED)
    return tl.max(tl.load(part_scores + row * PARTS + parts, mask=parts < PARTS, other=MINUS_INF), axis=0)


@triton.jit
def _levels(row_max):
    """Scores under the largest one, growing in distance: 0.1, 0.4, 0.9, ... 25.6."""
    steps = tl.arange(0, LEVELS).to(tl.float32) + 1.0
    return row_max - steps * steps * 0.1


@triton.jit
def _outline_kernel(
    logits,
    row_stride,
    settings,
    occurrences,
    slots,
    positions,
    part_scores,
    part_levels,
    part_masses,
    vocab_size,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of each part: how many tokens (rows with top-k) or how much mass (top-p alone) lie above each level."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    settings += slot * ROW_WIDTH
    if not (has_filter(settings, vocab_size) & has_rank_filter(settings, vocab_size)):
        return
    position = tl.load(positions + row).to(tl.int32)
    top_k = tl.load(settings + TOP_K)
    by_count = (top_k > 0) & (top_k < vocab_size)
    row_max = _row_max(part_scores, row, PARTS, PADDED)
    levels = _levels(row_max)
    above = tl.zeros([LEVELS], tl.float32)
    total = tl.zeros([TILE], tl.int64)
    for tile in range(TILES):
        token_ids = (part * TILES + tile) * TILE + tl.arange(0, TILE)
        scores = tile_scores(
            logits + row * row_stride, occurrences + slot * vocab_size, settings, position, token_ids, vocab_size
        )
        weights = tl.full([TILE], 1.0, tl.float32)
        if not by_count:
            weights = exp_not_positive(_relative(scores, row_max))
            total += mass(_relative(scores, row_max))
        above += tl.sum(tl.where(scores[None, :] > levels[:, None], weights[None, :], 0.0), axis=1)
    tl.store(part_levels + (row * PARTS + part) * LEVELS + tl.arange(0, LEVELS), above)
    tl.store(part_masses + row * PARTS + part, tl.sum(total, axis=0))


@triton.jit
def _relative(scores, row_max):
    """Log-probability relative to the likeliest token. -inf minus -inf must not become NaN."""
    return tl.where(scores > MINUS_INF, scores - row_max, MINUS_INF)


@triton.jit
def _total_mass(part_masses, row, PARTS: tl.constexpr, PADDED: tl.constexpr):
    parts = tl.arange(0, PADDED)
    return tl.sum(tl.load(part_masses + row * PARTS + parts, mask=parts < PARTS, other=0), axis=0)


@triton.jit
def _bracket(
    settings, part_levels, part_masses, row, row_max, vocab_size, PARTS: tl.constexpr, PADDED: tl.constexpr
):
    """Two scores between which the outline places the threshold of top-k, or of top-p alone: (under, over).

    What `under` or more excludes no kept token; for rows with min-p alone `under` is the exact threshold.
    """
    under = row_max
    over = row_max
    if has_rank_filter(settings, vocab_size):
        parts = tl.arange(0, PADDED)
        places = (row * PARTS + parts)[:, None] * LEVELS + tl.arange(0, LEVELS)[None, :]
        above = tl.sum(tl.load(part_levels + places, mask=(parts < PARTS)[:, None], other=0.0), axis=0)
        top_k = tl.load(settings + TOP_K)
        wanted = top_k.to(tl.float32)
        wanted_surely = wanted
        if (top_k <= 0) | (top_k >= vocab_size):
            total = _total_mass(part_masses, row, PARTS, PADDED).to(tl.float32) / MASS_ONE_F
            wanted = float_setting(settings, TOP_P) * total * (1.0 - OUTLINE_ERROR)
            wanted_surely = float_setting(settings, TOP_P) * total * (1.0 + OUTLINE_ERROR)
        levels = _levels(row_max)
        under = tl.max(tl.where(above >= wanted_surely, levels, MINUS_INF), axis=0)
        over = tl.min(tl.where(above < wanted, levels, row_max), axis=0)
    else:
        under = row_max + log_positive(float_setting(settings, MIN_P))
    return under, over


@triton.jit
def _collect_kernel(
    logits,
    row_stride,
    settings,
    occurrences,
    slots,
    positions,
    part_scores,
    part_levels,
    part_masses,
    candidate_scores,
    candidate_ids,
    num_candidates,
    vocab_size,
    CAPACITY: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    settings += slot * ROW_WIDTH
    if not has_filter(settings, vocab_size):
        return
    position = tl.load(positions + row).to(tl.int32)
    row_max = _row_max(part_scores, row, PARTS, PADDED)
    # A part that holds no candidate is left out.
    under, _ = _bracket(settings, part_levels, part_masses, row, row_max, vocab_size, PARTS, PADDED)
    if tl.load(part_scores + row * PARTS + part) < under:
        return
    for tile in range(TILES):
        token_ids = (part * TILES + tile) * TILE + tl.arange(0, TILE)
        scores = tile_scores(
            logits + row * row_stride, occurrences + slot * vocab_size, settings, position, token_ids, vocab_size
        )
        chosen = (scores >= under) & (token_ids < vocab_size)
        count = tl.sum(chosen.to(tl.int32), axis=0)
        if count > 0:
            base = tl.atomic_add(num_candidates + row, count, sem="relaxed")
            places = base + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            stored = chosen & (places < CAPACITY)
            tl.store(candidate_scores + row * CAPACITY + places, scores, mask=stored)
            tl.store(candidate_ids + row * CAPACITY + places, token_ids, mask=stored)
