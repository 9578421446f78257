"""A layer in a format computes what its dequantised weight does, whatever rows and columns of a stored one it has."""

from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from graphgen.models.families.family import TensorNames
from graphgen.models.feed_forward import MLP
from graphgen.models.formats.arranging import arranged_quantised
from graphgen.models.formats.cpu_int4 import CpuInt4, codes_of
from graphgen.models.formats.fitting import fitted
from graphgen.models.formats.layout import Quantised, dequantised
from graphgen.models.formats.linear import Linear
from graphgen.models.formats.quantise import quantised
from graphgen.models.orders import EMPTY
from graphgen.models.spec import Dense, LinearFormat, Shard

N, K, ROWS = 200, 320, 5
FORMATS = {
    "fp8": LinearFormat(storage="e4m3"),
    "fp8 blocks": LinearFormat(storage="e4m3", rows=128, group=128),
    "int8": LinearFormat(storage="int8"),
    "int8 zeros": LinearFormat(storage="int8", zeros=True),
    "int4": LinearFormat(storage="int4", scale_dtype="float16"),
    "int4 groups": LinearFormat(storage="int4", group=128, scale_dtype="bfloat16"),
    "int4 zeros": LinearFormat(storage="int4", group=32, zeros=True),
    "int4 reordered": LinearFormat(storage="int4", group=64, permuted=True),
}
ERRORS = {"e4m3": 0.04, "int8": 0.02, "int4": 0.2}
"""Root mean square of what a rounded normal weight is off, with a margin."""


def stored(name: str, num_rows: int = N, num_columns: int = K) -> Quantised:
    made = quantised(torch.randn(num_rows, num_columns), FORMATS[name])
    return made._replace(permutation=torch.randperm(num_columns).int()) if FORMATS[name].permuted else made


