"""Rotary position embeddings: from a position to the cos and sin that rotate q and k.

Owns the inverse frequencies of every rope kind. Never rotates: layers.py applies cos and sin. Called once a
step by the decoder, which hands the same cos and sin to every layer.

With theta the base, D the head size and i = 0, 2, .. D-2 (RoFormer, arXiv 2104.09864):

    default   f_i = theta^(-i/D)
    linear    f_i / factor  (position interpolation, arXiv 2306.15595)
    dynamic   f_i with theta * (factor * n / L - (factor - 1))^(D/(D-2)) once the sequence length n passes the
              original maximum L (dynamic NTK scaling, after bloc97 and emozilla)
    llama3    f_i where the wavelength 2 pi / f_i is under L / high_freq_factor, f_i / factor where it is over
              L / low_freq_factor, and between them a blend, linear in L / wavelength (Llama 3.1)
    yarn      f_i and f_i / factor, blended by a linear ramp over i between the dimensions that turn beta_fast
              and beta_slow times within L; cos and sin are scaled by attention_factor (YaRN, arXiv
              2309.00071)
"""

import math

import torch
from torch import Tensor

from graphgen.models.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """[head_dim / 2] float32 on the CPU; of `dynamic`, those up to the original maximum length."""
    frequencies = 1.0 / rope.theta ** _exponents(head_dim)
    match rope.kind:
        case "default" | "dynamic":
            return frequencies
        case "linear":
            return frequencies / rope.factor
        case "llama3":
            return _llama3(frequencies, rope)
        case "yarn":
            return _yarn(rope, head_dim)


def _exponents(head_dim: int) -> Tensor:
    # On the CPU whatever the device, so that every device rotates by the same float32 numbers.
    return torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim


def _llama3(frequencies: Tensor, rope: RopeSpec) -> Tensor:
    low, high, length = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_len
    wavelengths = 2 * math.pi / frequencies
    share = (length / wavelengths - low) / (high - low)
    blended = (1 - share) * frequencies / rope.factor + share * frequencies
    result = torch.where(wavelengths > length / low, frequencies / rope.factor, blended)
    return torch.where(wavelengths < length / high, frequencies, result)


def _yarn(rope: RopeSpec, head_dim: int) -> Tensor:
    def dimension_of(turns: float) -> float:
        """The dimension that turns so often within the original length."""
        return head_dim * math.log(rope.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # equal bounds are a step, not a division by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    extrapolated = 1 - ramp
    periods = rope.theta ** _exponents(head_dim)
    return 1.0 / (rope.factor * periods) * (1 - extrapolated) + 1.0 / periods * extrapolated


class Rope:
    """cos and sin of any positions. Frozen after construction; its tensors live on `device`."""

    def __init__(self, rope: RopeSpec, head_dim: int, device: torch.device) -> None:
        self._rope = rope
        self._head_dim = head_dim
        self._frequencies = inverse_frequencies(rope, head_dim).to(device)
        self._exponents = _exponents(head_dim).to(device)

    def __call__(self, positions: Tensor, sequence_lens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, D] in `dtype`, computed in float32.

        positions: [T] int64. sequence_lens: [T] int64, only read by `dynamic`: the length that decides a
        row's frequencies, max(prompt length of its request, position + 1). Keys stay rotated as they were
        written.
        """
        frequencies = self._frequencies
        if self._rope.kind == "dynamic":
            frequencies = self._dynamic_frequencies(sequence_lens)
        elif positions.device.type == "cuda":
            # Triton exists where CUDA does; elsewhere it must not be needed.
            from graphgen.models import rope_cuda

            return rope_cuda.angles(positions, frequencies, self._rope.attention_factor, dtype)
        angles = positions[:, None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        scale = self._rope.attention_factor
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)

    def _dynamic_frequencies(self, sequence_lens: Tensor) -> Tensor:
        """[T, D / 2]: each row's own, since rows of one step belong to requests of any length."""
        rope, dim = self._rope, self._head_dim
        lens = sequence_lens.clamp(min=rope.original_max_len)
        stretch = rope.factor * lens / rope.original_max_len - (rope.factor - 1)
        theta = rope.theta * stretch ** (dim / (dim - 2))
        scaled = 1.0 / theta[:, None] ** self._exponents
        return torch.where((sequence_lens > rope.original_max_len)[:, None], scaled, self._frequencies)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] rotated by cos, sin [T, D]; dimension i turns with i + D/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
