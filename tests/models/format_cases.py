"""Quantised weights for tests of the kernels that multiply them, and what each weight means in float32."""

import torch
from torch import Tensor

from graphgen.models.formats.layout import Quantised, dequantised, pack_int4
from graphgen.models.formats.products import Weight
from graphgen.models.formats.quantise import quantised
from graphgen.models.spec.formats import LinearFormat

E4M3 = LinearFormat(storage="e4m3", activation="e4m3")
INT8 = LinearFormat(storage="int8")
INT4 = LinearFormat(storage="int4", group=128, scale_dtype="bfloat16")
FORMATS = {
    form.name: form
    for form in (
        E4M3,
        LinearFormat(storage="e4m3", scale_dtype="bfloat16"),
        LinearFormat(storage="e4m3", group=128, rows=128, activation="e4m3"),
        INT8,
        LinearFormat(storage="int8", group=128, scale_dtype="float16"),
        INT4,
        LinearFormat(storage="int4", group=64, scale_dtype="bfloat16"),
        LinearFormat(storage="int4", group=32, scale_dtype="float16"),
        LinearFormat(storage="int4", group=128, zeros=True, scale_dtype="float16"),
        LinearFormat(storage="int4", group=64, zeros=True),
        LinearFormat(storage="int4", group=32, zeros=True, scale_dtype="bfloat16"),
        LinearFormat(storage="int4", group=128, permuted=True, scale_dtype="float16"),
        LinearFormat(storage="int4", group=256),
        LinearFormat(storage="int4"),
    )
}


def random_weight(form: LinearFormat, size: int, depth: int, device: str = "cpu", deviation: float = 0.02) -> Weight:
    """[size, depth], each of its rows of another magnitude."""
    values = torch.randn(size, depth, device=device) * deviation
    values *= torch.logspace(-1, 1, size, device=device)[torch.randperm(size, device=device), None]
    made = quantised(values, form)
    codes = pack_int4(made.codes) if form.storage == "int4" else made.codes
    permutation = torch.randperm(depth, device=device, dtype=torch.int32) if form.permuted else None
    return Weight(form, codes, made.scale, made.zeros, permutation)


def matrix(weight: Weight) -> Tensor:
    """What the weight means, [size, depth] float32, its columns in the order of the input."""
    whole = weight.unpacked()
    assert isinstance(whole, Quantised)
    return dequantised(whole, torch.float32)
