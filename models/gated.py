"""The second half of a gated feed-forward: down(activation(gate) * up).

Owns when the input of that product is made and rounded by one kernel: where the product rounds it to e4m3 with a scale
for each row, which is known only after the row's largest element. What the compiler makes of these lines reads gate and
up twice, and the kernel of gated_kernel.py once. Called by feed_forward.py.
"""

import torch
from torch import Tensor

from graphgen.models.activations import ACTIVATIONS
from graphgen.models.few_rows_layers import IN_KERNELS
from graphgen.models.formats.linear import Linear
from graphgen.models.formats.products import (
    Multiplies,
    Weight,
    multiplies_e4m3,
    product_of_rounded,
    quantise_rows,
    rounds_rows,
)

MOST_COLUMNS = 16_384
"""A program of the kernel has a whole row in its registers."""


def gated_product(inner: Tensor, activation: str, down: Linear) -> Tensor:
    """down(activation(gate) * up), [T, out] in inner's dtype. inner: [T, 2 in], gate and up side by side."""
    stored = down.stored
    if inner.is_cuda and isinstance(stored, Weight) and is_rounded_at_once(stored, activation, multiplies_e4m3()):
        return product_of_gated(inner, activation, stored, down.bias)
    out: Tensor = down(_gated(inner, activation))
    return out


def is_rounded_at_once(weight: Weight, activation: str, device: Multiplies) -> bool:
    """Whether a product on such a device takes what the kernel makes."""
    fits = activation in IN_KERNELS and weight.depth <= MOST_COLUMNS
    return fits and weight.permutation is None and rounds_rows(weight, device)


def product_of_gated(inner: Tensor, activation: str, weight: Weight, bias: Tensor | None) -> Tensor:
    """The same, of a weight that `is_rounded_at_once`."""
    left, of_left = torch.ops.graphgen.gated_in_e4m3.default(inner, activation)
    return product_of_rounded(left, of_left, weight, bias, inner.dtype)


def _gated(inner: Tensor, activation: str) -> Tensor:
    gate, up = inner.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def _in_torch(inner: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return quantise_rows(_gated(inner, activation))


def _on_cuda(inner: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    from graphgen.models.chaining import can_chain
    from graphgen.models.gated_kernel import gated_rows  # imports Triton, which is there where CUDA is

    return gated_rows(inner, IN_KERNELS[activation], can_chain())


def _results_like(inner: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    num_rows, columns = inner.shape[0], inner.shape[1] // 2
    codes = inner.new_empty(num_rows, columns, dtype=torch.float8_e4m3fn)
    return codes, inner.new_empty(num_rows, 1, dtype=torch.float32)


# A Library ends with its last reference.
_library = torch.library.Library("graphgen", "FRAGMENT")
_library.define("gated_in_e4m3(Tensor inner, str activation) -> (Tensor, Tensor)")
_library.impl("gated_in_e4m3", _in_torch, "CPU")
_library.impl("gated_in_e4m3", _on_cuda, "CUDA")
torch.library.register_fake("graphgen::gated_in_e4m3", _results_like, lib=_library)
