"""A linear layer, whatever format its weight has, and several of one size: those of a layer's experts.

Owns the tensors of a weight and the order in which stored ones fill them. How they multiply is in products.py, what
they mean in layout.py. Every block of a model is built from these; loader.py fills them through targets.py.
"""

import torch
from torch import Tensor, nn

from graphgen.models.formats import cpu_int4
from graphgen.models.formats.layout import CODE_DTYPES, Quantised, codes_shape, pack_int4, scale_shape, unpack_int4
from graphgen.models.formats.products import CPU_FEW_ROWS, Weight, matrix_product, product
from graphgen.models.spec.formats import LinearFormat

NO_PLACE = -1
"""In a permutation that was not filled yet."""


class StoredWeight(nn.Module):
    """Some rows of `in` columns, which are filled a few at a time. Its tensors are uninitialised memory: the loader
    fills them.

    weight       [out, in] of the model's dtype; of a format, its codes
    scale, zeros, permutation    those of the format, or None: formats/layout.py
    """

    def __init__(self, in_size: int, out_size: int, dtype: torch.dtype, format: LinearFormat | None) -> None:
        """format: None has the weight in `dtype`."""
        super().__init__()
        self.in_features, self.out_features, self.format = in_size, out_size, format
        self.scale: nn.Parameter | None = None
        self.zeros: nn.Parameter | None = None
        self.permutation: nn.Parameter | None = None
        if format is None:
            self.weight = _empty((out_size, in_size), dtype)
        else:
            codes, scales = CODE_DTYPES[format.storage], scale_shape(format, out_size, in_size)
            self.weight = _empty(codes_shape(format.storage, out_size, in_size), codes)
            self.scale = _empty(scales, getattr(torch, format.scale_dtype))
            self.zeros = _empty(scales, codes) if format.zeros else None
            if format.permuted:
                self.permutation = nn.Parameter(
                    torch.full((in_size,), NO_PLACE, dtype=torch.int32), requires_grad=False
                )

    def fill(self, first_row: int, part: Quantised) -> None:
        """Puts rows of a weight in this layer's format where they belong, from `first_row` on, a multiple of
        format.rows. Raises ValueError where they read the input in another order than the rows that are there."""
        assert self.format == part.format, "arranged for this layer"
        assert self.scale is not None, "every format has scales"
        rows, scales = self._places(first_row, part.shape[0])
        codes = pack_int4(part.codes) if self.format.storage == "int4" else part.codes
        self.weight.data[rows].copy_(codes)
        self.scale.data[scales].copy_(part.scale)
        if self.zeros is not None and part.zeros is not None:
            self.zeros.data[scales].copy_(part.zeros)
        if self.permutation is not None:
            self._permute_by(part.permutation)

    def rows(self, first_row: int, num_rows: int) -> Quantised:
        """Some rows of the weight again, as `fill` took them."""
        assert self.format is not None, "a weight in the model's dtype has no codes"
        assert self.scale is not None, "every format has scales"
        rows, scales = self._places(first_row, num_rows)
        codes = unpack_int4(self.weight[rows]) if self.format.storage == "int4" else self.weight[rows]
        zeros = None if self.zeros is None else self.zeros[scales]
        return Quantised(self.format, codes, self.scale[scales], zeros, self.permutation)

    def _places(self, first_row: int, num_rows: int) -> tuple[slice, slice]:
        """Of some rows, and of their scales."""
        assert self.format is not None, "only such weights have scales"
        block = self.format.rows
        return slice(first_row, first_row + num_rows), slice(first_row // block, -(-(first_row + num_rows) // block))

    def _permute_by(self, permutation: Tensor | None) -> None:
        own = self.permutation
        assert own is not None, "of a reordered format"
        given = torch.arange(self.in_features, device=own.device) if permutation is None else permutation
        if bool((own != NO_PLACE).any()) and not torch.equal(own, given.to(own)):
            raise ValueError(
                "its parts (q, k and v, or gate and up) read their input in different orders (g_idx): use a checkpoint"
                " without desc_act"
            )
        own.data.copy_(given)

    @property
    def num_bytes(self) -> int:
        """Of all its tensors."""
        return sum(parameter.nbytes for parameter in self.parameters(recurse=False))


class Linear(StoredWeight):
    """x @ weight.T + bias.

    bias         [out] of the model's dtype, or None
    """

    def __init__(
        self, in_size: int, out_size: int, bias: bool, dtype: torch.dtype, format: LinearFormat | None = None
    ) -> None:
        super().__init__(in_size, out_size, dtype, format)
        self.bias = _empty((out_size,), dtype) if bias else None
        self.in_torchs_order = False
        """Whether `weight` and `scale` are those of cpu_int4.CpuInt4, and `zeros` are among the scales."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] of the model's dtype."""
        if self.in_torchs_order and self.scale is not None:
            if self.permutation is not None:
                x = x.index_select(-1, self.permutation)
            return cpu_int4.product(x, cpu_int4.CpuInt4(self.weight, self.scale), self.bias, CPU_FEW_ROWS)
        if self.format is None:
            return matrix_product(x, self.weight, self.bias)
        stored = self.stored
        assert isinstance(stored, Weight), "every format has scales"
        return product(x, stored, self.bias)

    @property
    def stored(self) -> Tensor | Weight:
        """The weight as its products take it."""
        if self.format is None or self.scale is None:
            return self.weight
        return Weight(self.format, self.weight, self.scale, self.zeros, self.permutation)

    def settle(self, dtype: torch.dtype) -> None:
        """To be called once all rows are there: brings an int4 weight into the order of the CPU's own product, where
        one serves it. dtype: of inputs."""
        form, size = self.format, (self.out_features, self.in_features)
        if form is None or self.weight.device.type != "cpu" or not cpu_int4.serves(form, *size, dtype):
            return
        ordered = cpu_int4.in_torchs_order(self.rows(0, self.out_features))
        self.weight.data.copy_(ordered.codes)
        self.scale, self.zeros = nn.Parameter(ordered.scales_and_zeros, requires_grad=False), None
        self.in_torchs_order = True

    def rows(self, first_row: int, num_rows: int) -> Quantised:
        assert not self.in_torchs_order, "rows are read before the weight is settled"
        return super().rows(first_row, num_rows)


class LinearStack(StoredWeight):
    """Linear layers of one size: the rows of the first, of the second and so on are those of one weight."""

    def __init__(
        self, count: int, in_size: int, out_size: int, dtype: torch.dtype, format: LinearFormat | None = None
    ) -> None:
        """out_size: of each; a multiple of format.rows, so that no scale is of two layers. Raises ValueError for a
        format whose columns are in an order of their own, which each layer would have another of."""
        if format is not None and (format.permuted or out_size % format.rows):
            raise ValueError(f"{count} layers of {out_size} rows cannot be one weight in {format.name}")
        super().__init__(in_size, count * out_size, dtype, format)
        self.count, self.each_rows = count, out_size

    @property
    def stored(self) -> Tensor | Weight:
        """The weights as their products take them: every tensor as it is of one, [count, ...]."""
        if self.format is None or self.scale is None:
            return self._apart(self.weight)
        zeros = None if self.zeros is None else self._apart(self.zeros)
        return Weight(self.format, self._apart(self.weight), self._apart(self.scale), zeros, None)

    def _apart(self, tensor: Tensor) -> Tensor:
        return tensor.view(self.count, -1, tensor.shape[1])


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
