"""Products with a weight that has no format, whatever way the number of rows chooses."""

import pytest
import torch
from torch import Tensor

from graphgen.models.formats.products import TURNED_ROWS, matrix_product


@pytest.mark.parametrize("num_rows", [0, 1, 2, TURNED_ROWS - 1, TURNED_ROWS, TURNED_ROWS + 1, 40])
@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (32, 32)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_float64(num_rows: int, shape: tuple[int, int], biased: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(num_rows, shape[1]), torch.randn(shape)
    bias = torch.randn(shape[0]) if biased else None
    found = matrix_product(x, weight, bias)
    want = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(), "what follows reads rows"


def test_a_wide_weight_is_turned_up_to_eight_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    turned: list[int] = []
    mm = torch.mm

    def counted(left: Tensor, right: Tensor) -> Tensor:
        turned.append(right.shape[1])
        return mm(left, right)

    monkeypatch.setattr(torch, "mm", counted)
    for num_rows in range(1, 12):
        matrix_product(torch.randn(num_rows, 16), torch.randn(48, 16), None)
        matrix_product(torch.randn(num_rows, 16).bfloat16(), torch.randn(48, 16).bfloat16(), None)
    assert turned == list(range(2, TURNED_ROWS + 1))
