"""Products with a weight that has no format, whatever way the sizes and the CPU choose."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from graphgen.models.formats import cpu_float32
from graphgen.models.formats.cpu_float32 import (
    BLOCK_ROWS,
    BLOCKED_ROWS,
    LEAST_BLOCKED,
    LEAST_FOR_ONEDNN,
    MOST_BLOCKED_ELEMENTS,
    MOST_BLOCKED_ROWS,
    mkl_is_held_back,
)
from graphgen.models.formats.products import matrix_product

HAS_ONEDNN = torch.backends.mkldnn.is_available()
HELD_BACK = [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_ONEDNN, reason="torch without oneDNN"))]


@pytest.fixture
def held_back(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU is taken for one on which MKL leaves instructions unused."""
    value: bool = request.param
    monkeypatch.setattr(cpu_float32, "mkl_is_held_back", lambda: value)
    return value


@pytest.mark.parametrize("held_back", HELD_BACK, indirect=True)
@pytest.mark.parametrize(
    "num_rows",
    [0, 1, 2, BLOCKED_ROWS[0] - 1, BLOCKED_ROWS[0], BLOCKED_ROWS[0] + 1, BLOCKED_ROWS[-1], BLOCKED_ROWS.stop, 40],
)
@pytest.mark.parametrize(
    "shape",
    [
        (BLOCK_ROWS, 32),
        (3 * BLOCK_ROWS, 96),
        (BLOCK_ROWS + 1, 32),
        (32, 32),
        (1009, 523),  # primes
        (BLOCK_ROWS, LEAST_BLOCKED // BLOCK_ROWS),
        (130, MOST_BLOCKED_ELEMENTS),
        (130, MOST_BLOCKED_ELEMENTS + 1),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_float64(held_back: bool, num_rows: int, shape: tuple[int, int], biased: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(num_rows, shape[1]), torch.randn(shape) / shape[1] ** 0.5
    bias = torch.randn(shape[0]) if biased else None
    found = matrix_product(x, weight, bias)
    want = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(), "what follows reads rows"


@pytest.mark.parametrize("held_back", HELD_BACK, indirect=True)
@pytest.mark.parametrize("num_rows", [1, 2, 8, 40])
def test_rows_may_lie_apart_and_are_left_as_they_are(held_back: bool, num_rows: int) -> None:
    torch.manual_seed(0)
    wide, weight, bias = torch.randn(num_rows, 1536), torch.randn(768, 512), torch.randn(768)
    copies = [part.clone() for part in (wide, weight, bias)]
    found = matrix_product(wide[:, 512:1024], weight, bias)
    assert torch.equal(found, matrix_product(wide[:, 512:1024].contiguous(), weight, bias))
    assert all(map(torch.equal, (wide, weight, bias), copies))


@pytest.mark.parametrize("held_back", [False], indirect=True)
def test_a_few_rows_are_multiplied_by_blocks_of_a_weight(held_back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked: list[int] = []
    matmul = torch.matmul

    def counted(left: Tensor, right: Tensor) -> Tensor:
        assert right.shape == (3, 16, BLOCK_ROWS)
        blocked.append(len(left))
        return matmul(left, right)

    monkeypatch.setattr(torch, "matmul", counted)
    for num_rows in range(1, 20):
        matrix_product(torch.randn(num_rows, 16), torch.randn(3 * BLOCK_ROWS, 16), None)
        matrix_product(torch.randn(num_rows, 16), torch.randn(3 * BLOCK_ROWS + 1, 16), None)
        matrix_product(torch.randn(num_rows, 16).bfloat16(), torch.randn(3 * BLOCK_ROWS, 16).bfloat16(), None)
    assert blocked == list(BLOCKED_ROWS)


@pytest.mark.parametrize("held_back", HELD_BACK, indirect=True)
@pytest.mark.parametrize(
    ("num_rows", "shape", "way"),
    [
        (1, (128, LEAST_BLOCKED // 128), "bmm"),
        (1, (128, LEAST_BLOCKED // 128 - 1), "linear"),
        (1, (129, MOST_BLOCKED_ELEMENTS), "bmm"),
        (1, (129, MOST_BLOCKED_ELEMENTS + 1), "onednn"),
        (2, (256, MOST_BLOCKED_ELEMENTS // 2), "bmm"),
        (2, (256, MOST_BLOCKED_ELEMENTS // 2 + 1), "onednn"),
        (MOST_BLOCKED_ROWS, (520, MOST_BLOCKED_ELEMENTS // MOST_BLOCKED_ROWS), "bmm"),
        (MOST_BLOCKED_ROWS + 1, (1032, 512), "onednn"),
        (16, (512, LEAST_FOR_ONEDNN // 8192), "onednn"),
        (16, (512, LEAST_FOR_ONEDNN // 8192 - 1), "linear"),
        (40, (512, 512), "onednn"),
    ],
)
def test_where_mkl_is_held_back_what_is_large_is_multiplied_otherwise(
    held_back: bool, num_rows: int, shape: tuple[int, int], way: str
) -> None:
    x, weight = torch.randn(num_rows, shape[1]), torch.randn(shape)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        matrix_product(x, weight, None)
    names = {"aten::bmm": "bmm", "mkldnn::_linear_pointwise": "onednn", "aten::linear": "linear"}
    found = {names[event.name] for event in profile.events() if event.name in names}
    assert found == {way if held_back else "linear"}


@pytest.mark.skipif(not HAS_ONEDNN or not torch.backends.mkl.is_available(), reason="torch with one library alone")
def test_mkl_is_held_back_on_all_cpus_but_intels(tmp_path: Path) -> None:
    vendors = {"GenuineIntel": False, "AuthenticAMD": True}
    for vendor, expected in vendors.items():
        cpuinfo = tmp_path / vendor
        cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: 26\n")
        assert mkl_is_held_back(cpuinfo) is expected
    assert mkl_is_held_back(tmp_path / "hidden") is False, "unknown"


def test_without_both_libraries_there_is_nothing_to_choose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("vendor_id\t: AuthenticAMD\n")
    for library in (torch.backends.mkl, torch.backends.mkldnn):
        with monkeypatch.context() as patch:
            patch.setattr(library, "is_available", lambda: False)
            assert mkl_is_held_back.__wrapped__(cpuinfo) is False
