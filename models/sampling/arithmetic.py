"""Logarithm, exponential and noise that come out the same, bit for bit, on every device.

Owns the constants and the torch version; device.py has the Triton version, operation by operation the same.
Called by reference.py.

Why not torch.log and torch.exp: libraries differ in the last bit, and one bit decides a close draw or a token at the
edge of top-p. Only additions, multiplications, divisions and conversions that IEEE 754 rounds in one way are used
here, never fused. And probability mass is summed in integers, so that the order of a sum cannot matter.

The polynomials are our own weighted least-squares fits: the logarithm is within 2 units in the last place of the
true one, the exponential within 1.5.
"""

import torch
from torch import Tensor

LN2_HIGH = 0.69140625  # 8 bits: times an exponent it is exact
LN2_LOW = 0.0017409306019544601
LOG2_E = 1.4426950216293335
SQRT_HALF_BITS = 0x3F3504F3
# log(1 + f) = f - f**2 / 2 + f**3 * P(f) for sqrt(1/2) - 1 <= f <= sqrt(2) - 1; lowest power first
LOG_POLYNOMIAL = (
    0.3333333134651184,
    -0.2500081956386566,
    0.20001226663589478,
    -0.16623356938362122,
    0.14201758801937103,
    -0.13160187005996704,
    0.12761569023132324,
    -0.07634472101926804,
)
# exp(r) = 1 + r + r**2 * Q(r) for |r| <= log(2) / 2
EXP_POLYNOMIAL = (
    0.4999999403953552,
    0.1666651964187622,
    0.04166839271783829,
    0.008368780836462975,
    0.0013814468402415514,
)
LOWEST_EXPONENT = -87.0
"""exp of anything lower counts as 0."""

MASS_ONE = float(1 << 40)
"""The integer mass of the likeliest token; a vocabulary of 2**22 tokens still sums within int64."""

NEGATED_IN_PLACE = 0.2928932309150696  # 1 - sqrt(1/2): below it log(1 - v) needs no exponent
LARGEST_UNIFORM = 0.9999999403953552  # 1 - 2**-24: keeps the noise finite, so that the only candidate can win
WORD_SCALE = 2.0**-32
LARGEST_FLOAT = 3.4028234663852886e38


def log_positive(values: Tensor) -> Tensor:
    """Natural logarithm of positive normal float32."""
    exponent, fraction = _split(values)
    return _log_of_parts(exponent, fraction)


def exp_not_positive(values: Tensor) -> Tensor:
    """exp of float32 <= 0, -inf included."""
    clamped = values.clamp(min=LOWEST_EXPONENT)
    exponent = (clamped * LOG2_E + 0.5).floor_()
    rest = clamped - exponent * LN2_HIGH
    rest = rest - exponent * LN2_LOW
    polynomial = _horner(EXP_POLYNOMIAL, rest)
    result = 1.0 + (rest + rest * rest * polynomial)
    power = ((exponent.int() + 127) << 23).view(torch.float32)
    return (result * power).masked_fill_(values < LOWEST_EXPONENT, 0.0)


def mass(values: Tensor) -> Tensor:
    """Unnormalised probability of float32 log-probabilities <= 0 as int64: MASS_ONE * exp, rounded down."""
    return (exp_not_positive(values) * MASS_ONE).long()


def gumbel(bits: Tensor) -> Tensor:
    """Gumbel noise -log(-log(1 - v)) of 32 random bits (int64), v = (bits + 1/2) / 2**32, as float32.

    Written for 1 - v and not for v because large noise decides draws, and v is finest near 0: the largest value
    is 22.9, one in 2**32.
    """
    v = ((bits.float() + 0.5) * WORD_SCALE).clamp_(max=LARGEST_UNIFORM)
    exponent, fraction = _split(1.0 - v)
    small = v < NEGATED_IN_PLACE
    exponent.masked_fill_(small, 0.0)
    return -log_positive(-_log_of_parts(exponent, torch.where(small, -v, fraction)))


def _split(values: Tensor) -> tuple[Tensor, Tensor]:
    """values = 2**exponent * (1 + fraction), with 1 + fraction from sqrt(1/2) to sqrt(2)."""
    bits = values.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    return exponent.float(), (bits - (exponent << 23)).view(torch.float32) - 1.0


def _log_of_parts(exponent: Tensor, fraction: Tensor) -> Tensor:
    square = fraction * fraction
    result = (fraction - square * 0.5) + square * fraction * _horner(LOG_POLYNOMIAL, fraction)
    result = exponent * LN2_LOW + result
    return exponent * LN2_HIGH + result


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    result = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result.mul_(x).add_(coefficient)
    return result
