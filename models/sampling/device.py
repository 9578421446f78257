# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton functions take Triton's own types, for which there is no type information.)
"""Triton functions the sampling kernels are built from: the rules of reference.py for a tile of one row.

Owns the arithmetic (that of arithmetic.py, operation by operation; launch with `enable_fp_fusion=False`, a fused
multiply-add rounds differently) and the reading of settings, logits and counts. Never launched; called by kernels.py.
"""

import triton
import triton.language as tl

from graphgen.ipc.worker_messages import MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS
from graphgen.models.sampling import arithmetic, tables

TEMPERATURE = tl.constexpr(tables.TEMPERATURE)
TOP_K = tl.constexpr(tables.TOP_K)
TOP_P = tl.constexpr(tables.TOP_P)
MIN_P = tl.constexpr(tables.MIN_P)
REPETITION = tl.constexpr(tables.REPETITION)
PRESENCE = tl.constexpr(tables.PRESENCE)
FREQUENCY = tl.constexpr(tables.FREQUENCY)
PROMPT_LEN = tl.constexpr(tables.PROMPT_LEN)
SEED = tl.constexpr(tables.SEED)
MIN_LENGTH = tl.constexpr(tables.MIN_LENGTH)
NUM_BIASES = tl.constexpr(tables.NUM_BIASES)
STOP_TOKEN_IDS = tl.constexpr(tables.STOP_TOKEN_IDS)
ROW_WIDTH = tl.constexpr(tables.ROW_WIDTH)
MOST_BIASES = tl.constexpr(MAX_LOGIT_BIASES)
BIAS_WIDTH = tl.constexpr(tables.BIAS_WIDTH)
NUM_STOPS = tl.constexpr(MAX_STOP_TOKEN_IDS)
IN_PROMPT = tl.constexpr(tables.IN_PROMPT)
OUTPUT_COUNT_MASK = tl.constexpr(tables.OUTPUT_COUNT_MASK)
NO_TOKEN = tl.constexpr(tables.NO_TOKEN)

LN2_HIGH = tl.constexpr(arithmetic.LN2_HIGH)
LN2_LOW = tl.constexpr(arithmetic.LN2_LOW)
LOG2_E = tl.constexpr(arithmetic.LOG2_E)
SQRT_HALF_BITS = tl.constexpr(arithmetic.SQRT_HALF_BITS)
LOG0, LOG1, LOG2, LOG3, LOG4, LOG5, LOG6, LOG7 = (tl.constexpr(c) for c in arithmetic.LOG_POLYNOMIAL)
EXP0, EXP1, EXP2, EXP3, EXP4 = (tl.constexpr(c) for c in arithmetic.EXP_POLYNOMIAL)
LOWEST_EXPONENT = tl.constexpr(arithmetic.LOWEST_EXPONENT)
MASS_ONE = tl.constexpr(arithmetic.MASS_ONE)
NEGATED_IN_PLACE = tl.constexpr(arithmetic.NEGATED_IN_PLACE)
LARGEST_UNIFORM = tl.constexpr(arithmetic.LARGEST_UNIFORM)
WORD_SCALE = tl.constexpr(arithmetic.WORD_SCALE)
LARGEST_FLOAT = tl.constexpr(arithmetic.LARGEST_FLOAT)
MINUS_INF = tl.constexpr(float("-inf"))
MAX_INT32 = tl.constexpr(2**31 - 1)


# --- Arithmetic ------------------------------------------------------------------------------------------------


@triton.jit
def log_of_parts(exponent, fraction):
    square = fraction * fraction
    p = LOG7 * fraction + LOG6
    p = p * fraction + LOG5
    p = p * fraction + LOG4
    p = p * fraction + LOG3
    p = p * fraction + LOG2
    p = p * fraction + LOG1
    p = p * fraction + LOG0
    result = (fraction - square * 0.5) + square * fraction * p
    result = exponent * LN2_LOW + result
    return exponent * LN2_HIGH + result


@triton.jit
def exponent_of(values):
    return (values.to(tl.int32, bitcast=True) - SQRT_HALF_BITS) >> 23


