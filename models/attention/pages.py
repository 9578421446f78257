"""The pages of one layer, and how keys and values are put into them and read back. The formats: spec/kv_formats.py.

    format   stored of x                           read back as
    dtype    x                                     x
    fp8      e4m3(clamp(x / s, -448, 448))         stored * s    s of each head, a constant of the model
    int8     floor(x / s + 1/2)                    stored * s    s = max|x| / 127 over the head, stored beside it

x is what pages without a format of their own would hold, rounded to the model's dtype. Whoever stores a row, in a chunk
or alone, stores the same; and every row reads all positions from the pages, its own included, so what else is in a step
changes no result. quantised.py has the same arithmetic for kernels.

Owns the arithmetic in torch, for any device. Called by reference.py; kv_cache.py makes the tensors.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0
"""The largest number of e4m3; what lies above becomes NaN in some conversions."""
INT8_MOST = 127.0
INT8_LEAST_PEAK = 1e-30
"""Of max|x|: zeros have a scale to be divided by."""

STORED_DTYPES = {"fp8": FP8, "int8": torch.int8}
"""Of the pages of a quantised format."""


class LayerPages(NamedTuple):
    """What a layer keeps of all positions."""

    k: Tensor
    """[P, page_size, Hkv, D] in the dtype of the format."""
    v: Tensor
    """[P, page_size, Hkv, D], the same; of latent attention the same tensor as k."""
    k_scales: Tensor | None = None
    """float32: of fp8 [Hkv], of int8 [P, page_size, Hkv]; None: not quantised."""
    v_scales: Tensor | None = None
    """float32, the same."""


def store(pages: Tensor, scales: Tensor | None, values: Tensor, locations: Tensor) -> None:
    """Puts row t of values [T, Hkv, D] at position locations[t] of the page pool. scales: see LayerPages."""
    if scales is None:
        pages.flatten(0, 1).index_copy_(0, locations, values.to(pages.dtype))
    elif pages.dtype == FP8:
        stored = (values.float() / scales[:, None]).clamp(-FP8_MOST, FP8_MOST).to(FP8)
        _bytes_of(pages).flatten(0, 1).index_copy_(0, locations, _bytes_of(stored))
    else:
        values = values.float()
        peaks = values.abs().amax(-1).clamp(min=INT8_LEAST_PEAK)
        own_scales = peaks / torch.full_like(peaks, INT8_MOST)  # by a number CUDA would multiply with its inverse
        stored = torch.floor(values / own_scales[..., None] + 0.5).to(torch.int8)
        pages.flatten(0, 1).index_copy_(0, locations, stored)
        scales.flatten(0, 1).index_copy_(0, locations, own_scales)


def take(pages: Tensor, scales: Tensor | None, index: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, page_size, Hkv, D]: the pages of an index [N], read back in `dtype` if they are quantised."""
    if scales is None:
        return pages.index_select(0, index)
    if pages.dtype == FP8:
        taken, of_position = _numbers(_bytes_of(pages).index_select(0, index)), scales
    else:
        taken, of_position = pages.index_select(0, index).float(), scales.index_select(0, index)
    return (taken * of_position[..., None]).to(dtype)


def _bytes_of(pages: Tensor) -> Tensor:
    # Few operators that move elements know the dtypes of one byte.
    return pages.view(torch.uint8)


def _numbers(codes: Tensor) -> Tensor:
    """float32 of e4m3's codes. On the CPU a table is four times as fast as torch's conversion."""
    if codes.device.type != "cpu":
        return codes.view(FP8).float()
    return _table().index_select(0, codes.flatten().int()).view(codes.shape)


@functools.cache
def _table() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(FP8).float()
