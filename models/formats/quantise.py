"""From a weight in floating point to one in a format: scales from the largest element, codes rounded to the nearest.

Owns that arithmetic and nothing else. Used where a checkpoint in bfloat16 is quantised as it is loaded, and for the
random weights of the load format dummy.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from graphgen.models.formats.layout import CODE_DTYPES, E4M3_MOST, ZERO_CODES, Quantised, spread
from graphgen.models.spec.formats import LinearFormat

_CODE_RANGES = {"e4m3": (-E4M3_MOST, E4M3_MOST), "int8": (-127.0, 127.0), "int4": (-7.0, 7.0)}
"""Around a zero in the middle. One end of int8 and of int4 stays unused, so that both signs are alike."""
_CODE_RANGES_WITH_ZEROS = {"int8": (-128.0, 127.0), "int4": (0.0, 15.0)}


def quantised(weight: Tensor, format: LinearFormat) -> Quantised:
    """weight: [N, K], of any floating dtype; its columns become those of the format without a permutation. Raises
    ValueError for a format with zeros whose storage has none."""
    if format.zeros and format.storage not in _CODE_RANGES_WITH_ZEROS:
        raise ValueError(f"a weight in {format.storage} has no zeros")
    wide, shape = weight.float(), (weight.shape[0], weight.shape[1])
    if format.zeros:
        # A range that holds 0, so that 0 has a code of its own.
        least = _reduced(wide, format, torch.amin).clamp(max=0)
        most = _reduced(wide, format, torch.amax).clamp(min=0)
        first, last = _CODE_RANGES_WITH_ZEROS[format.storage]
        scale = _rounded_scale((most - least) / (last - first), format)
        zeros = (first - least / scale.float()).round().clamp(first, last)
        offset = spread(zeros, format, *shape)
    else:
        first, last = _CODE_RANGES[format.storage]
        scale = _rounded_scale(_reduced(wide.abs(), format, torch.amax) / last, format)
        zeros, offset = None, torch.zeros((), device=weight.device)
    codes = wide / spread(scale.float(), format, *shape) + offset
    codes = (codes if format.storage == "e4m3" else codes.round()).clamp(first, last)
    if zeros is None:
        codes = codes + ZERO_CODES[format.storage]
    dtype = CODE_DTYPES[format.storage]
    return Quantised(format, codes.to(dtype), scale, None if zeros is None else zeros.to(dtype))


def _rounded_scale(scale: Tensor, format: LinearFormat) -> Tensor:
    """As it is stored. Of nothing but zeros it is 1, since codes are divided by it."""
    scale = scale.to(getattr(torch, format.scale_dtype))
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _reduced(wide: Tensor, format: LinearFormat, reduce: Callable[[Tensor, tuple[int, int]], Tensor]) -> Tensor:
    """One number for each scale, over the elements it belongs to. Zeros fill the last block up."""
    num_rows, num_columns = wide.shape
    group = format.group or num_columns
    padded = F.pad(wide, (0, -num_columns % group, 0, -num_rows % format.rows))
    return reduce(padded.unflatten(1, (-1, group)).unflatten(0, (-1, format.rows)), (1, 3))
