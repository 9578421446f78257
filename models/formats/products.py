"""x @ weight.T for a weight in a format: the one place where a way to multiply is chosen.

Owns the choice, and the ways that torch alone offers. A device's own way stands beside the general one, which makes the
weight a matrix of the input's dtype and is right everywhere. Called by linear.py, inside the compiled layer on CUDA.

On the CPU int8 has a product of its own for a few rows in bfloat16, and float32 those of cpu_float32.py.

On CUDA steps of a few decode rows do not come here: few_rows.py reads the codes themselves. With more rows the tensor
cores multiply two operands of one type. Where a format lets its input be rounded to e4m3 and the device multiplies
that, from SM89 on, the input is quantised, in plain torch, so that the compiler makes one kernel of it and of the norm
before; behind a gated activation gated.py has a kernel for both. Integer codes are first rounded to e4m3; those of int4
are read as they lie where few_rows_int4.py serves. Elsewhere the weight is made a matrix of the input's dtype.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphgen.models.chaining import can_chain
from graphgen.models.formats import as_they_lie, cpu_float32, matrices
from graphgen.models.formats.as_they_lie import BLOCK
from graphgen.models.formats.layout import E4M3_MOST, Quantised, matrix_of, unpack_int4
from graphgen.models.spec.formats import LinearFormat

CPU_FEW_ROWS = 16
"""Rows up to which torch's own product of int8 is faster on the CPU than making a matrix first. With 2048 x 2048 on one
core with AVX512 it takes 1.6 ms at 16 rows against 1.5, and 0.2 at one row against 0.9."""

E4M3_STEP = 16
"""Both sizes of a weight in e4m3 are multiples of it, for torch to multiply it."""
LEAST_SCALE = 1.0 / (E4M3_MOST * 512.0)
"""Of an input: a row of zeros is not divided by zero."""
FAST_SUMS = True
"""Sums of products of e4m3 stay in the tensor cores from end to end, as other engines have it; otherwise they are added
up in float32 every 128 columns, which is slower."""


class Weight(NamedTuple):
    """A weight of a format as it lies in a layer: see formats/layout.py. Of a LinearStack, every tensor has one more
    dimension ahead."""

    format: LinearFormat
    codes: Tensor
    scale: Tensor
    zeros: Tensor | None
    permutation: Tensor | None

    def of(self, number: int) -> "Weight":
        """That layer's of a stack."""
        zeros = None if self.zeros is None else self.zeros[number]
        return Weight(self.format, self.codes[number], self.scale[number], zeros, None)

    @property
    def depth(self) -> int:
        """Columns of the weight, of which a byte of int4 has two."""
        return self.codes.shape[-1] * (2 if self.format.storage == "int4" else 1)

    def unpacked(self) -> Quantised:
        codes = unpack_int4(self.codes) if self.format.storage == "int4" else self.codes
        return Quantised(self.format, codes, self.scale, self.zeros, self.permutation)


def matrix_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, for a weight in x's dtype. x: [..., K]; weight: [N, K]; bias: [N]."""
    if x.dtype is torch.float32 and x.is_cpu and x.ndim == 2 and not torch.compiler.is_compiling():
        return cpu_float32.product(x, weight, bias)
    return F.linear(x, weight, bias)


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, [..., N] in x's dtype. x: [..., K]; bias: [N]."""
    if weight.permutation is not None:
        x = x.index_select(-1, weight.permutation)
    if x.device.type == "cpu":
        if _has_row_scales(weight):
            return _scaled_behind(x, weight, bias)
    elif x.device.type == "cuda":
        return product_of_many_rows(x, weight, bias, multiplies_e4m3())
    return F.linear(x, matrix_of(weight.unpacked(), x.dtype), bias)


def _has_row_scales(weight: Weight) -> bool:
    """int8 codes that are the weight but for one factor a row."""
    form = weight.format
    return form.storage == "int8" and form.group is None and form.rows == 1 and not form.zeros