@pytest.mark.parametrize("name", FORMATS)
def test_a_rounded_weight_is_near_the_weight(name: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(N, K)
    form = replace(FORMATS[name], permuted=False)
    made = dequantised(quantised(weight, form), torch.float32)
    assert float((made - weight).square().mean().sqrt()) < ERRORS[form.storage]


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_that_are_all_the_same_are_kept(name: str, value: float) -> None:
    """A scale of zero would make them NaN, and a range without zero could not be told from it."""
    made = dequantised(quantised(torch.full((N, K), value), replace(FORMATS[name], permuted=False)), torch.float32)
    torch.testing.assert_close(made, torch.full((N, K), value), rtol=1e-2, atol=0)


@pytest.mark.parametrize("num_rows", [1, ROWS, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_multiplies_by_its_dequantised_weight(name: str, bias: bool, dtype: torch.dtype, num_rows: int) -> None:
    torch.manual_seed(0)
    weight, x = stored(name), torch.randn(2, num_rows, K).to(dtype)
    linear = Linear(K, N, bias, dtype, FORMATS[name])
    linear.fill(0, weight)
    linear.settle(dtype)
    offset = torch.randn(N).to(dtype)
    if linear.bias is not None:
        linear.bias.data.copy_(offset)
    expected = x.double() @ dequantised(weight, torch.float32).double().t() + (offset if bias else 0.0)
    error = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(linear(x).double(), expected, rtol=error, atol=error * float(expected.std()))


@pytest.mark.parametrize("name", FORMATS)
def test_rows_come_back_as_they_were_filled_in(name: str) -> None:
    weight, linear = stored(name), Linear(K, N, False, torch.float32, FORMATS[name])
    linear.fill(0, weight)
    assert linear.rows(0, N).equals(weight)
    assert linear.num_bytes == FORMATS[name].num_bytes(N, K)


def test_parts_that_read_their_input_in_different_orders_are_refused() -> None:
    linear = Linear(K, 2 * N, False, torch.float32, FORMATS["int4 reordered"])
    linear.fill(0, stored("int4 reordered"))
    with pytest.raises(ValueError, match="different orders"):
        linear.fill(N, stored("int4 reordered"))


ORDERS = {
    "whole": np.arange(K),
    "the second half": np.arange(K // 2, K),
    "heads of 40 padded to 64": np.concatenate(
        [np.append(np.arange(40 * head, 40 * head + 40), np.full(24, EMPTY)) for head in range(8)]
    ),
    "every second": np.arange(0, K, 2),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", FORMATS)
def test_columns_of_a_stored_weight_keep_their_values(name: str, order: str) -> None:
    columns, weight = ORDERS[order], stored(name)
    form = fitted(weight.format, columns=columns, num_columns=K)
    if form is None:
        assert FORMATS[name].group is not None, "one scale a row is for any column"
        assert order in ("every second", "heads of 40 padded to 64") or FORMATS[name].permuted
        return
    made = dequantised(arranged_quantised(weight, form, np.arange(N), columns), torch.float32)
    whole = dequantised(weight, torch.float32)
    expected = torch.where(torch.from_numpy(columns == EMPTY), 0.0, whole[:, np.maximum(columns, 0)])
    torch.testing.assert_close(made, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_a_stored_weight_keep_their_values(name: str) -> None:
    """Rows in another order, with an empty one: blocks become scales of their own for each row."""
    weight = stored(name)
    rows = np.append(np.arange(N)[::-1], EMPTY)
    form = fitted(weight.format, rows, [N])
    assert form is not None
    assert form.rows == 1
    made = dequantised(arranged_quantised(weight, form, rows, np.arange(K)), torch.float32)
    torch.testing.assert_close(made[:-1], dequantised(weight, torch.float32).flip(0), rtol=0, atol=0)
    assert not made[-1].any()


def test_blocks_stay_blocks_where_rows_stay_in_them() -> None:
    form = FORMATS["fp8 blocks"]
    assert fitted(form, np.arange(384), [256, 128]) == form
    inside = np.concatenate((np.arange(128)[::-1], np.arange(128, 384)))
    assert fitted(form, inside, [256, 128]) == form
    assert fitted(form, np.arange(384), [200, 184]) == replace(form, rows=1), "a block of both parts"
    assert fitted(form, np.arange(64, 384), [384]) == replace(form, rows=1)


def part(name: str, spec: Dense, shard: Shard, checkpoint: dict[str, Any]) -> Tensor:
    mlp = MLP(spec, K, torch.float32, shard)
    for key, target in mlp.weights("", TensorNames()):
        target.fill(checkpoint[key])
    x = torch.linspace(-1, 1, ROWS * K).view(ROWS, K)
    result: Tensor = mlp(x)
    return result


@pytest.mark.parametrize("size", [512, 352])
@pytest.mark.parametrize("name", FORMATS)
def test_two_ranks_of_a_quantised_layer_add_up_to_the_whole(name: str, size: int) -> None:
    """A rank's columns begin inside a group of 128 where the feed-forward has 352: groups become narrower."""
    torch.manual_seed(0)
    form = FORMATS[name]
    spec = Dense(size=size, activation="silu", gate_up_format=form, down_format=form)
    gate, up = stored(name, size, K), stored(name, size, K)
    checkpoint = {
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up._replace(permutation=gate.permutation),
        "mlp.down_proj.weight": stored(name, K, size),
    }
    whole = part(name, spec, Shard(0, 1), checkpoint)
    dense = {key: dequantised(value, torch.float32) for key, value in checkpoint.items()}
    expected = part(name, Dense(size=size, activation="silu"), Shard(0, 1), dense)
    error = 1e-5 * float(whole.std())
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=error)
    summed = sum((part(name, spec, Shard(rank, 2), checkpoint) for rank in range(2)), torch.zeros(ROWS, K))
    torch.testing.assert_close(summed, whole, rtol=1e-4, atol=error)


@pytest.mark.parametrize("num_rows", [16, 48, 64, 96, 208])
@pytest.mark.parametrize("name", ["int4 groups", "int4 zeros", "int4 reordered"])
def test_int4_in_the_order_of_torch_for_the_cpu_is_the_same_weight(name: str, num_rows: int) -> None:
    """Of whole blocks of rows and of others, in steps of few rows and of many."""
    torch.manual_seed(0)
    weight = stored(name, num_rows, 256)
    linear = Linear(256, num_rows, True, torch.bfloat16, FORMATS[name])
    linear.fill(0, weight)
    before = linear.num_bytes
    linear.settle(torch.bfloat16)
    assert linear.in_torchs_order
    assert linear.num_bytes <= before * 1.1
    assert linear.bias is not None
    linear.bias.data.normal_()
    assert torch.equal(codes_of(CpuInt4(linear.weight, torch.empty(0))), weight.codes)
    dense = dequantised(weight, torch.float32).double()
    for count in (1, 16, 17, 40):
        x = torch.randn(count, 256).bfloat16()
        expected = x.double() @ dense.t() + linear.bias
        torch.testing.assert_close(linear(x).double(), expected, rtol=2e-2, atol=2e-2 * float(expected.std()))
