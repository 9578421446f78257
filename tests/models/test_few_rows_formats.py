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
from graphgen.models.formats.products import Weight
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


def tolerance(x: Tensor, weight: Tensor | Weight) -> Tensor:
    """By how much each number of x @ weight.T, [rows, N], may differ from the product in float32.

    One row times int4 has inputs of 16 bits: a piece, 16 columns of a block of 128 and the 16 that are 64 further, has
    the largest of them in common. Six deviations of what rounding them adds, and a part of the products' size.
    """
    whole = weight if isinstance(weight, Tensor) else matrix(weight)
    size = (x.pow(2) @ whole.pow(2).T).sqrt()
    if isinstance(weight, Tensor) or weight.format.storage != "int4" or x.shape[0] > 1:
        return 1e-5 * size
    order = torch.arange(x.shape[1]) if weight.permutation is None else weight.permutation.long()
    pieces = x[0, order].view(-1, 2, 4, 16).abs().amax((1, 3))
    squares = whole[:, order].view(-1, *pieces.shape[:1], 2, 4, 16).pow(2).sum((2, 4))
    deviation = (squares * (pieces * 2.0**-14).pow(2) / 12.0).sum((1, 2)).sqrt()
    return 6.0 * deviation + 1e-5 * size


def assert_near(got: Tensor, want: Tensor, most: Tensor) -> None:
    """most: see tolerance."""
    assert got.shape == want.shape
    assert ((got - want).abs() <= most + 1e-5).all(), ((got - want).abs() / most).max()


@pytest.mark.parametrize("num_rows", [1, 3, 17])
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_the_weight_that_the_codes_mean(name: str, num_rows: int) -> None:
    torch.manual_seed(0)
    size, depth = 160, 512
    weight, bias = random_weight(FORMATS[name], size, depth), torch.randn(size)
    x, residual, norm = torch.randn(num_rows, depth), torch.randn(num_rows, size), make_norm(size)
    sums, normed = few_rows.adding_linear(x, weight, bias, residual, norm, chained=False)
    assert_near(sums, residual + F.linear(x, matrix(weight), bias), tolerance(x, weight))
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
        most = tolerance(norm(x), weight)
        assert_near(got, both, most)
        (gate, up), (most_gate, most_up) = both.chunk(2, dim=-1), most.chunk(2, dim=-1)
        got = few_rows.gated_linear(begun(x, norm), EPS, weight, offset, "gelu", chained=False)
        active = ACTIVATIONS["gelu"](gate)
        assert_near(got, active * up, 1.2 * most_gate * up.abs() + active.abs() * most_up)


GROUPS = [name for name in FORMATS if name.startswith("int4") and "reordered" not in name]


def sums_of(x: Tensor, weight: Weight) -> Tensor:
    """x @ weight.T by the kernel of one row."""
    size = weight.codes.shape[0]
    return few_rows.adding_linear(x, weight, None, torch.zeros(1, size), make_norm(size), chained=False)[0]


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("depth", [128, 5120, 8064])
def test_a_row_of_any_length_is_multiplied_in_as_many_turns_as_it_takes(group: int, depth: int) -> None:
    torch.manual_seed(3)
    form = LinearFormat(storage="int4", group=group, zeros=group != 64)
    x, weight = torch.randn(1, depth), random_weight(form, 32, depth)
    assert_near(sums_of(x, weight), x @ matrix(weight).T, tolerance(x, weight))


@pytest.mark.parametrize("name", GROUPS)
def test_inputs_of_bfloat16_are_exact_beside_one_that_is_32_times_as_large(name: str) -> None:
    torch.manual_seed(4)
    x = (torch.rand(1, 512) + 1.0) * (torch.randint(2, (1, 512)) * 2 - 1)
    x[0, ::32] *= 32.0
    x[0, 200] = 0.0
    x = x.bfloat16().float()
    weight = random_weight(FORMATS[name], 32, 512)
    want = x.double() @ matrix(weight).double().T
    size = (x.double().pow(2) @ matrix(weight).double().pow(2).T).sqrt()
    assert ((sums_of(x, weight) - want).abs() <= 2e-6 * size).all()


@pytest.mark.parametrize("name", GROUPS)
def test_an_outlier_costs_only_its_neighbours_their_last_bits(name: str) -> None:
    torch.manual_seed(5)
    x, weight = torch.randn(1, 512), random_weight(FORMATS[name], 32, 512)
    x[0, 77] *= 1000.0
    got, want = sums_of(x, weight), x @ matrix(weight).T
    assert_near(got, want, tolerance(x, weight))
    assert (got - want).norm() < 1e-4 * want.norm()


@pytest.mark.parametrize("scale", [0.0, 1e-44, 2.0**-115, 1e30])
def test_rows_of_zeros_and_of_the_ends_of_the_range_are_multiplied(scale: float) -> None:
    torch.manual_seed(6)
    x, weight = torch.randn(1, 256) * scale, random_weight(INT4, 32, 256)
    got = sums_of(x, weight)
    assert ((got - x @ matrix(weight).T).abs() <= 1e-3 * scale + 1e-30).all()


@pytest.mark.parametrize("below", [2.0**-24, 2.0**-17, 2.0**-15, 2.0**-8])
def test_what_is_rounded_to_a_power_of_two_has_room(below: float) -> None:
    torch.manual_seed(7)
    x, weight = torch.full((1, 256), 2.0 * (1.0 - below)), random_weight(INT4, 32, 256)
    for signed in (x, -x):
        assert_near(sums_of(signed, weight), signed @ matrix(weight).T, 2.0**-13 * matrix(weight).abs().sum(1))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 63, 64, 511])
def test_what_is_not_finite_makes_every_number_nan(value: float, place: int) -> None:
    x, weight = torch.ones(1, 512), random_weight(INT4, 32, 512)
    x[0, place] = value
    assert sums_of(x, weight).isnan().all()


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
