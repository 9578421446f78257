"""The kernels of steps of few rows against torch, alone and chained, and all layers against the plain ones."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphgen.models.activations import ACTIVATIONS
from graphgen.models.attention.backend import StepTensors
from graphgen.models.attention.tables import RowTables
from graphgen.models.decoder import Decoder
from graphgen.models.kv_cache import KVCache
from graphgen.models.layers import DecoderLayer
from graphgen.models.norms import RMSNorm
from graphgen.models.rope import rotate
from graphgen.models.spec import GQA, Dense, Embedding, Head, Layer, ModelSpec, Norm, QKNorm, RopeSpec

TOLERANCE = 4e-3  # relative norm: one rounding to bfloat16 of a float32 sum
EPS = 1e-5


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def random_norm(size: int) -> RMSNorm:
    norm = RMSNorm(size, Norm(eps=EPS), torch.bfloat16).cuda()
    weight_of(norm).normal_(1.0, 0.3)
    return norm


def weight_of(norm: RMSNorm) -> Tensor:
    assert norm.weight is not None
    return norm.weight.data


def rms_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    """In float32, without a rounding."""
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps) * weight_of(norm).float()


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3, 16, 17, 64])
def test_products_equal_torch_for_every_block_width_and_bias(num_rows: int, chained: bool) -> None:
    from graphgen.models import few_rows

    for size, depth in ((4096, 14336), (96, 128), (896, 256), (8192, 512)):
        x, weight, residual, norm = (
            randn(num_rows, depth),
            randn(size, depth) * 0.02,
            randn(num_rows, size),
            random_norm(size),
        )
        for bias in (None, randn(size)):
            product = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
            sums, normed = few_rows.adding_linear(x, weight, bias, residual, norm, chained)
            assert relative_error(sums, residual + product) < TOLERANCE
            assert relative_error(normed.scaled, sums * weight_of(norm)) < 1e-3
            assert relative_error(normed.squares.sum(1), sums.float().pow(2).sum(1)) < 1e-5
        if size % 128:
            continue
        for out_size, activation in ((6144, "silu"), (96, "gelu"), (640, "gelu_tanh")):
            weight, bias = randn(2 * out_size, size) * 0.1, randn(2 * out_size)
            both = F.linear(rms_norm(sums, norm), weight.float(), bias.float())
            assert relative_error(few_rows.normed_linear(normed, EPS, weight, bias, chained), both) < TOLERANCE
            gate, up = both.chunk(2, dim=-1)
            got = few_rows.gated_linear(normed, EPS, weight, bias, activation, chained)
            assert relative_error(got, ACTIVATIONS[activation](gate) * up) < 2 * TOLERANCE


def test_embeddings_are_rows_of_the_table_and_their_norm_is_begun() -> None:
    from graphgen.models import few_rows

    table, norm = randn(1000, 896), random_norm(896)
    for num_rows in (1, 16, 17, 64):
        token_ids = torch.randint(1000, (num_rows,), device="cuda")
        sums, normed = few_rows.embed(token_ids, table, norm)
        assert torch.equal(sums, table[token_ids])
        assert relative_error(normed.scaled, sums * weight_of(norm)) < 1e-3
        assert relative_error(normed.squares.sum(1), sums.float().pow(2).sum(1)) < 1e-5


@pytest.mark.parametrize("chained", [False, True])
def test_head_norms_equal_the_module(chained: bool) -> None:
    from graphgen.models import few_rows

    norm = random_norm(128)
    row = randn(5, 48, 128)
    want = torch.cat((norm(row[:, :32]), row[:, 32:]), dim=1)
    few_rows.norm_heads(row[:, :32], norm, chained)
    assert relative_error(row, want) < 1e-4
    assert torch.equal(row[:, 32:], want[:, 32:])


def test_a_chain_under_a_graph_never_reads_what_is_not_yet_written() -> None:
    """200 links, each reading the one ahead: a kernel that did not wait would read the replay before."""
    from graphgen.models import few_rows

    weights = [randn(1024, 1024) * 0.03 for _ in range(100)]
    norm = random_norm(1024)
    x = randn(4, 1024)

    def run(chained: bool) -> Tensor:
        sums, link = x, few_rows.Normed(x, torch.full((4, 1), 1024.0, device="cuda"))
        for weight in weights:
            product = few_rows.normed_linear(link, EPS, weight, None, chained)
            sums, link = few_rows.adding_linear(product, weight, None, sums, norm, chained)
        return sums

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
            assert got.isfinite().all()
            assert torch.equal(got, run(False))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("num_rows", [1, 16, 40])
def test_all_layers_give_the_logits_of_the_plain_ones(num_rows: int, qk_norm: bool) -> None:
    """Attention is a stand-in that lets every head through to its group, so that no pages are needed."""
    from graphgen.models import few_rows

    spec = small_spec(qk_norm)
    decoder = Decoder(spec, torch.bfloat16, torch.device("cuda"))
    for parameter in decoder.parameters():
        parameter.data.normal_(0.0, 0.05)
    cache = KVCache(spec, 1, 16, torch.bfloat16, torch.device("cuda"))
    nothing = torch.zeros(num_rows, dtype=torch.int32, device="cuda")
    tables = RowTables(nothing.long(), nothing[:1], nothing[:0], nothing[:0], nothing, nothing[:, None])
    token_ids = torch.randint(spec.vocab_size, (num_rows,), device="cuda")
    positions = torch.arange(num_rows, device="cuda")
    attention = RotatedPlusValues(tables)
    want = decoder(token_ids, positions, positions + 1, cache, [attention])
    cos, sin = decoder.ropes[0](positions, positions + 1, torch.bfloat16)
    layers = [layer for layer in decoder.layers if isinstance(layer, DecoderLayer)]
    head = decoder.head
    assert head is not None
    ends = few_rows.Ends(decoder.embedding.weight, decoder.final_norm, head.weight)
    for chained in (False, True):
        steps = [StepTensors(cos, sin, attention)]  # type: ignore[arg-type]  # without latents
        got = few_rows.next_logits(ends, layers, token_ids, cache, steps, chained=chained)
        assert relative_error(got, want) < 0.03  # four layers of bfloat16


class RotatedPlusValues(NamedTuple):
    tables: RowTables

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *_: object) -> Tensor:
        group = q.shape[1] // k.shape[1]
        return rotate(q, cos, sin) + (rotate(k, cos, sin) + v).repeat_interleave(group, dim=1)


def small_spec(qk_norm: bool) -> ModelSpec:
    norm = Norm(eps=EPS)
    attention = GQA(num_heads=8, num_kv_heads=2, head_dim=64, qkv_bias=True, qk_norm=QKNorm(norm) if qk_norm else None)
    layer = Layer(mixer=attention, feed_forward=Dense(size=1152, activation="silu"), input_norm=norm, ff_norm=norm)
    return ModelSpec(
        family="LlamaForCausalLM",
        architecture="LlamaForCausalLM",
        vocab_size=992,
        hidden_size=896,
        layers=(layer,) * 4,
        ropes=(RopeSpec(),),
        embedding=Embedding(),
        final_norm=norm,
        head=Head(),
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_ids=(),
        dtype="bfloat16",
        initializer_std=0.02,
    )
