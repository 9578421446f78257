"""Rotary position embeddings: from a position to the cos and sin that rotate q and k.

Owns the inverse frequencies of every rope kind. Never rotates: the attention kernels apply cos and sin. Called once a
step by the decoder, which hands the same cos and sin to every layer of the same rope.

A head turns in pairs (i, i + W/2) of its W elements in memory. Where only some of its dimensions turn, targets.py has
put them first in both halves, and the frequencies of the others are 0: their cos is 1 and their sin 0. So a model
without rotation is one whose frequencies are all 0.

With theta the base, D the number of dimensions that turn and i = 0, 2, .. D-2 (RoFormer, arXiv 2104.09864):

    default   f_i = theta^(-i/D)
    linear    f_i / factor  (position interpolation, arXiv 2306.15595)
    dynamic   f_i with theta * (factor * n / L - (factor - 1))^(D/(D-2)) once the sequence length n passes the
              original maximum L (dynamic NTK scaling, after bloc97 and emozilla)
    llama3    f_i where the wavelength 2 pi / f_i is under L / high_freq_factor, f_i / factor where it is over
              L / low_freq_factor, and between them a blend, linear in L / wavelength (Llama 3.1)
    yarn      f_i and f_i / factor, blended by a linear ramp over i between the dimensions that turn beta_fast
              and beta_slow times within L; cos and sin are scaled by attention_factor (YaRN, arXiv
              2309.00071)
    longrope  f_i / short_i up to the original maximum length, f_i / long_i beyond it; cos and sin are scaled by
              attention_factor (LongRoPE, arXiv 2402.13753)
    none      0
"""

import math

import torch
from torch import Tensor

from graphgen.models.attention.variant import temperatures
from graphgen.models.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """[dimensions that turn / 2] float32 on the CPU; of `dynamic` and `longrope`, those up to the original maximum
    length."""
    dim = _rotary_dim(rope, head_dim)
    frequencies = 1.0 / rope.theta ** _exponents(dim)
    match rope.kind:
        case "none" | "default" | "dynamic":
            return frequencies
        case "linear":
            return frequencies / rope.factor
        case "llama3":
            return _llama3(frequencies, rope)
        case "yarn":
            return _yarn(rope, dim)
        case "longrope":
            return 1.0 / (torch.tensor(rope.short_factors, dtype=torch.float32) * rope.theta ** _exponents(dim))


def _rotary_dim(rope: RopeSpec, head_dim: int) -> int:
    if rope.kind == "none":
        return 0
    return head_dim if rope.rotary_dim is None else rope.rotary_dim


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

    def __init__(self, rope: RopeSpec, head_dim: int, device: torch.device, width: int | None = None) -> None:
        """width: of a head in memory; None: head_dim."""
        self._rope = rope
        self._dim = _rotary_dim(rope, head_dim)
        self._half = (width or head_dim) // 2
        self._frequencies = self._over_a_head(inverse_frequencies(rope, head_dim)).to(device)
        self._exponents = _exponents(self._dim).to(device)
        self._scale: Tensor | float = rope.attention_factor
        if self._dim < 2 * self._half and rope.attention_factor != 1.0:  # of what turns alone
            scale = torch.ones(self._half)
            scale[: self._dim // 2] = rope.attention_factor
            self._scale = torch.cat((scale, scale)).to(device)
        if rope.kind == "longrope":
            periods = torch.tensor(rope.long_factors, dtype=torch.float32) * rope.theta ** _exponents(self._dim)
            self._long_frequencies = self._over_a_head(1.0 / periods).to(device)

    def __call__(self, positions: Tensor, sequence_lens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, W] in `dtype`, computed in float32.

        positions: [T] int64. sequence_lens: [T] int64, only read by `dynamic` and `longrope`: the length that decides a
        row's frequencies. `dynamic` takes max(prompt length of the request, position + 1): keys stay rotated as they
        were written. `longrope` takes the most tokens that the request may have, so that all its keys rotate alike.
        """
        frequencies = self._frequencies
        if self._rope.kind == "dynamic":
            frequencies = self._dynamic_frequencies(sequence_lens)
        elif self._rope.kind == "longrope":
            is_long = (sequence_lens > self._rope.original_max_len)[:, None]
            frequencies = torch.where(is_long, self._long_frequencies, frequencies)
        elif positions.device.type == "cuda" and isinstance(self._scale, float):
            # Triton exists where CUDA does; elsewhere it must not be needed.
            from graphgen.models import rope_cuda

            return rope_cuda.angles(positions, frequencies, self._scale, dtype)
        angles = positions[:, None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self._scale).to(dtype), (angles.sin() * self._scale).to(dtype)

    def temperatures(self, positions: Tensor) -> Tensor | None:
        """[T] float32, by which queries are multiplied; None where they are not."""
        if (of := self._rope.temperature) is None:
            return None
        return temperatures(positions, of.beta, of.length, of.offset)

    def _over_a_head(self, frequencies: Tensor) -> Tensor:
        """[W / 2] or [T, W / 2]: 0 for what does not turn."""
        return torch.nn.functional.pad(frequencies, (0, self._half - frequencies.shape[-1]))

    def _dynamic_frequencies(self, sequence_lens: Tensor) -> Tensor:
        """[T, W / 2]: each row's own, since rows of one step belong to requests of any length."""
        rope, dim = self._rope, self._dim
        lens = sequence_lens.clamp(min=rope.original_max_len)
        stretch = rope.factor * lens / rope.original_max_len - (rope.factor - 1)
        theta = rope.theta * stretch ** (dim / (dim - 2))
        scaled = self._over_a_head(1.0 / theta[:, None] ** self._exponents)
        return torch.where((sequence_lens > rope.original_max_len)[:, None], scaled, self._frequencies)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] rotated by cos, sin [T, D]; dimension i turns with i + D/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
