# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton functions take Triton's own types, for which there is no type information.)
"""The Triton kernels of a draw: the rules of reference.py, the same tokens from equal logits.

Owns the search for the kept tokens. Never launched from elsewhere than kernels.py; built from device.py.

A draw is four launches over (row, part of the vocabulary); what a row needs is decided on the device:
1. `best_kernel`     all rows. Greedy rows and rows that draw from all tokens: the best of each part. Others: the
                     largest score of each part. One reading of the logits.
2. `outline_kernel`  rows with top-k or top-p: how many tokens, or how much mass, lie above 16 levels under the
                     row's largest score.
3. `collect_kernel`  rows that draw from fewer tokens than all: the outline says how deep the kept ones reach at
                     most; the tokens down to there are gathered as candidates.
4. `finish_kernel`   one program a row: the best of the parts; or the exact threshold by bisection over the ordered
                     bits of the candidates' scores, and the draw. Where the candidates were too many for their
                     buffer it works on the whole row, slower and with the same result.
Nothing is sorted. Counts and masses that decide are integers, so the order of sums and of gathering cannot matter.

Loops are written with `while`, which Triton's interpreter runs with bounds read on the device, too.
Parts and tiles are not specialised on: one compilation serves every number of rows.
"""

import triton
import triton.language as tl

from graphgen.models.sampling.device import (
    BIAS_WIDTH,
    MASS_ONE,
    MAX_INT32,
    MIN_P,
    MINUS_INF,
    NO_TOKEN,
    ROW_WIDTH,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    allowed_tokens,
    exp_not_positive,
    float_setting,
    has_filter,
    has_rank_filter,
    log_positive,
    lowest_best,
    mass,
    ordered_key,
    seed_setting,
    tile_noise,
    tile_scores,
    token_noise,
)

MOST_PARTS = tl.constexpr(128)
LEVELS = tl.constexpr(16)
PIVOTS = tl.constexpr(8)
LEAST_STEP = tl.constexpr(1e-6)
LOWEST_KEY = tl.constexpr(-(2**31))
"""No key is lower, see `ordered_key`."""
# Masses are summed as floats where they only outline: far more than those sums err, far less than matters.
OUTLINE_ERROR = tl.constexpr(1e-5)


