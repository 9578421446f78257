"""Products of many rows as CUDA computes them, with what the CPU has in place of the device's own products."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from msgspec.structs import replace
from torch.fx.experimental import _config as symbolic_shapes_config

from graphgen.models.formats import matrices
from graphgen.models.formats.as_they_lie import BLOCK
from graphgen.models.formats.layout import E4M3_MOST
from graphgen.models.formats.products import (
    Multiplies,
    Weight,
    product_of_many_rows,
    quantise_blocks,
    quantise_rows,
)
from graphgen.models.spec.formats import LinearFormat
from tests.models.format_cases import E4M3, FORMATS, INT4, matrix, random_weight

ALL, ROWS_ONLY, NOTHING = Multiplies(True, True), Multiplies(True, False), Multiplies(False, False)
INPUT_ERROR = 0.03
"""Of an input in e4m3, relative norm: it has three bits of mantissa."""


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def product(x: torch.Tensor, weight: Weight, device: Multiplies) -> torch.Tensor:
    if weight.permutation is not None:
        x = x[:, weight.permutation]
    return product_of_many_rows(x, weight, None, device)


@pytest.mark.parametrize("name", FORMATS)
def test_where_the_input_may_not_be_rounded_only_the_sums_are(name: str) -> None:
    torch.manual_seed(0)
    form = FORMATS[name]
    weight, x = random_weight(form, 160, 512), torch.randn(7, 512)
    want = F.linear(x, matrix(weight))
    assert error(product(x, weight, NOTHING), want) < 1e-5
    if not form.rounds_input:
        assert error(product(x, weight, ALL), want) < 1e-5


@pytest.mark.parametrize("device", [ALL, ROWS_ONLY])
@pytest.mark.parametrize("form", [form for form in FORMATS.values() if not form.permuted], ids=lambda form: form.name)
def test_where_it_may_the_error_is_that_of_e4m3(form: LinearFormat, device: Multiplies) -> None:
    torch.manual_seed(1)
    weight, x = random_weight(form, 160, 512), torch.randn(7, 512).bfloat16()
    weight = weight._replace(format=replace(form, activation="e4m3"))
    want = F.linear(x.float(), matrix(weight))
    got = product(x, weight, device).float()
    both = INPUT_ERROR if form.storage == "e4m3" else 2 * INPUT_ERROR  # integer codes are rounded as well
    assert error(got, want) < both


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e36])
def test_quantised_rows_keep_zeros_and_the_largest_element(size: float) -> None:
    x = torch.randn(5, 256) * size
    x[2] = 0.0
    for codes, scale in (
        quantise_rows(x),
        (quantise_blocks(x)[0], quantise_blocks(x)[1].t().repeat_interleave(BLOCK, 1)),
    ):
        meant = codes.float() * scale
        assert meant.isfinite().all()
        assert torch.equal(meant[2], x[2])
        if size >= 1.0:
            assert error(meant, x) < INPUT_ERROR


def test_an_input_of_blocks_has_a_scale_for_each() -> None:
    x = torch.randn(3, 512) * torch.tensor([1.0, 1000.0, 1e-3, 1.0]).repeat_interleave(BLOCK)
    codes, scale = quantise_blocks(x)
    assert scale.shape == (4, 3)
    for block in range(4):
        columns = slice(block * BLOCK, (block + 1) * BLOCK)
        assert error(codes[:, columns].float() * scale[block][:, None], x[:, columns]) < INPUT_ERROR


INTEGERS = [form for form in FORMATS.values() if form.storage != "e4m3" and not form.permuted]


def with_signs(weight: Weight) -> Weight:
    """Every other group has a negative scale, as AutoRound gives the groups whose largest element is positive. A row
    has no other, and one has scales of zero."""
    scale = weight.scale.clone()
    scale[:, ::2] *= -1.0
    scale[1] = -scale[1].abs()
    scale[2] = 0.0
    return weight._replace(scale=scale)


@pytest.mark.parametrize("form", INTEGERS, ids=lambda form: form.name)
def test_scales_of_any_sign_are_in_the_range_of_e4m3(form: LinearFormat) -> None:
    torch.manual_seed(3)
    weight = with_signs(random_weight(form, 48, 768))
    codes, scale = matrices.weight_in_e4m3(form, weight.codes, weight.scale, weight.zeros)
    meant = codes.float() * scale
    for got, want in zip(meant, matrix(weight), strict=True):
        assert (got - want).norm() <= 1.2 * INPUT_ERROR * want.norm(), "of one row it varies"


@pytest.mark.parametrize("zeros", [False, True])
def test_int4_with_a_scale_a_row_is_exact_in_e4m3(zeros: bool) -> None:
    """All differences of two codes have few enough bits: steps of many rows then compute with what few rows have."""
    torch.manual_seed(5)
    weight = random_weight(LinearFormat(storage="int4", zeros=zeros), 48, 768)
    codes, scale = matrices.weight_in_e4m3(weight.format, weight.codes, weight.scale, weight.zeros)
    assert torch.equal(codes.float() * scale, matrix(weight))


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; comes with torch for CUDA"
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_formats_gpu.py runs the compiled kernel")
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_the_kernel_makes_the_matrix_of_the_reference(name: str, signed: bool) -> None:
    from graphgen.models.formats.matrix_kernels import make_matrix

    torch.manual_seed(2)
    form, weight = FORMATS[name], random_weight(FORMATS[name], 150, 768)
    weight = with_signs(weight) if signed and form.rows == 1 else weight
    of_weight = weight.codes, weight.scale, weight.zeros, form.group or 0, form.rows
    want = matrices.weight_matrix(form, *of_weight[:3], torch.float32)
    torch.testing.assert_close(make_matrix(*of_weight, torch.float32, scaled=False)[0], want)
    if form.storage != "e4m3":
        codes, scale = matrices.weight_in_e4m3(form, *of_weight[:3])
        assert error(codes.float() * scale, want) < INPUT_ERROR
        # In float32: the interpreter rounds to e4m3 in a way of its own.
        made, of_rows = make_matrix(*of_weight, torch.float32, scaled=True)
        torch.testing.assert_close(of_rows, scale)
        torch.testing.assert_close(made * of_rows, want)
        assert made.abs().max() <= E4M3_MOST * 1.00001


@pytest.mark.parametrize("device", [ALL, NOTHING])
@pytest.mark.parametrize("form", [E4M3, INT4, FORMATS["fp8 128x128 (fp8 input)"]], ids=lambda form: form.name)
def test_a_compiled_product_is_one_graph_for_any_number_of_rows(form: LinearFormat, device: Multiplies) -> None:
    weight, num_graphs = random_weight(form, 160, 256), 0

    def counted(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal num_graphs
        num_graphs += 1
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(product_of_many_rows, fullgraph=True, backend=counted)
    with torch.inference_mode(), symbolic_shapes_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        for num_rows in (70, 1, 8, 513):
            x = torch.randn(num_rows, 256).bfloat16()
            torch._dynamo.mark_dynamic(x, 0)
            got = compiled(x, weight, None, device)
            assert torch.equal(got, product_of_many_rows(x, weight, None, device))
    torch._dynamo.reset()
    assert num_graphs == 1