def _scaled_behind(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """The scale comes behind the product: the codes themselves are exact in every dtype."""
    rows = x.flatten(0, -2)
    if x.dtype == torch.bfloat16 and rows.shape[0] <= CPU_FEW_ROWS:
        ones = rows.new_ones(weight.codes.shape[0])
        sums = torch._weight_int8pack_mm(rows.contiguous(), weight.codes, ones)
    else:
        sums = F.linear(rows, weight.codes.to(x.dtype))
    result = sums * weight.scale.t()  # in float32
    result = result if bias is None else result + bias
    return result.to(x.dtype).view(*x.shape[:-1], -1)


# --- CUDA ------------------------------------------------------------------------------------------------------


class Multiplies(NamedTuple):
    """What a device multiplies in e4m3."""

    by_rows: bool
    """With a scale for each row of both operands."""
    by_blocks: bool
    """With a scale for BLOCK columns of the input, and for BLOCK x BLOCK elements of the weight."""


def multiplies_e4m3() -> Multiplies:
    """Of the device that this process drives."""
    capability = torch.cuda.get_device_capability()
    return Multiplies(capability >= (8, 9), capability == (9, 0))


# All that torch.compiler.assume_constant_result does, without its import of the compiler, which the CPU does not need.
multiplies_e4m3._dynamo_marked_constant = True  # type: ignore[attr-defined]


def product_of_many_rows(x: Tensor, weight: Weight, bias: Tensor | None, device: Multiplies) -> Tensor:
    """product(), where a matrix operand must be of one dtype. x: [..., K], of whose order the weight is."""
    form, rows = weight.format, x.flatten(0, -2)
    made, shape = matrices.makes(form, weight.depth), (*x.shape[:-1], weight.codes.shape[0])
    if rounds_rows(weight, device):
        return product_of_rounded(*quantise_rows(rows), weight, bias, x.dtype).view(shape)
    if device.by_blocks and made and as_they_lie.is_by_blocks(form) and _is_rounded(weight, device):
        return _product_by_blocks(rows, weight, bias).view(shape)
    if made:
        matrix = matrices.weight_matrix(form, weight.codes, weight.scale, weight.zeros, x.dtype)
    else:
        matrix = matrix_of(weight.unpacked(), x.dtype)
    return F.linear(x, matrix, bias)


def rounds_rows(weight: Weight, device: Multiplies) -> bool:
    """Whether such a device rounds the input to e4m3 with a scale for each row, and then makes product_of_rounded."""
    form = weight.format
    is_made = form.storage != "e4m3" and matrices.makes(form, weight.depth)
    return _is_rounded(weight, device) and (as_they_lie.is_by_rows(form) or is_made)


def _is_rounded(weight: Weight, device: Multiplies) -> bool:
    """Whether it rounds the input to e4m3 at all, by rows or by blocks."""
    sizes = weight.codes.shape[0], weight.depth
    return device.by_rows and weight.format.rounds_input and not any(size % E4M3_STEP for size in sizes)


def product_of_rounded(
    left: Tensor, of_left: Tensor, weight: Weight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(left times its scales) @ weight.T + bias, [T, N] of `dtype`, where `rounds_rows`. left: [T, K] e4m3; of_left:
    [T, 1] float32."""
    form, (codes, scale, zeros, _) = weight.format, weight[1:]
    operators = torch.ops.graphgen
    if form.storage == "int4":
        of_weight = codes, scale, zeros, form.group or 0, form.rows
        result: Tensor = operators.product_of_int4.default(left, of_left, *of_weight, bias, dtype)
        return result
    if form.storage == "int8":
        codes, scale = matrices.weight_in_e4m3(form, codes, scale, zeros)
    by_rows: Tensor = operators.product_by_rows.default(left, of_left, codes, scale.float(), bias, dtype)
    return by_rows


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x in e4m3, the scale of each row [T, 1] float32). x: [T, K]."""
    return _quantised_by(x.float(), x.float().abs().amax(-1, keepdim=True))


def quantise_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x in e4m3, the scales of each BLOCK columns [K / BLOCK, T] float32). x: [T, K]."""
    wide = x.float().unflatten(-1, (-1, BLOCK))
    codes, scale = _quantised_by(wide, wide.abs().amax(-1, keepdim=True))
    # (`contiguous` would ask whether there is one row, and be compiled for each answer.)
    return codes.flatten(1), scale.squeeze(-1).t().clone(memory_format=torch.contiguous_format)


def _quantised_by(wide: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """The least scale with which `most`, and all that is smaller, is in the range of e4m3."""
    scale = (most * (1.0 / E4M3_MOST)).clamp(min=LEAST_SCALE)
    codes = (wide * scale.reciprocal()).clamp(-E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn)
    return codes, scale


def _product_by_blocks(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    left, of_left = quantise_blocks(x)
    result: Tensor = torch.ops.graphgen.product_by_blocks.default(left, of_left, weight.codes, weight.scale, x.dtype)
    return result if bias is None else result + bias


def _multiply_rows(
    left: Tensor, of_left: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """An operator of ours, since torch's own asks whether there is one row when it is traced."""
    return torch._scaled_mm(
        left, codes.t(), of_left, scale.t(), bias, out_dtype=dtype, use_fast_accum=FAST_SUMS and left.is_cuda
    )


def _rows_on_cuda(
    left: Tensor, of_left: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if _is_of_few_rows(left, codes):
        from graphgen.models.formats import few_rows_e4m3

        return few_rows_e4m3.product(left, of_left, codes, scale, bias, dtype, False, FAST_SUMS, can_chain())
    return _multiply_rows(left, of_left, codes, scale, bias, dtype)


def _blocks_on_cuda(left: Tensor, of_left: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if _is_of_few_rows(left, codes):
        from graphgen.models.formats import few_rows_e4m3

        return few_rows_e4m3.product(left, of_left, codes, scale.float(), None, dtype, True, FAST_SUMS, can_chain())
    return _multiply_blocks(left, of_left, codes, scale, dtype)


def _int4_on_cuda(
    left: Tensor,
    of_left: Tensor,
    codes: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
    group: int,
    rows: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Of few rows the codes as they lie; else the weight is made one of e4m3, which costs writing and reading that."""
    if has_kernels_of_few_rows():
        from graphgen.models.formats import few_rows_int4

        if few_rows_int4.serves(left.shape[0], left.shape[1], group, rows):
            return few_rows_int4.product(left, of_left, codes, scale, zeros, group, bias, dtype, can_chain())
    made, of_made = torch.ops.graphgen.weight_in_e4m3.default(codes, scale, zeros, group, rows)
    return _rows_on_cuda(left, of_left, made, of_made, bias, dtype)


def _int4_in_torch(
    left: Tensor,
    of_left: Tensor,
    codes: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
    group: int,
    rows: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    form = LinearFormat(storage="int4", group=group or None, rows=rows, zeros=zeros is not None)
    matrix = matrix_of(Quantised(form, unpack_int4(codes), scale, zeros), torch.float32)
    return F.linear(left.float() * of_left, matrix, None if bias is None else bias.float()).to(dtype)


def has_kernels_of_few_rows() -> bool:
    """That read codes as they lie: these are cut for SM90."""
    return torch.cuda.get_device_capability() == (9, 0)


def _is_of_few_rows(left: Tensor, codes: Tensor) -> bool:
    if not has_kernels_of_few_rows():
        return False
    from graphgen.models.formats import few_rows_e4m3  # imports Triton, which is there where CUDA is

    return few_rows_e4m3.serves(len(left), *codes.shape)


def _multiply_blocks(left: Tensor, of_left: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """left: [T, K] e4m3, of_left: [K / BLOCK, T]. The library wants a number of rows that four divides, and a multiple
    of four scales for each BLOCK rows of the weight: what is missing is filled with zeros."""
    from torch.nn.functional import ScalingType, scaled_mm

    num_rows = left.shape[0]
    if missing := -num_rows % 4:
        left = F.pad(left.view(torch.uint8), (0, 0, 0, missing)).view(left.dtype)
        of_left = F.pad(of_left, (0, missing))
    of_weight = F.pad(scale.float(), (0, -scale.shape[1] % 4))
    recipes = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    result = scaled_mm(left, codes.t(), of_left.t(), recipes[0], of_weight.t(), recipes[1], output_dtype=dtype)
    return result[:num_rows]


def _blocks_in_torch(left: Tensor, of_left: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    wide = left.float() * of_left.t().repeat_interleave(BLOCK, 1)
    form = LinearFormat(storage="e4m3", group=BLOCK, rows=BLOCK)
    return F.linear(wide, matrix_of(Quantised(form, codes, scale), torch.float32)).to(dtype)


def _result_like(left: Tensor, of_left: Tensor, codes: Tensor, *rest: object) -> Tensor:
    """rest: of each of the operators, whose last argument is the dtype."""
    dtype = rest[-1]
    assert isinstance(dtype, torch.dtype), "every schema ends with it"
    return left.new_empty(left.shape[0], codes.shape[0], dtype=dtype)


# A Library ends with its last reference.
_library = torch.library.Library("graphgen", "FRAGMENT")
_library.define(
    "product_by_rows(Tensor left, Tensor of_left, Tensor codes, Tensor scale, Tensor? bias, ScalarType dtype) -> Tensor"
)
_library.define(
    "product_by_blocks(Tensor left, Tensor of_left, Tensor codes, Tensor scale, ScalarType dtype) -> Tensor"
)
_library.define(
    "product_of_int4(Tensor left, Tensor of_left, Tensor codes, Tensor scale, Tensor? zeros, int group, int rows,"
    " Tensor? bias, ScalarType dtype) -> Tensor"
)
_library.impl("product_by_rows", _multiply_rows, "CPU")
_library.impl("product_by_rows", _rows_on_cuda, "CUDA")
_library.impl("product_by_blocks", _blocks_in_torch, "CPU")
_library.impl("product_by_blocks", _blocks_on_cuda, "CUDA")
_library.impl("product_of_int4", _int4_in_torch, "CPU")
_library.impl("product_of_int4", _int4_on_cuda, "CUDA")
torch.library.register_fake("graphgen::product_by_rows", _result_like, lib=_library)
torch.library.register_fake("graphgen::product_by_blocks", _result_like, lib=_library)
torch.library.register_fake("graphgen::product_of_int4", _result_like, lib=_library)