@triton.jit(do_not_specialize=["num_parts", "num_tiles"])
def best_kernel(
    logits,
    row_stride,
    settings,
    occurrences,
    biases,
    slots,
    positions,
    masks,
    masked,
    part_scores,
    part_ids,
    num_candidates,
    vocab_size,
    num_parts,
    num_tiles,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row).to(tl.int32)
    settings += slot * ROW_WIDTH
    filtered = has_filter(settings, vocab_size)
    temperature = float_setting(settings, TEMPERATURE)
    noisy = (temperature > 0.0) & (not filtered)
    # Filters come before the mask: the largest score of all tokens is what they start from.
    obeys_mask = (tl.load(masked + slot) == position + 1) & (not filtered)
    masks += slot * ((vocab_size + 31) // 32)
    seed = seed_setting(settings)
    first = part * num_tiles * TILE
    best_scores = tl.full([TILE], MINUS_INF, tl.float32)
    best_ids = first + tl.arange(0, TILE)
    tile = tl.full([], 0, tl.int32)
    while tile < num_tiles:
        start = first + tile * TILE
        token_ids = start + tl.arange(0, TILE)
        scores = tile_scores(
            logits + row * row_stride,
            occurrences + slot * vocab_size,
            biases + slot * BIAS_WIDTH,
            settings,
            position,
            token_ids,
            vocab_size,
        )
        if noisy:
            scores += temperature * tile_noise(seed, position, start, TILE)
        if obeys_mask:
            scores = tl.where(allowed_tokens(masks, token_ids, vocab_size), scores, MINUS_INF)
        better = scores > best_scores
        best_scores = tl.where(better, scores, best_scores)
        best_ids = tl.where(better, token_ids, best_ids)
        tile += 1
    best, best_id = lowest_best(best_scores, best_ids)
    tl.store(part_scores + row * num_parts + part, best)
    tl.store(part_ids + row * num_parts + part, best_id)
    if part == 0:
        tl.store(num_candidates + row, 0)


@triton.jit
def _row_max(part_scores, row, num_parts):
    parts = tl.arange(0, MOST_PARTS)
    return tl.max(tl.load(part_scores + row * num_parts + parts, mask=parts < num_parts, other=MINUS_INF), axis=0)


@triton.jit
def _levels(row_max, temperature):
    """Scores under the largest one, growing in distance: 0.1, 0.4, 0.9, ... 25.6 temperatures.

    Under a tiny temperature still a step that a float32 can make, so that the largest score itself lies above them.
    """
    steps = tl.arange(0, LEVELS).to(tl.float32) + 1.0
    return row_max - tl.maximum(temperature * (steps * steps * 0.1), tl.abs(row_max) * LEAST_STEP)


@triton.jit(do_not_specialize=["num_parts", "num_tiles"])
def outline_kernel(
    logits,
    row_stride,
    settings,
    occurrences,
    biases,
    slots,
    positions,
    part_scores,
    part_levels,
    part_masses,
    vocab_size,
    num_parts,
    num_tiles,
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
    row_max = _row_max(part_scores, row, num_parts)
    temperature = float_setting(settings, TEMPERATURE)
    levels = _levels(row_max, temperature)
    above = tl.zeros([LEVELS], tl.float32)
    total = tl.zeros([TILE], tl.int64)
    tile = tl.full([], 0, tl.int32)
    while tile < num_tiles:
        token_ids = (part * num_tiles + tile) * TILE + tl.arange(0, TILE)
        scores = tile_scores(
            logits + row * row_stride,
            occurrences + slot * vocab_size,
            biases + slot * BIAS_WIDTH,
            settings,
            position,
            token_ids,
            vocab_size,
        )
        weights = tl.full([TILE], 1.0, tl.float32)
        if not by_count:
            weights = exp_not_positive(_relative(scores, row_max, temperature))
            total += mass(_relative(scores, row_max, temperature))
        above += tl.sum(tl.where(scores[None, :] > levels[:, None], weights[None, :], 0.0), axis=1)
        tile += 1
    tl.store(part_levels + (row * num_parts + part) * LEVELS + tl.arange(0, LEVELS), above)
    tl.store(part_masses + row * num_parts + part, tl.sum(total, axis=0))


@triton.jit
def _relative(scores, row_max, temperature):
    """Log-probability relative to the likeliest token. -inf minus -inf must not become NaN.

    The largest score goes before the division: the quotient of a score alone and a small temperature is infinite.
    """
    distances = tl.where(scores > MINUS_INF, scores - row_max, MINUS_INF)
    return tl.div_rn(distances, tl.zeros_like(distances) + temperature)


@triton.jit
def _total_mass(part_masses, row, num_parts):
    parts = tl.arange(0, MOST_PARTS)
    return tl.sum(tl.load(part_masses + row * num_parts + parts, mask=parts < num_parts, other=0), axis=0)


@triton.jit
def _bracket(settings, part_levels, part_masses, row, row_max, vocab_size, num_parts):
    """Two scores between which the outline places the threshold of top-k, or of top-p alone: (under, over).

    What `under` or more excludes no kept token; for rows with min-p alone `under` is the exact threshold.
    """
    under = row_max
    over = row_max
    temperature = float_setting(settings, TEMPERATURE)
    if has_rank_filter(settings, vocab_size):
        parts = tl.arange(0, MOST_PARTS)
        places = (row * num_parts + parts)[:, None] * LEVELS + tl.arange(0, LEVELS)[None, :]
        above = tl.sum(tl.load(part_levels + places, mask=(parts < num_parts)[:, None], other=0.0), axis=0)
        top_k = tl.load(settings + TOP_K)
        wanted = top_k.to(tl.float32)
        wanted_surely = wanted
        if (top_k <= 0) | (top_k >= vocab_size):
            total = _total_mass(part_masses, row, num_parts).to(tl.float32) / MASS_ONE
            wanted = float_setting(settings, TOP_P) * total * (1.0 - OUTLINE_ERROR)
            wanted_surely = float_setting(settings, TOP_P) * total * (1.0 + OUTLINE_ERROR)
        levels = _levels(row_max, temperature)
        under = tl.max(tl.where(above >= wanted_surely, levels, MINUS_INF), axis=0)
        over = tl.min(tl.where(above < wanted, levels, row_max), axis=0)
    else:
        under = row_max + temperature * log_positive(float_setting(settings, MIN_P))
    return under, over


@triton.jit(do_not_specialize=["num_parts", "num_tiles"])
def collect_kernel(
    logits,
    row_stride,
    settings,
    occurrences,
    biases,
    slots,
    positions,
    part_scores,
    part_levels,
    part_masses,
    candidate_scores,
    candidate_ids,
    num_candidates,
    vocab_size,
    num_parts,
    num_tiles,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    settings += slot * ROW_WIDTH
    if not has_filter(settings, vocab_size):
        return
    position = tl.load(positions + row).to(tl.int32)
    row_max = _row_max(part_scores, row, num_parts)
    under, _ = _bracket(settings, part_levels, part_masses, row, row_max, vocab_size, num_parts)
    if (under == MINUS_INF) & (vocab_size > CAPACITY):
        tl.store(num_candidates + row, vocab_size)
        return
    if tl.load(part_scores + row * num_parts + part) < under:
        return
    tile = tl.full([], 0, tl.int32)
    while tile < num_tiles:
        token_ids = (part * num_tiles + tile) * TILE + tl.arange(0, TILE)
        scores = tile_scores(
            logits + row * row_stride,
            occurrences + slot * vocab_size,
            biases + slot * BIAS_WIDTH,
            settings,
            position,
            token_ids,
            vocab_size,
        )
        chosen = (scores >= under) & (token_ids < vocab_size)
        count = tl.sum(chosen.to(tl.int32), axis=0)
        if count > 0:
            base = tl.atomic_add(num_candidates + row, count, sem="relaxed")
            places = base + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            stored = chosen & (places < CAPACITY)
            tl.store(candidate_scores + row * CAPACITY + places, scores, mask=stored)
            tl.store(candidate_ids + row * CAPACITY + places, token_ids, mask=stored)
        tile += 1


@triton.jit
def _items(start, source, TILE: tl.constexpr):
    """Scores and token ids of a tile of the row's items: its candidates, or all its tokens.

    Past the end -inf and no token. source: what `finish_kernel` puts together.
    """
    num_items, gathered, scores_of, ids_of, logits, occurrences, biases, settings, position, vocab_size = source
    places = start + tl.arange(0, TILE)
    inside = places < num_items
    if gathered:
        scores = tl.load(scores_of + places, mask=inside, other=MINUS_INF)
        token_ids = tl.load(ids_of + places, mask=inside, other=MAX_INT32)
    else:
        scores = tile_scores(logits, occurrences, biases, settings, position, places, vocab_size)
        token_ids = tl.where(inside, places, MAX_INT32)
    return scores, token_ids


@triton.jit
def _threshold(low, high, limit, by_count, row_max, temperature, num_items, source, TILE: tl.constexpr):
    """The smallest key with less than `limit` (tokens or mass) above it, in (low, high].

    `low` has at least the limit above it. Each round reads the items once and leaves a ninth of the interval.
    """
    while high - low > 1:
        pivots = low + (high - low) * (tl.arange(0, PIVOTS).to(tl.int64) + 1) // (PIVOTS + 1)
        above = tl.zeros([PIVOTS], tl.int64)
        start = tl.full([], 0, tl.int32)
        while start < num_items:
            scores, _ = _items(start, source, TILE)
            weights = tl.full([TILE], 1, tl.int64)
            if not by_count:
                weights = mass(_relative(scores, row_max, temperature))
            higher = ordered_key(scores)[None, :] > pivots.to(tl.int32)[:, None]
            above += tl.sum(tl.where(higher, weights[None, :], 0), axis=1)
            start += TILE
        enough = above >= limit
        low = tl.maximum(low, tl.max(tl.where(enough, pivots, low), axis=0))
        high = tl.minimum(high, tl.min(tl.where(enough, high, pivots), axis=0))
    return high


@triton.jit
def _draw(num_items, source, threshold, seed, temperature, masks, obeys_mask, vocab_size, TILE: tl.constexpr):
    """The best of the row's items whose key is the threshold or more and that its mask allows, and its token id."""
    position = source[8]
    best_scores = tl.full([TILE], MINUS_INF, tl.float32)
    best_ids = tl.full([TILE], MAX_INT32, tl.int32)
    start = tl.full([], 0, tl.int32)
    while start < num_items:
        scores, token_ids = _items(start, source, TILE)
        kept = ordered_key(scores) >= threshold
        if obeys_mask:
            kept = kept & allowed_tokens(masks, token_ids, vocab_size)
        scores = tl.where(kept, scores + temperature * token_noise(seed, position, token_ids), MINUS_INF)
        better = (scores > best_scores) | ((scores == best_scores) & (token_ids < best_ids))
        best_scores = tl.where(better, scores, best_scores)
        best_ids = tl.where(better, token_ids, best_ids)
        start += TILE
    return lowest_best(best_scores, best_ids)


@triton.jit(do_not_specialize=["num_parts"])
def finish_kernel(
    logits,
    row_stride,
    settings,
    occurrences,
    biases,
    slots,
    positions,
    masks,
    masked,
    part_scores,
    part_ids,
    part_levels,
    part_masses,
    candidate_scores,
    candidate_ids,
    num_candidates,
    tokens,
    vocab_size,
    num_parts,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    settings += slot * ROW_WIDTH
    if not has_filter(settings, vocab_size):
        parts = tl.arange(0, MOST_PARTS)
        scores = tl.load(part_scores + row * num_parts + parts, mask=parts < num_parts, other=MINUS_INF)
        token_ids = tl.load(part_ids + row * num_parts + parts, mask=parts < num_parts, other=MAX_INT32)
        best, best_id = lowest_best(scores, token_ids)
        tl.store(tokens + row, tl.where(best > MINUS_INF, best_id, NO_TOKEN))
        return
    position = tl.load(positions + row).to(tl.int32)
    logits += row * row_stride
    occurrences += slot * vocab_size
    biases += slot * BIAS_WIDTH
    count = tl.load(num_candidates + row)
    gathered = count <= CAPACITY
    num_items = tl.where(gathered, count, vocab_size)
    scores_of = candidate_scores + row * CAPACITY
    ids_of = candidate_ids + row * CAPACITY
    source = (num_items, gathered, scores_of, ids_of, logits, occurrences, biases, settings, position, vocab_size)
    row_max = _row_max(part_scores, row, num_parts)
    under, over = _bracket(settings, part_levels, part_masses, row, row_max, vocab_size, num_parts)

    temperature = float_setting(settings, TEMPERATURE)
    low = ordered_key(under).to(tl.int64) - 1
    high = ordered_key(over).to(tl.int64)
    threshold = low
    top_k = tl.load(settings + TOP_K)
    by_count = (top_k > 0) & (top_k < vocab_size)
    if by_count:
        threshold = _threshold(low, high, top_k.to(tl.int64), True, row_max, temperature, num_items, source, TILE)
        low = threshold - 1
        high = ordered_key(row_max).to(tl.int64)
    top_p = float_setting(settings, TOP_P)
    if top_p < 1.0:
        total = tl.zeros([], tl.int64)
        if by_count:
            start = tl.full([], 0, tl.int32)
            while start < num_items:
                scores, _ = _items(start, source, TILE)
                kept = ordered_key(scores) >= threshold.to(tl.int32)
                total += tl.sum(tl.where(kept, mass(_relative(scores, row_max, temperature)), 0), axis=0)
                start += TILE
        else:
            total += _total_mass(part_masses, row, num_parts)
        limit = (total.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64)
        threshold = _threshold(low, high, limit, False, row_max, temperature, num_items, source, TILE)
    min_p = float_setting(settings, MIN_P)
    if min_p > 0.0:
        threshold = tl.maximum(threshold, ordered_key(row_max + temperature * log_positive(min_p)).to(tl.int64))

    seed = seed_setting(settings)
    obeys_mask = tl.load(masked + slot) == position + 1
    masks += slot * ((vocab_size + 31) // 32)
    best, best_id = _draw(num_items, source, threshold, seed, temperature, masks, obeys_mask, vocab_size, TILE)
    if obeys_mask & (best == MINUS_INF):
        # The mask allows nothing that was kept: all that it allows are left.
        everything = (
            vocab_size,
            count < 0,
            scores_of,
            ids_of,
            logits,
            occurrences,
            biases,
            settings,
            position,
            vocab_size,
        )
        lowest = tl.full([], LOWEST_KEY, tl.int64)
        best, best_id = _draw(vocab_size, everything, lowest, seed, temperature, masks, obeys_mask, vocab_size, TILE)
    tl.store(tokens + row, tl.where(best > MINUS_INF, best_id, NO_TOKEN))
