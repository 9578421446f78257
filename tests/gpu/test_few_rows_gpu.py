"""The kernels of steps of few rows against torch, alone and chained, and all layers against the plain ones."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from msgspec.structs import replace
from torch import Tensor

from graphgen.models.activations import ACTIVATIONS
from graphgen.models.attention.backend import StepTensors
from graphgen.models.attention.kernels import AttentionShape
from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.tables import RowTables
from graphgen.models.attention.variant import AttentionVariant, Numbers
from graphgen.models.decoder import Decoder
from graphgen.models.few_rows_layers import most_rows, serves_model
from graphgen.models.formats.layout import dequantised
from graphgen.models.formats.linear import Linear
from graphgen.models.formats.quantise import quantised
from graphgen.models.kv_cache import KVCache
from graphgen.models.layers import DecoderLayer
from graphgen.models.normed import Normed
from graphgen.models.norms import RMSNorm
from graphgen.models.rope import rotate
from graphgen.models.spec import (
    GQA,
    Dense,
    Embedding,
    Experts,
    Head,
    Latent,
    Layer,
    ModelSpec,
    Norm,
    QKNorm,
    RopeSpec,
    Router,
)
from graphgen.models.spec.formats import LinearFormat

HIDDEN = 896
TOLERANCE = 4e-3  # relative norm: one rounding to bfloat16 of a float32 sum
EPS = 1e-5
NORM = Norm(eps=EPS)
ATTENTION = GQA(num_heads=8, num_kv_heads=2, head_dim=64, qkv_bias=True)
LAYER = Layer(mixer=ATTENTION, feed_forward=Dense(size=1152, activation="silu"), input_norm=NORM, ff_norm=Norm(eps=EPS))
EXPERTS = Experts(num_experts=8, top_k=2, size=192, activation="silu", router=Router(renormalise=True))
LATENT = Latent(num_heads=4, latent_size=64, plain_dim=32, rope_dim=32, value_dim=32)
LAYERS = {
    "llama": LAYER,
    "qwen3": replace(LAYER, mixer=replace(ATTENTION, qk_norm=QKNorm(NORM))),
    "norms of all heads": replace(LAYER, mixer=replace(ATTENTION, qk_norm=QKNorm(NORM, "all_heads"))),
    "mixtral": replace(LAYER, feed_forward=EXPERTS),
    "gpt-oss": replace(
        LAYER,
        feed_forward=replace(
            EXPERTS, router=Router(bias=True, renormalise=True), bias=True, limit=1.0, up_plus_one=True
        ),
        input_norm=Norm(eps=EPS, round_first=False),
        ff_norm=Norm(eps=EPS, round_first=False),
    ),
    "qwen2-moe": replace(
        LAYER, feed_forward=replace(EXPERTS, shared=Dense(size=320, activation="silu"), shared_gate=True)
    ),
    "deepseek": replace(
        LAYER,
        mixer=LATENT,
        feed_forward=replace(
            EXPERTS,
            router=Router(score="sigmoid", correction=True, renormalise=True, scale=2.5),
            shared=Dense(size=320, activation="silu"),
        ),
    ),
    "fp8": LAYER.with_formats(HIDDEN, lambda place: LinearFormat(storage="e4m3", activation="e4m3")),
    "int8": LAYER.with_formats(HIDDEN, lambda place: LinearFormat(storage="int8")),
    "int4": LAYER.with_formats(HIDDEN, lambda place: LinearFormat(storage="int4", group=64, zeros=True)),
}


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
@pytest.mark.parametrize("all_heads", [False, True])
def test_head_norms_equal_the_module(all_heads: bool, chained: bool) -> None:
    from graphgen.models import few_rows

    num_queries, num_keys, width = (1, 1, 128) if all_heads else (32, 8, 128)
    q_norm, k_norm = random_norm(32 * 128 if all_heads else width), random_norm(8 * 128 if all_heads else width)
    qkv = randn(5, 48 * 128)
    q, k, v = qkv.split((32 * 128, 8 * 128, 8 * 128), dim=1)
    normed = q_norm(q.unflatten(1, (num_queries, -1))), k_norm(k.unflatten(1, (num_keys, -1)))
    want = torch.cat((*(part.flatten(1) for part in normed), v), dim=1)
    few_rows.norm_queries_and_keys(qkv, q_norm, k_norm, 32 * 128, 8 * 128, chained)
    assert relative_error(qkv, want) < 1e-4
    assert torch.equal(qkv[:, 40 * 128 :], want[:, 40 * 128 :])


def test_attention_norms_heads_as_the_kernel_of_norms_does() -> None:
    from graphgen.models import few_rows
    from graphgen.models.attention.flashinfer import FlashInferAttention
    from graphgen.models.attention.split_kv import HeadNorms

    num_rows, heads, kv_heads, dim, page_size = 3, 8, 2, 128, 16
    shape = AttentionShape(heads, kv_heads, dim, page_size, torch.bfloat16, (0,), None)
    q_norm, k_norm = random_norm(dim), random_norm(dim)
    kv_lens = torch.tensor([1, 17, 300], dtype=torch.int32, device="cuda")
    pages = torch.arange(num_rows * 20, dtype=torch.int32, device="cuda").view(num_rows, 20)
    nothing = torch.zeros(1, dtype=torch.int32, device="cuda")
    newest = kv_lens.long() - 1
    locations = pages.long().gather(1, newest[:, None] // page_size)[:, 0] * page_size + newest % page_size
    tables = RowTables(locations, nothing, nothing[:0], nothing[:0, None], kv_lens, pages)
    step = FlashInferAttention(shape, 1, 16, num_rows).prepare(tables)
    assert step.norms_heads
    qkv, (cos, sin) = randn(num_rows, (heads + 2 * kv_heads) * dim), randn(2, num_rows, dim)
    kept = randn(2, num_rows * 20, page_size, kv_heads, dim)
    variant = AttentionVariant(Numbers(dim**-0.5).packed())

    def attend(qkv: Tensor, norms: HeadNorms | None) -> tuple[Tensor, Tensor]:
        q, k, v = qkv.view(num_rows, -1, dim).split((heads, kv_heads, kv_heads), dim=1)
        of_layer = LayerPages(*kept.clone())
        return step.attend(q, k, v, cos, sin, of_layer, variant, None, norms), of_layer.k

    got = attend(qkv, HeadNorms(weight_of(q_norm), weight_of(k_norm), EPS))
    few_rows.norm_queries_and_keys(qkv, q_norm, k_norm, heads * dim, kv_heads * dim, chained=False)
    for normed, want in zip(got, attend(qkv, None), strict=True):
        assert relative_error(normed, want) < 1e-3


def test_a_chain_under_a_graph_never_reads_what_is_not_yet_written() -> None:
    """200 links, each reading the one ahead: a kernel that did not wait would read the replay before."""
    from graphgen.models import few_rows

    weights = [randn(1024, 1024) * 0.03 for _ in range(100)]
    norm = random_norm(1024)
    x = randn(4, 1024)

    def run(chained: bool) -> Tensor:
        sums, link = x, Normed(x, torch.full((4, 1), 1024.0, device="cuda"))
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


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("num_rows", [1, 16, 40])
def test_all_layers_give_the_logits_of_the_plain_ones(num_rows: int, case: str) -> None:
    """Attention is a stand-in that lets every head through to its group, so that no pages are needed."""
    from graphgen.models import few_rows_step

    spec = small_spec(LAYERS[case])
    num_rows = min(num_rows, most_rows(spec, reads_codes=False))
    assert serves_model(spec, torch.bfloat16)
    decoder = Decoder(spec, torch.bfloat16, torch.device("cuda"))
    for parameter in decoder.parameters():
        if parameter.dtype.itemsize > 1:
            parameter.data.normal_(0.0, 0.05)
    # What products of many rows round besides is another matter: the plain layers have dequantised weights.
    plain = Decoder(spec.with_formats(lambda *_: None), torch.bfloat16, torch.device("cuda"))
    given = dict(decoder.named_parameters())
    for name, parameter in plain.named_parameters():
        if given[name].shape == parameter.shape and given[name].dtype == parameter.dtype:
            parameter.data.copy_(given[name])
    for name, linear in decoder.named_modules():
        if isinstance(linear, Linear) and linear.format is not None:
            values = torch.randn(linear.out_features, linear.in_features, device="cuda") * 0.05
            linear.fill(0, quantised(values, linear.format))
            worth = dequantised(linear.rows(0, linear.out_features), torch.bfloat16)
            plain.get_parameter(f"{name}.weight").data.copy_(worth)
    cache = KVCache(spec, 1, 16, torch.bfloat16, torch.device("cuda"))
    nothing = torch.zeros(num_rows, dtype=torch.int32, device="cuda")
    tables = RowTables(nothing.long(), nothing[:1], nothing[:0], nothing[:0], nothing, nothing[:, None])
    token_ids = torch.randint(spec.vocab_size, (num_rows,), device="cuda")
    positions = torch.arange(num_rows, device="cuda")
    attention = RotatedPlusValues(tables)
    want = plain(token_ids, positions, positions + 1, cache, [attention])
    cos, sin = decoder.ropes[0](positions, positions + 1, torch.bfloat16)
    layers = [layer for layer in decoder.layers if isinstance(layer, DecoderLayer)]
    head = decoder.head
    assert head is not None
    ends = few_rows_step.Ends(decoder.embedding.weight, decoder.final_norm, head.weight)
    live = torch.ones(num_rows, dtype=torch.bool, device="cuda")
    for chained in (False, True):
        steps = [[StepTensors(cos, sin, attention)]]
        got = few_rows_step.next_logits(
            ends, layers, token_ids, cache, steps, live, DecoderLayer.attend, chained=chained
        )
        # Four layers of bfloat16. A row whose experts are all but equally good may go to another one in either.
        errors = (got.float() - want.float()).norm(dim=1) / want.float().norm(dim=1)
        assert errors.quantile(0.7) < 0.03


class RotatedPlusValues(NamedTuple):
    tables: RowTables

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *_: object) -> Tensor:
        group = q.shape[1] // k.shape[1]
        return rotate(q, cos, sin) + (rotate(k, cos, sin) + v).repeat_interleave(group, dim=1)

    def attend_latent(self, q: Tensor, row: Tensor, pages: Tensor, value_size: int, *_: object) -> Tensor:
        return q[..., :value_size] + row[:, None, :value_size]


def small_spec(layer: Layer) -> ModelSpec:
    return ModelSpec(
        family="LlamaForCausalLM",
        architecture="LlamaForCausalLM",
        vocab_size=992,
        hidden_size=HIDDEN,
        layers=(layer,) * 4,
        ropes=(RopeSpec(),),
        embedding=Embedding(),
        final_norm=NORM,
        head=Head(),
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_ids=(),
        dtype="bfloat16",
        initializer_std=0.02,
    )
