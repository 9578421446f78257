"""The kernels of steps of few rows against torch, alone and chained, and a whole layer against the plain layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphgen.models.layers import ACTIVATIONS, RMSNorm

TOLERANCE = 4e-3  # relative norm: one rounding to bfloat16 of a float32 sum


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3, 16, 17, 64])
def test_products_equal_torch_for_every_block_width_bias_and_activation(num_rows: int, chained: bool) -> None:
    from graphgen.models import few_rows

    for size, depth in ((6144, 4096), (4096, 14336), (96, 128)):
        x, weight = randn(num_rows, depth), randn(size, depth) * 0.02
        for bias in (None, randn(size)):
            want = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
            assert relative_error(few_rows.linear(x, weight, bias, chained), want) < TOLERANCE
    for size, activation in ((14336, "silu"), (96, "gelu"), (640, "gelu_tanh")):
        x, weight, bias = randn(num_rows, 256), randn(2 * size, 256) * 0.1, randn(2 * size)
        gate, up = F.linear(x, weight, bias).chunk(2, dim=-1)
        got = few_rows.gated_linear(x, weight, bias, activation, chained)
        assert relative_error(got, ACTIVATIONS[activation](gate) * up) < TOLERANCE


@pytest.mark.parametrize("chained", [False, True])
def test_norms_equal_the_module_bit_by_bit(chained: bool) -> None:
    from graphgen.models import few_rows

    for size in (4096, 896):
        norm = RMSNorm(size, 1e-5, torch.bfloat16).cuda()
        norm.weight.data.normal_()
        residual, update = randn(16, size), randn(16, size)
        sums, normed = few_rows.add_norm(residual, update, norm, chained)
        assert torch.equal(sums, residual + update)
        assert relative_error(normed, norm(residual + update)) < 1e-4
    norm = RMSNorm(128, 1e-6, torch.bfloat16).cuda()
    norm.weight.data.normal_()
    row = randn(5, 48, 128)
    want = torch.cat((norm(row[:, :32]), row[:, 32:]), dim=1)
    few_rows.norm_heads(row[:, :32], norm, chained)
    assert relative_error(row, want) < 1e-4
    assert torch.equal(row[:, 32:], want[:, 32:])


def test_a_chain_under_a_graph_never_reads_what_is_not_yet_written() -> None:
    """200 links, each reading the one ahead: a kernel that did not wait would read the replay before."""
    from graphgen.models import few_rows

    weights = [randn(1024, 1024) * 0.03 for _ in range(200)]
    x = randn(4, 1024)

    def run(chained: bool) -> Tensor:
        link = x
        for weight in weights:
            link = few_rows.linear(link, weight, None, chained)
        return link

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = run(True)
        for _ in range(20):
            x.normal_()
            graph.replay()
            got = out.clone()
            assert torch.equal(got, run(False))
