"""The kernels of a mixture of experts over few rows in Triton's interpreter: what the block computes, in float32.

Where a CUDA device is, tests/gpu/test_few_rows_gpu.py runs the compiled kernels instead: Triton decides when it is
imported whether it interprets, so both cannot be had in one process. tests/conftest.py tells it to.
"""

import importlib.util
from collections.abc import Mapping
from functools import partial

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from graphgen.models.experts.block import MixtureOfExperts
from graphgen.models.formats.layout import dequantised
from graphgen.models.formats.linear import StoredWeight
from graphgen.models.formats.quantise import quantised
from graphgen.models.norms import RMSNorm
from graphgen.models.spec import WHOLE, Dense, Experts, LinearFormat, Norm, Router
from tests.models.format_cases import FORMATS

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed; comes with torch for CUDA", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("tests/gpu/test_few_rows_gpu.py runs the compiled kernels", allow_module_level=True)

from graphgen.models.experts.few_rows import run_experts  # Triton exists where it is installed
from graphgen.models.few_rows import adding_linear
from graphgen.models.normed import Normed

# The interpreter computes in numpy, which warns where a kernel means it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HIDDEN, EPS = 64, 1e-5
EXPERTS = Experts(num_experts=6, top_k=2, size=64, activation="silu", router=Router())
SHARED = Dense(size=192, activation="silu")
CASES: Mapping[str, Experts] = {
    "softmax": EXPERTS,
    "softmax of the chosen": replace(EXPERTS, router=Router(renormalise=True)),
    "biases and limits": replace(
        EXPERTS,
        size=128,
        activation="quick_gelu",
        router=Router(bias=True, renormalise=True),
        bias=True,
        limit=0.5,
        up_plus_one=True,
    ),
    "sigmoid with a correction": replace(
        EXPERTS, router=Router(score="sigmoid", correction=True, renormalise=True, scale=2.5), shared=SHARED
    ),
    "softmax with a correction": replace(EXPERTS, router=Router(correction=True)),
    "a shared expert with a gate": replace(EXPERTS, shared=SHARED, shared_gate=True),
    "a shared expert with biases": replace(EXPERTS, bias=True, shared=replace(SHARED, bias=True)),
    "one expert": replace(EXPERTS, num_experts=1, top_k=1),
    "all experts": replace(EXPERTS, num_experts=5, top_k=5),
    "more experts than a block": replace(EXPERTS, num_experts=150, top_k=8),
    "gelu_tanh": replace(EXPERTS, activation="gelu_tanh"),
}


def make_block(spec: Experts) -> MixtureOfExperts:
    block = MixtureOfExperts(spec, HIDDEN, torch.float32, WHOLE)
    for parameter in block.parameters():
        parameter.data.normal_(0.0, 0.2)
    return block


def make_norm() -> RMSNorm:
    norm = RMSNorm(HIDDEN, Norm(eps=EPS), torch.float32)
    weight_of(norm).normal_(1.0, 0.3)
    return norm


def weight_of(norm: RMSNorm) -> Tensor:
    assert norm.weight is not None
    return norm.weight.data


def begun(x: Tensor, norm: RMSNorm) -> Normed:
    """As the kernel ahead leaves it."""
    return Normed(x * weight_of(norm), x.pow(2).unflatten(1, (4, -1)).sum(-1))


def assert_same(block: MixtureOfExperts, num_rows: int, live: Tensor | None = None) -> None:
    residual, norm, next_norm = torch.randn(num_rows, HIDDEN), make_norm(), make_norm()
    sums, normed = run_experts(block, residual, begun(residual, norm), EPS, next_norm, live, chained=False)
    expected = residual + block(norm(residual), live)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(sums, expected)
    close(normed.scaled, expected * weight_of(next_norm))
    close(normed.squares.sum(1), expected.pow(2).sum(1))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_compute_what_the_block_does(case: str) -> None:
    assert_same(make_block(CASES[case]), num_rows=2)


