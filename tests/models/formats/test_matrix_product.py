"""Products with a weight that has no format, whatever way the number of rows chooses."""

import pytest
import torch
from torch import Tensor

from graphgen.models.formats.products import BLOCK_ROWS, BLOCKED_ROWS, matrix_product


@pytest.mark.parametrize(
    "num_rows", [0, 1, 2, BLOCKED_ROWS[0] - 1, BLOCKED_ROWS[0], BLOCKED_ROWS[-1], BLOCKED_ROWS.stop, 40]
)
@pytest.mark.parametrize("shape", [(BLOCK_ROWS, 32), (3 * BLOCK_ROWS, 96), (BLOCK_ROWS + 1, 32), (32, 32)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_float64(num_rows: int, shape: tuple[int, int], biased: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(num_rows, shape[1]), torch.randn(shape)
    bias = torch.randn(shape[0]) if biased else None
    found = matrix_product(x, weight, bias)
    want = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(), "what follows reads rows"


def test_a_few_rows_are_multiplied_by_blocks_of_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
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
