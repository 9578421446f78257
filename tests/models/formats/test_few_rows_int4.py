"""The kernel of few rows in e4m3 and weights in int4 in Triton's interpreter, against what its operands mean.

Where a CUDA device is, tests/gpu/test_formats_gpu.py runs the compiled kernel instead.
"""

import importlib.util

import pytest
import torch
from torch import Tensor

from graphgen.models.formats.products import Weight
from graphgen.models.spec.formats import LinearFormat
from tests.models.format_cases import matrix, random_weight
from tests.models.kept import convert_fp8_as_a_gpu_does

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed; comes with torch for CUDA", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("tests/gpu/test_formats_gpu.py runs the compiled kernel", allow_module_level=True)

from graphgen.models.formats import few_rows_int4  # Triton exists where it is installed


@pytest.fixture(autouse=True)
def _numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    convert_fp8_as_a_gpu_does(monkeypatch)
    few_rows_int4._counters.cache_clear()


def form_of(group: int | None, zeros: bool) -> LinearFormat:
    return LinearFormat(storage="int4", group=group, zeros=zeros, scale_dtype="float16")


def check(weight: Weight, num_rows: int, bias: Tensor | None = None, cut: few_rows_int4.Cut | None = None) -> None:
    size, depth = weight.codes.shape[0], 2 * weight.codes.shape[1]
    left, of_left = torch.randn(num_rows, depth).mul(8.0).to(torch.float8_e4m3fn), torch.rand(num_rows, 1) + 0.5
    stored = weight.codes, weight.scale, weight.zeros, weight.format.group or 0
    got = few_rows_int4.product(left, of_left, *stored, bias, torch.float32, chained=False, chosen=cut)
    want = (left.double() * of_left) @ matrix(weight).double().T
    want = want if bias is None else want + bias
    assert got.shape == (num_rows, size)
    assert (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [64, 128, 384, None])
@pytest.mark.parametrize("num_rows", [1, 17, 128])
def test_every_group_of_columns_has_its_scale_and_zero(num_rows: int, group: int | None, zeros: bool) -> None:
    check(random_weight(form_of(group, zeros), 96, 384), num_rows)


@pytest.mark.parametrize("num_rows", [1, 16, 33, 64, 65])
@pytest.mark.parametrize(("size", "depth"), [(16, 128), (144, 512), (208, 1280)])
def test_sizes_need_not_be_those_of_a_program(num_rows: int, size: int, depth: int) -> None:
    check(random_weight(form_of(128, True), size, depth), num_rows, torch.randn(size))


@pytest.mark.parametrize("group", [64, 128, None])
@pytest.mark.parametrize("turn", [128, 256])
@pytest.mark.parametrize("splits", [1, 2, 3, 4])
def test_programs_share_a_depth_and_leave_the_counters_at_zero(splits: int, turn: int, group: int | None) -> None:
    for columns in (64, 128):
        cut = few_rows_int4.Cut(16, columns, turn, splits, warps=4, stages=3)
        check(random_weight(form_of(group, True), 144, 1280), 35, torch.randn(144), cut)
        assert not few_rows_int4._counters(torch.device("cpu")).any()


@pytest.mark.parametrize("zero", [0, 7, 15, None])
def test_every_code_is_multiplied_exactly(zero: int | None) -> None:
    """Each of 256 bytes, times a one and zeros."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(16, 1)
    zeros = None if zero is None else torch.full((16, 4), zero, dtype=torch.uint8)
    weight = Weight(form_of(128, zero is not None), codes, torch.ones(16, 4), zeros, None)
    cut = few_rows_int4.Cut(64, 64, 128, splits=1, warps=4, stages=3)
    for first in range(0, 512, 128):
        left = torch.eye(512)[first : first + 128].to(torch.float8_e4m3fn)
        stored = *weight[1:4], 128, None
        got = few_rows_int4.product(left, torch.ones(128, 1), *stored, torch.float32, chained=False, chosen=cut)
        assert torch.equal(got, matrix(weight)[:, first : first + 128].T)


def test_what_is_read_as_it_lies() -> None:
    assert few_rows_int4.serves(128, 4096, 128, 1)
    assert few_rows_int4.serves(1, 128, 64, 1)
    assert few_rows_int4.serves(64, 14336, 0, 1)
    assert not few_rows_int4.serves(129, 4096, 128, 1)
    assert not few_rows_int4.serves(64, 4096, 32, 1)
    assert not few_rows_int4.serves(64, 4096, 128, 128)
    assert not few_rows_int4.serves(64, 4096 + 64, 128, 1)


@pytest.mark.parametrize("num_rows", [1, 16, 17, 64, 65, 128])
@pytest.mark.parametrize("size", [32, 4096, 6144, 28672])
@pytest.mark.parametrize("depth", [128, 384, 4096, 14336 + 128])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_cut_divides_the_depth_and_fits_a_multiprocessor(num_rows: int, size: int, depth: int, zeros: bool) -> None:
    cut = few_rows_int4.cut(num_rows, size, depth, zeros)
    assert depth % cut.depth == 0
    assert cut.splits <= depth // cut.depth
    assert (cut.rows + cut.columns // 2) * cut.depth * cut.stages <= 227 << 10
    assert -(-num_rows // cut.rows) * -(-size // cut.columns) <= few_rows_int4._MOST_COUNTERS or cut.splits == 1
