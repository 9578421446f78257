"""The operators that make a matrix of a quantised weight on CUDA, for products of many rows.

Owns their schemas, their forms for the CPU, which are the reference, and the choice of the form by device. The compiler
of layers sees an opaque call each; the product that reads its result is torch's own. Called by products.py.

With many rows a product is bound by arithmetic, which no device offers for mixed operands at full speed. Writing the
matrix and reading it again costs less than that: of a layer of Llama-3.1-8B 0.44 GB in bfloat16, half of it in e4m3,
whose product is faster besides. The memory is a temporary of the layer.
"""

import math

import torch
from torch import Tensor

from graphgen.models.formats.layout import E4M3_MOST, STORAGES, Quantised, matrix_of, unpack_int4
from graphgen.models.spec.formats import PACKED_BLOCK, LinearFormat, Storage

_LARGEST = {"int8": 128.0, "int4": 8.0}
"""Of the magnitudes of a storage's codes without zeros; with zeros it is what two codes can differ by."""
_LARGEST_WITH_ZEROS = {"int8": 255.0, "int4": 15.0}

_SCHEMAS = (
    "weight_matrix(Tensor codes, Tensor scale, Tensor? zeros, int group, int rows, ScalarType dtype) -> Tensor",
    "weight_in_e4m3(Tensor codes, Tensor scale, Tensor? zeros, int group, int rows) -> (Tensor, Tensor)",
)


def makes(form: LinearFormat, num_columns: int) -> bool:
    """Whether the operators take a weight of this format."""
    group = form.group or num_columns
    return num_columns % PACKED_BLOCK == 0 and (group in (32, 64) or group % PACKED_BLOCK == 0)


def weight_matrix(form: LinearFormat, codes: Tensor, scale: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[N, K] in `dtype`, its columns as they lie: layout.matrix_of. The tensors are those of a layer."""
    made: Tensor = torch.ops.graphgen.weight_matrix.default(codes, scale, zeros, form.group or 0, form.rows, dtype)
    return made


def weight_in_e4m3(form: LinearFormat, codes: Tensor, scale: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weight of integer codes as ([N, K] float8_e4m3fn, [N, 1] float32 its scale of each row), rounded again. Of
    int4 codes those with the largest scale of their row are exact, so all where a row has one scale."""
    made: tuple[Tensor, Tensor] = torch.ops.graphgen.weight_in_e4m3.default(
        codes, scale, zeros, form.group or 0, form.rows
    )
    return made


def code_in_e4m3(storage: Storage, has_zeros: bool) -> float:
    """What a code of one becomes that has the largest scale of its row: the largest power of two with which all codes,
    less their zeros, are in the range of e4m3."""
    largest = (_LARGEST_WITH_ZEROS if has_zeros else _LARGEST)[storage]
    return 2.0 ** math.floor(math.log2(E4M3_MOST / largest))


def _unpacked(codes: Tensor, scale: Tensor, zeros: Tensor | None, group: int, rows: int) -> Quantised:
    storage = STORAGES[codes.dtype]
    form = LinearFormat(storage=storage, group=group or None, rows=rows, zeros=zeros is not None)
    return Quantised(form, unpack_int4(codes) if storage == "int4" else codes, scale, zeros)


def _matrix_in_torch(
    codes: Tensor, scale: Tensor, zeros: Tensor | None, group: int, rows: int, dtype: torch.dtype
) -> Tensor:
    return matrix_of(_unpacked(codes, scale, zeros, group, rows), dtype)


def _e4m3_in_torch(codes: Tensor, scale: Tensor, zeros: Tensor | None, group: int, rows: int) -> tuple[Tensor, Tensor]:
    whole = _unpacked(codes, scale, zeros, group, rows)
    most = scale.float().abs().amax(1, keepdim=True).repeat_interleave(rows, 0)[: codes.shape[0]]
    of_rows = most / code_in_e4m3(whole.format.storage, zeros is not None)
    of_scales = of_rows[::rows]
    share = torch.where(of_scales > 0.0, scale.float() / of_scales, 0.0)
    return matrix_of(whole._replace(scale=share), torch.float32).to(torch.float8_e4m3fn), of_rows


def _matrix_on_cuda(
    codes: Tensor, scale: Tensor, zeros: Tensor | None, group: int, rows: int, dtype: torch.dtype
) -> Tensor:
    # Triton exists where CUDA does; elsewhere it must not be needed.
    from graphgen.models.formats.matrix_kernels import make_matrix

    matrix, _ = make_matrix(codes, scale, zeros, group, rows, dtype, scaled=False)
    return matrix


def _e4m3_on_cuda(codes: Tensor, scale: Tensor, zeros: Tensor | None, group: int, rows: int) -> tuple[Tensor, Tensor]:
    from graphgen.models.formats.matrix_kernels import make_matrix

    return make_matrix(codes, scale, zeros, group, rows, torch.float8_e4m3fn, scaled=True)


def _num_columns(codes: Tensor) -> int:
    return codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1)


def _matrix_like(
    codes: Tensor, scale: Tensor, zeros: Tensor | None, group: int, rows: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(codes.shape[0], _num_columns(codes), dtype=dtype)


def _e4m3_like(codes: Tensor, scale: Tensor, zeros: Tensor | None, group: int, rows: int) -> tuple[Tensor, Tensor]:
    matrix = codes.new_empty(codes.shape[0], _num_columns(codes), dtype=torch.float8_e4m3fn)
    return matrix, codes.new_empty(codes.shape[0], 1, dtype=torch.float32)


# A Library ends with its last reference.
_library = torch.library.Library("graphgen", "FRAGMENT")
for _schema in _SCHEMAS:
    _library.define(_schema)
_library.impl("weight_matrix", _matrix_in_torch, "CPU")
_library.impl("weight_matrix", _matrix_on_cuda, "CUDA")
_library.impl("weight_in_e4m3", _e4m3_in_torch, "CPU")
_library.impl("weight_in_e4m3", _e4m3_on_cuda, "CUDA")
torch.library.register_fake("graphgen::weight_matrix", _matrix_like, lib=_library)
torch.library.register_fake("graphgen::weight_in_e4m3", _e4m3_like, lib=_library)