@triton.jit
def fraction_of(values, exponent):
    return (values.to(tl.int32, bitcast=True) - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def log_positive(values):
    exponent = exponent_of(values)
    return log_of_parts(exponent.to(tl.float32), fraction_of(values, exponent))


@triton.jit
def exp_not_positive(values):
    clamped = tl.maximum(values, LOWEST_EXPONENT)
    exponent = tl.floor(clamped * LOG2_E + 0.5)
    rest = clamped - exponent * LN2_HIGH
    rest = rest - exponent * LN2_LOW
    p = EXP4 * rest + EXP3
    p = p * rest + EXP2
    p = p * rest + EXP1
    p = p * rest + EXP0
    result = 1.0 + (rest + rest * rest * p)
    power = ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(values < LOWEST_EXPONENT, 0.0, result * power)


@triton.jit
def mass(values):
    return (exp_not_positive(values) * MASS_ONE).to(tl.int64)


@triton.jit
def gumbel(bits):
    v = tl.minimum((bits.to(tl.float32) + 0.5) * WORD_SCALE, LARGEST_UNIFORM)
    rest = 1.0 - v
    exponent = exponent_of(rest)
    small = v < NEGATED_IN_PLACE
    fraction = tl.where(small, -v, fraction_of(rest, exponent))
    exponent = tl.where(small, 0, exponent)
    return -log_positive(-log_of_parts(exponent.to(tl.float32), fraction))


@triton.jit
def tile_noise(seed, position, start, TILE: tl.constexpr):
    """Noise of the tokens start ... start + TILE - 1, start a multiple of 4: every generated word is used."""
    groups = start // 4 + tl.arange(0, TILE // 4)
    zero = groups * 0
    w0, w1, w2, w3 = tl.philox(seed, groups, zero + position, zero, zero)
    bits = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return gumbel(tl.reshape(bits, [TILE]))


@triton.jit
def token_noise(seed, position, token_ids):
    """Noise of any tokens, at four times the cost."""
    zero = token_ids * 0
    w0, w1, w2, w3 = tl.philox(seed, token_ids // 4, zero + position, zero, zero)
    word = token_ids % 4
    low = tl.where(word == 0, w0, w1)
    high = tl.where(word == 2, w2, w3)
    return gumbel(tl.where(word < 2, low, high))


@triton.jit
def ordered_key(scores):
    """int32 that orders as the float does. Zero has one key: adding +0 turns -0 into it."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & MAX_INT32)


# --- A row -----------------------------------------------------------------------------------------------------


@triton.jit
def float_setting(settings, column: tl.constexpr):
    return tl.load(settings + column).to(tl.float32, bitcast=True)


@triton.jit
def seed_setting(settings):
    low = tl.load(settings + SEED).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(settings + SEED + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    return (high << 32) | low


@triton.jit
def has_rank_filter(settings, vocab_size):
    top_k = tl.load(settings + TOP_K)
    return ((top_k > 0) & (top_k < vocab_size)) | (float_setting(settings, TOP_P) < 1.0)


@triton.jit
def has_filter(settings, vocab_size):
    """The row draws from fewer tokens than all."""
    filters = has_rank_filter(settings, vocab_size) | (float_setting(settings, MIN_P) > 0.0)
    return filters & (float_setting(settings, TEMPERATURE) > 0.0)


@triton.jit
def biases_of(biases, token_ids):
    """What is added to the logits of these tokens. biases points at the row's own, whose ids rise: each token is looked
    for by halving."""
    places = token_ids * 0
    half = tl.full([], MOST_BIASES // 2, tl.int32)
    while half > 0:
        places += tl.where(tl.load(biases + places + (half - 1)) < token_ids, half, 0)
        half = half // 2
    values = tl.load(biases + MOST_BIASES + places).to(tl.float32, bitcast=True)
    return tl.where(tl.load(biases + places) == token_ids, values, 0.0)


@triton.jit
def tile_scores(logits, occurrences, biases, settings, position, token_ids, vocab_size):
    """Rules 1 to 5. logits, occurrences, biases, settings point at the row's own."""
    inside = token_ids < vocab_size
    scores = tl.load(logits + token_ids, mask=inside, other=MINUS_INF).to(tl.float32)
    if tl.load(settings + NUM_BIASES) > 0:
        scores += biases_of(biases, token_ids)
    repetition = float_setting(settings, REPETITION)
    presence = float_setting(settings, PRESENCE)
    frequency = float_setting(settings, FREQUENCY)
    if (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0):
        entries = tl.load(occurrences + token_ids, mask=inside, other=0)
        counts = entries & OUTPUT_COUNT_MASK
        divided = tl.div_rn(scores, tl.zeros_like(scores) + repetition)
        repeated = tl.where(scores < 0, scores * repetition, divided)
        scores = tl.where(entries != 0, repeated, scores)
        scores = scores - tl.where(counts > 0, presence, 0.0)
        scores = scores - counts.to(tl.float32) * frequency
    if position < tl.load(settings + MIN_LENGTH):
        for stop in range(NUM_STOPS):
            scores = tl.where(token_ids == tl.load(settings + STOP_TOKEN_IDS + stop), MINUS_INF, scores)
    # NaN is the one value that differs from itself.
    return tl.where(scores != scores, MINUS_INF, tl.minimum(scores, LARGEST_FLOAT))


@triton.jit
def allowed_tokens(masks, token_ids, vocab_size):
    """Which tokens the row's mask allows. masks points at the row's own; past the vocabulary none is allowed. Not read
    through the L1 cache: a line of it may be older than the word that says that the mask is there."""
    words = tl.load(masks + token_ids // 32, mask=token_ids < vocab_size, other=0, cache_modifier=".cg")
    return ((words >> (token_ids % 32)) & 1) != 0


@triton.jit
def lowest_best(scores, token_ids):
    """The largest score and the lowest token id that has it."""
    best = tl.max(scores, axis=0)
    return best, tl.min(tl.where(scores == best, token_ids, MAX_INT32), axis=0)