STORED = (
    "fp8 (fp8 input)",
    "fp8 128x128 (fp8 input)",
    "int8 g128",
    "int4 g32 with zeros",
    "int4 g128 with zeros",
    "int4",
)


@pytest.mark.parametrize("form", [FORMATS[name] for name in STORED], ids=lambda form: form.name)
def test_quantised_weights_mean_what_their_format_says(form: LinearFormat) -> None:
    """Of experts and of a shared one. What all warps read at a time divides none of the sizes."""
    formats = {"gate_up_format": form, "down_format": form}
    shared = Dense(size=128, activation="silu", **formats)  # type: ignore[arg-type]  # they are formats
    spec = replace(EXPERTS, num_experts=3, size=384, shared=shared, **formats)
    hidden_size = 128
    plain = replace(spec, gate_up_format=None, down_format=None, shared=Dense(size=128, activation="silu"))
    block, meant = (MixtureOfExperts(it, hidden_size, torch.float32, WHOLE) for it in (spec, plain))
    for parameter in meant.parameters():
        parameter.data.normal_(0.0, 0.1)
    block.router.data.copy_(meant.router)
    for name, own in block.named_modules():
        if isinstance(own, StoredWeight):
            other = meant.get_submodule(name)
            assert isinstance(other, StoredWeight)
            own.fill(0, quantised(other.weight, form))
            other.weight.data.copy_(dequantised(own.rows(0, own.out_features), torch.float32))
    norm, next_norm = (RMSNorm(hidden_size, Norm(eps=EPS), torch.float32) for _ in range(2))
    for weight in (weight_of(norm), weight_of(next_norm)):
        weight.normal_(1.0, 0.3)
    residual, live = torch.randn(2, hidden_size), torch.tensor([True, False])
    sums, _ = run_experts(block, residual, begun(residual, norm), EPS, next_norm, live, chained=False)
    torch.testing.assert_close(sums, residual + meant(norm(residual), live), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [64, 768])
def test_one_row_of_a_narrow_product_is_added_to_the_stream(depth: int) -> None:
    """As the output projection in front of the experts is: of one row in a kernel of its own, of two in the other."""
    weight, bias, norm = torch.randn(HIDDEN, depth) * 0.1, torch.randn(HIDDEN), make_norm()
    for num_rows in (1, 2):
        x, residual = torch.randn(num_rows, depth), torch.randn(num_rows, HIDDEN)
        for offset in (None, bias):
            sums, normed = adding_linear(x, weight, offset, residual, norm, chained=False)
            expected = residual + torch.nn.functional.linear(x, weight, offset)
            torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(normed.scaled, expected * weight_of(norm), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(normed.squares.sum(1), expected.pow(2).sum(1), rtol=1e-4, atol=1e-4)


def test_rows_without_a_token_go_to_no_expert() -> None:
    """Their inner columns are never written and may be anything; what they hold is read by no live row."""
    block = make_block(replace(EXPERTS, bias=True, shared=SHARED))
    assert_same(block, 5, torch.tensor([True, False, True, False, False]))


def test_logits_that_are_equal_or_no_numbers_choose_experts_that_exist() -> None:
    """An address beyond the weights would end the process. Of equal ones the first are chosen."""
    block = make_block(replace(EXPERTS, num_experts=150, top_k=4))
    block.router.data.zero_()
    residual, norm = torch.randn(2, HIDDEN), make_norm()
    residual[1] = float("nan")
    sums, _ = run_experts(block, residual, begun(residual, norm), EPS, norm, None, chained=False)
    assert sums[1].isnan().all()
    normed, update = norm(residual[0]), torch.zeros(HIDDEN)
    gate_up, down = block.gate_up.stored, block.down.stored
    assert isinstance(gate_up, Tensor)
    assert isinstance(down, Tensor)
    for expert in range(4):
        gate, up = (gate_up[expert] @ normed).chunk(2)
        update += down[expert] @ (torch.nn.functional.silu(gate) * up) / 150
    torch.testing.assert_close(sums[0], residual[0] + update, rtol=1e-4, atol=1e-4)
