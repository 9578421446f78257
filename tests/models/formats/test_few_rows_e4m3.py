"""The kernel of few rows in e4m3 in Triton's interpreter, against the numbers that its operands mean.

Where a CUDA device is, tests/gpu/test_formats_gpu.py runs the compiled kernel instead.
"""

import importlib.util

import pytest
import torch

from graphgen.models.formats.as_they_lie import BLOCK
from tests.models.kept import convert_fp8_as_a_gpu_does

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed; comes with torch for CUDA", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("tests/gpu/test_formats_gpu.py runs the compiled kernel", allow_module_level=True)

from graphgen.models.formats import few_rows_e4m3  # Triton exists where it is installed


@pytest.fixture(autouse=True)
def _numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    convert_fp8_as_a_gpu_does(monkeypatch)


def e4m3(*shape: int) -> torch.Tensor:
    return torch.randn(shape).mul(8.0).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("size", "depth"), [(96, 128), (144, 384), (6144, 256)])
@pytest.mark.parametrize("num_rows", [1, 17, 64, 100])
def test_rows_have_one_scale_each(num_rows: int, size: int, depth: int, with_bias: bool) -> None:
    left, codes = e4m3(num_rows, depth), e4m3(size, depth)
    of_left, scale = torch.rand(num_rows, 1) + 0.5, torch.rand(size, 1) + 0.5
    bias = torch.randn(size) if with_bias else None
    got = few_rows_e4m3.product(left, of_left, codes, scale, bias, torch.float32, False, True, chained=False)
    want = (left.float() * of_left) @ (codes.float() * scale).T
    want = want if bias is None else want + bias
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("size", "depth"), [(96, 128), (208, 384)])
@pytest.mark.parametrize("num_rows", [3, 64, 65])
def test_blocks_have_one_scale_each(num_rows: int, size: int, depth: int) -> None:
    left, codes = e4m3(num_rows, depth), e4m3(size, depth)
    of_left = torch.rand(depth // BLOCK, num_rows) + 0.5
    scale = torch.rand(-(-size // BLOCK), depth // BLOCK) + 0.5
    got = few_rows_e4m3.product(left, of_left, codes, scale, None, torch.float32, True, True, chained=False)
    wide = left.float() * of_left.T.repeat_interleave(BLOCK, 1)
    weight = codes.float() * scale.repeat_interleave(BLOCK, 0)[:size].repeat_interleave(BLOCK, 1)
    torch.testing.assert_close(got, wide @ weight.T, rtol=1e-4, atol=1e-2)


def test_the_library_keeps_what_fills_the_device() -> None:
    assert few_rows_e4m3.serves(64, 28672, 4096)
    assert few_rows_e4m3.serves(128, 6144, 4096)
    assert few_rows_e4m3.serves(256, 4096, 14336)
    assert not few_rows_e4m3.serves(65, 28672, 4096)
    assert not few_rows_e4m3.serves(256, 6144, 4096)
    assert not few_rows_e4m3.serves(257, 1024, 4096)
    assert not few_rows_e4m3.serves(64, 4096, 4096 + 64)


@pytest.mark.parametrize("num_rows", [1, 64, 65, 128, 256])
@pytest.mark.parametrize("size", [32, 4096, 6144, 28672])
@pytest.mark.parametrize("depth", [128, 4096, 14336 + 128])
@pytest.mark.parametrize("blocked", [False, True])
def test_a_cut_divides_the_depth_and_fits_a_multiprocessor(num_rows: int, size: int, depth: int, blocked: bool) -> None:
    cut = few_rows_e4m3.cut(num_rows, size, depth, blocked)
    assert depth % cut.depth == 0
    assert not blocked or cut.depth == BLOCK
    assert (few_rows_e4m3.ROWS + cut.columns) * cut.depth * cut.stages <= 227 << 10
