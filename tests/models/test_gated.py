"""A gated activation whose result is rounded at once, against the two steps one after the other."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from msgspec.structs import replace
from torch import Tensor

from graphgen.models.activations import ACTIVATIONS
from graphgen.models.few_rows_layers import IN_KERNELS
from graphgen.models.formats.layout import E4M3_MOST
from graphgen.models.formats.linear import Linear
from graphgen.models.formats.products import Multiplies, product_of_many_rows, quantise_rows
from graphgen.models.gated import MOST_COLUMNS, gated_product, is_rounded_at_once, product_of_gated
from graphgen.models.spec.formats import LinearFormat
from tests.models.format_cases import E4M3, FORMATS, INT4, matrix, random_weight

EVERYTHING, BY_NO_ROWS = Multiplies(True, True), Multiplies(False, False)
ROUNDED = [form for form in FORMATS.values() if form.rounds_input and not form.permuted]
ROUNDED = [form for form in ROUNDED if form.storage != "e4m3" or (form.rows, form.group) == (1, None)]


def apart(inner: Tensor, activation: str) -> Tensor:
    gate, up = inner.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


@pytest.mark.parametrize("activation", IN_KERNELS)
@pytest.mark.parametrize("form", ROUNDED, ids=lambda form: form.name)
def test_the_product_is_that_of_both_steps(form: LinearFormat, activation: str) -> None:
    """As the operators of CPUs have it, and so but for the rounding that of the weight itself."""
    torch.manual_seed(0)
    weight, bias = random_weight(form, 160, 512), torch.randn(160).bfloat16()
    inner = torch.randn(7, 1024).bfloat16()
    assert is_rounded_at_once(weight, activation, EVERYTHING)
    got = product_of_gated(inner, activation, weight, bias)
    made = apart(inner, activation)
    assert torch.equal(got, product_of_many_rows(made, weight, bias, EVERYTHING))
    want = F.linear(made.float(), matrix(weight), bias.float())
    assert (got.float() - want).norm() < 0.06 * want.norm(), "input and integer codes have three bits of mantissa"


def test_it_is_taken_only_where_the_product_rounds_whole_rows() -> None:
    weight = random_weight(E4M3, 160, 512)
    assert is_rounded_at_once(weight, "silu", EVERYTHING)
    assert not is_rounded_at_once(weight, "silu", BY_NO_ROWS)
    assert not is_rounded_at_once(weight, "relu", EVERYTHING), "the kernel has it not"
    assert not is_rounded_at_once(random_weight(E4M3, 16, MOST_COLUMNS + 16), "silu", EVERYTHING)
    assert not is_rounded_at_once(random_weight(E4M3, 24, 512), "silu", EVERYTHING), "nor does torch multiply it"
    assert not is_rounded_at_once(weight._replace(format=replace(E4M3, activation="model")), "silu", EVERYTHING)
    blocks = random_weight(FORMATS["fp8 128x128 (fp8 input)"], 160, 512)
    assert not is_rounded_at_once(blocks, "silu", EVERYTHING), "each block has a scale"
    reordered = random_weight(INT4, 160, 512)._replace(permutation=torch.randperm(512))
    assert not is_rounded_at_once(reordered, "silu", EVERYTHING)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_on_the_cpu_it_is_both_steps(activation: str) -> None:
    torch.manual_seed(1)
    down = Linear(64, 32, bias=True, dtype=torch.float32)
    for parameter in down.parameters():
        parameter.data.normal_()
    inner = torch.randn(5, 128)
    assert torch.equal(gated_product(inner, activation, down), down(apart(inner, activation)))


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; comes with torch for CUDA"
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_formats_gpu.py runs the compiled kernel")
@pytest.mark.parametrize("activation", IN_KERNELS)
@pytest.mark.parametrize("columns", [16, 352, 1024, 1536])
def test_the_kernel_rounds_as_the_reference(activation: str, columns: int) -> None:
    from graphgen.models.gated_kernel import gated_rows

    torch.manual_seed(2)
    inner = torch.randn(6, 2 * columns).bfloat16() * torch.tensor([1.0, 1e-3, 30.0, 1.0, 1.0, 1.0])[:, None].bfloat16()
    inner[3] = 0.0
    inner[4, columns - 1] = inner[4, -1] = 500.0  # the last column counts, and makes the scale
    # In float32: the interpreter rounds to e4m3 in a way of its own.
    codes, scale = gated_rows(inner, IN_KERNELS[activation], chained=False, dtype=torch.float32)
    want = apart(inner, activation)
    to_next = 2.0**-7  # bfloat16, where a last bit of the activation decides
    largest = want.float().abs().amax(1, keepdim=True)
    torch.testing.assert_close(
        codes * scale / largest, want.float() / largest, rtol=2 * to_next, atol=1e-6, equal_nan=True
    )
    torch.testing.assert_close(scale, quantise_rows(want)[1], rtol=2 * to_next, atol=0.0)
    assert codes.abs().max() <= E4M3_MOST
    assert not codes[3].any()
    for broken in (float("nan"), float("inf")):
        inner[2, columns // 2] = broken
        codes, scale = gated_rows(inner, IN_KERNELS[activation], chained=False, dtype=torch.float32)
        assert bool(codes[2].isnan().all() and scale[2].isnan())
        assert bool(codes[[0, 1, 3, 4, 5]].isfinite().all()), "the others are as they were"
