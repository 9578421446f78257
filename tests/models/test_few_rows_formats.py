"""The kernels of few rows with quantised weights in Triton's interpreter, against the reference of formats/layout.py.

Where a CUDA device is, tests/gpu/test_formats_gpu.py runs the compiled kernels instead: Triton decides when it is
imported whether it interprets, so both cannot be had in one process. tests/conftest.py tells it to.
"""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphgen.models.activations import ACTIVATIONS
from graphgen.models.norms import RMSNorm
from graphgen.models.spec import Norm
from graphgen.models.spec.formats import LinearFormat
from tests.models.format_cases import E4M3, FORMATS, INT4, INT8, matrix, random_weight

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed; comes with torch for CUDA", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("tests/gpu/test_formats_gpu.py runs the compiled kernels", allow_module_level=True)

from graphgen.models import few_rows  # Triton exists where it is installed
from graphgen.models.few_rows_tiles import Shape
from graphgen.models.normed import Normed
from graphgen.models.one_row import adds_up

# The interpreter computes in numpy, which warns where a kernel means it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EPS = 1e-5
WHOLE_ROWS = (E4M3.name, "fp8", INT8.name)


def make_norm(size: int) -> RMSNorm:
    norm = RMSNorm(size, Norm(eps=EPS), torch.float32)
    assert norm.weight is not None
    norm.weight.data.normal_(1.0, 0.3)
    return norm


def begun(x: Tensor, norm: RMSNorm) -> Normed:
    """As the kernel ahead leaves it."""
    assert norm.weight is not None
    return Normed(x * norm.weight, x.pow(2).unflatten(1, (4, -1)).sum(-1))


@pytest.mark.parametrize("num_rows", [1, 3, 17])
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_the_weight_that_the_codes_mean(name: str, num_rows: int) -> None:
    torch.manual_seed(0)
    size, depth = 160, 512
    weight, bias = random_weight(FORMATS[name], size, depth), torch.randn(size)
    x, residual, norm = torch.randn(num_rows, depth), torch.randn(num_rows, size), make_norm(size)
    sums, normed = few_rows.adding_linear(x, weight, bias, residual, norm, chained=False)
    torch.testing.assert_close(sums, residual + F.linear(x, matrix(weight), bias), rtol=1e-4, atol=1e-4)
    assert norm.weight is not None
    torch.testing.assert_close(normed.scaled, sums * norm.weight)
    torch.testing.assert_close(normed.squares.sum(1), sums.pow(2).sum(1))


@pytest.mark.parametrize("form", [None, E4M3, INT8, INT4], ids=lambda form: "plain" if form is None else form.name)
@pytest.mark.parametrize("depth", [1024, 896])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_a_norm_comes_before_the_product_and_the_activation_behind_it(
    form: LinearFormat | None, depth: int, num_rows: int
) -> None:
    torch.manual_seed(1)
    size = 96
    x, norm, bias = torch.randn(num_rows, depth), make_norm(depth), torch.randn(2 * size)
    weight = torch.randn(2 * size, depth) * 0.02 if form is None else random_weight(form, 2 * size, depth)
    for offset in (bias, None):
        both = F.linear(norm(x), weight if isinstance(weight, Tensor) else matrix(weight), offset)
        got = few_rows.normed_linear(begun(x, norm), EPS, weight, offset, chained=False)
        torch.testing.assert_close(got, both, rtol=1e-4, atol=1e-4)
        gate, up = both.chunk(2, dim=-1)
        got = few_rows.gated_linear(begun(x, norm), EPS, weight, offset, "gelu", chained=False)
        torch.testing.assert_close(got, ACTIVATIONS["gelu"](gate) * up, rtol=1e-4, atol=1e-4)


def test_kernels_of_one_row_read_int4_and_what_has_one_scale_a_row() -> None:
    """Others have a scale between the weight and the sum."""
    served = {name for name, form in FORMATS.items() if adds_up(random_weight(form, 32, 256))}
    assert served == {name for name, form in FORMATS.items() if form.storage == "int4" or name in WHOLE_ROWS}
    assert adds_up(torch.empty(32, 256))


@pytest.mark.parametrize("slices", [0, 2, 4])
@pytest.mark.parametrize("turn", [128, 256])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("name", ["fp8 128x128 (fp8 input)", "int4 g32 with zeros", "int4 g64", "int4"])
def test_however_a_product_is_cut_it_is_the_same(name: str, early: bool, turn: int, slices: int) -> None:
    torch.manual_seed(2)
    x, weight, norm = torch.randn(2, 1024), random_weight(FORMATS[name], 32, 1024), make_norm(1024)
    shape = Shape(32, turn, slices, warps=4, stages=2, early=early)
    got = few_rows.normed_linear(begun(x, norm), EPS, weight, None, chained=False, shape=shape)
    torch.testing.assert_close(got, F.linear(norm(x), matrix(weight)), rtol=1e-4, atol=1e-4)
