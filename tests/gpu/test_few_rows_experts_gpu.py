"""The kernels of a mixture of experts over few rows on a GPU: what the block computes in float32, and in a graph."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from graphgen import Engine, SamplingParams
from graphgen.models.experts.block import MixtureOfExperts
from graphgen.models.families import load_spec
from graphgen.models.few_rows_layers import most_rows, serves_model
from graphgen.models.formats.layout import dequantised
from graphgen.models.formats.linear import StoredWeight
from graphgen.models.formats.quantise import quantised
from graphgen.models.norms import RMSNorm
from graphgen.models.spec import WHOLE, Dense, Experts, LinearFormat, Norm, Router
from tests.models import tiny
from tests.models.format_cases import FORMATS

pytestmark = pytest.mark.gpu

EPS = 1e-5
SOFTMAX = Router(renormalise=True)
SHAPES = {
    "Qwen3-30B-A3B": (2048, Experts(num_experts=128, top_k=8, size=768, activation="silu", router=SOFTMAX)),
    "Mixtral-8x7B": (4096, Experts(num_experts=8, top_k=2, size=14336, activation="silu", router=SOFTMAX)),
    "OLMoE": (2048, Experts(num_experts=64, top_k=8, size=1024, activation="silu", router=Router())),
    "gpt-oss-20b": (
        2880,
        Experts(
            num_experts=32,
            top_k=4,
            size=2880,
            activation="quick_gelu",
            router=Router(bias=True, renormalise=True),
            bias=True,
            limit=7.0,
            up_plus_one=True,
        ),
    ),
    "Qwen2-MoE": (
        2048,
        Experts(
            num_experts=60,
            top_k=4,
            size=1408,
            activation="silu",
            router=Router(),
            shared=Dense(size=5632, activation="silu"),
            shared_gate=True,
        ),
    ),
    "DeepSeek-V2-Lite": (
        2048,
        Experts(
            num_experts=64,
            top_k=6,
            size=1408,
            activation="silu",
            router=Router(),
            shared=Dense(size=2816, activation="silu"),
        ),
    ),
    "GLM-4.5-Air": (
        4096,
        Experts(
            num_experts=128,
            top_k=8,
            size=1408,
            activation="silu",
            router=Router(score="sigmoid", correction=True, renormalise=True),
            shared=Dense(size=1408, activation="silu"),
        ),
    ),
}


def make_block(case: str) -> MixtureOfExperts:
    torch.manual_seed(0)
    hidden_size, spec = SHAPES[case]
    block = MixtureOfExperts(spec, hidden_size, torch.bfloat16, WHOLE).cuda()
    for parameter in block.parameters():
        parameter.data.normal_(0.0, 0.06)  # then the update is no smaller than the stream's rounding
    return block


def make_norm(size: int) -> RMSNorm:
    norm = RMSNorm(size, Norm(eps=EPS), torch.bfloat16).cuda()
    assert norm.weight is not None
    norm.weight.data.normal_(1.0, 0.3)
    return norm


def clear_rows(block: MixtureOfExperts, norm: RMSNorm, num_rows: int) -> Tensor:
    """Rows, [T, H], whose experts differ by more than bfloat16 rounds: else either path may choose others."""
    spec = block.spec
    rows = torch.randn(64 * num_rows, norm_weight(norm).shape[0], device="cuda", dtype=torch.bfloat16)
    logits = torch.nn.functional.linear(norm(rows).float(), block.router, block.router_bias)
    choice = logits if block.correction is None else logits.sigmoid() + block.correction
    best = choice.topk(spec.top_k + 1).values
    clear = (best[:, -2] - best[:, -1]) > 0.01 * choice.std()
    found = rows[clear][:num_rows]
    assert len(found) == num_rows
    return found


def norm_weight(norm: RMSNorm) -> Tensor:
    assert norm.weight is not None
    return norm.weight.data


def in_float32(block: MixtureOfExperts, norm: RMSNorm, rows: Tensor) -> Tensor:
    """rows + the update, without a rounding between."""
    wide = MixtureOfExperts(block.spec, rows.shape[1], torch.float32, WHOLE).cuda()
    for own, given in zip(wide.parameters(), block.parameters(), strict=True):
        own.data.copy_(given.data)
    x = rows.float()
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * norm_weight(norm).float()
    made: Tensor = wide(normed, None)
    return x + made


def run(block: MixtureOfExperts, norm: RMSNorm, rows: Tensor, live: Tensor | None, chained: bool) -> Tensor:
    from graphgen.models.experts.few_rows import run_experts
    from graphgen.models.normed import Normed

    begun = Normed(rows * norm_weight(norm), rows.float().pow(2).unflatten(1, (64, -1)).sum(-1))
    sums, normed = run_experts(block, rows, begun, EPS, norm, live, chained)
    assert relative_error(normed.scaled, sums * norm_weight(norm)) < 1e-3
    assert relative_error(normed.squares.sum(1), sums.float().pow(2).sum(1)) < 1e-5
    return sums


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("case", SHAPES)
def test_experts_in_the_shapes_of_real_layers_equal_the_block_in_float32(case: str) -> None:
    block, norm = make_block(case), make_norm(SHAPES[case][0])
    for num_rows in (1, 64 // block.spec.top_k):
        rows = clear_rows(block, norm, num_rows)
        want = in_float32(block, norm, rows)
        got = run(block, norm, rows, None, chained=True)
        assert relative_error(got.float() - rows.float(), want - rows.float()) < 1.5e-2
        assert torch.equal(got, run(block, norm, rows, None, chained=False)), "sums have one order"


STORED = [form for form in FORMATS.values() if not form.permuted and (form.storage == "int4" or not form.zeros)]


@pytest.mark.parametrize("case", ["Qwen3-30B-A3B", "DeepSeek-V2-Lite"])
@pytest.mark.parametrize("form", STORED, ids=lambda form: form.name)
def test_quantised_experts_equal_those_of_their_dequantised_weights(form: LinearFormat, case: str) -> None:
    """The second has a shared expert, and 6 experts of 1408 columns a row, which four warps cannot share evenly."""
    hidden_size, spec = SHAPES[case]
    formats: Any = {"gate_up_format": form, "down_format": form}
    shared = None if spec.shared is None else replace(spec.shared, **formats)
    plain, norm = make_block(case), make_norm(hidden_size)
    block = MixtureOfExperts(replace(spec, shared=shared, **formats), hidden_size, torch.bfloat16, WHOLE).cuda()
    block.router.data.copy_(plain.router)
    wide = MixtureOfExperts(spec, hidden_size, torch.float32, WHOLE).cuda()
    wide.router.data.copy_(plain.router)
    for name, own in block.named_modules():
        if isinstance(own, StoredWeight):
            given, other = plain.get_submodule(name), wide.get_submodule(name)
            assert isinstance(given, StoredWeight)
            assert isinstance(other, StoredWeight)
            own.fill(0, quantised(given.weight, form))
            other.weight.data.copy_(dequantised(own.rows(0, own.out_features), torch.float32))
    for num_rows in (1, 4):
        rows = clear_rows(plain, norm, num_rows)
        x = rows.float()
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * norm_weight(norm).float()
        want = wide(normed, None)
        got = run(block, norm, rows, None, chained=True)
        assert relative_error(got.float() - x, want) < 1.5e-2
        assert torch.equal(got, run(block, norm, rows, None, chained=False)), "sums have one order"


def test_a_graph_follows_the_choice_of_experts_and_the_rows_that_hold_tokens() -> None:
    """Dead rows come out as they went in, whatever their inner columns were before."""
    block, norm = make_block("Qwen3-30B-A3B"), make_norm(2048)
    rows = clear_rows(block, norm, 8)
    static, live = rows.clone(), torch.ones(8, dtype=torch.bool, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(block, norm, static, live, chained=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            from graphgen.models.experts.few_rows import run_experts
            from graphgen.models.normed import Normed

            begun = Normed(static * norm_weight(norm), static.float().pow(2).sum(1, keepdim=True))
            out, _ = run_experts(block, static, begun, EPS, norm, live, chained=True)
        for alive in (8, 1, 5):
            static.copy_(rows[torch.randperm(8)])
            live.copy_(torch.arange(8) < alive)
            graph.replay()
            got = out.clone()
            want = in_float32(block, norm, static)
            assert relative_error(got[:alive] - static[:alive], want[:alive] - static[:alive]) < 2e-2
            assert torch.equal(got[alive:], static[alive:])


def test_an_engine_replays_steps_of_a_few_rows_and_says_what_the_plain_layers_say(tmp_path: Path) -> None:
    """Tokens part where a router's or the head's two best are all but equal; in a model that is wrong, all do."""
    sizes = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 1024}
    experts: dict[str, Any] = {
        "num_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 128,
        "mlp_only_layers": [],
    }
    rest = {"num_hidden_layers": 3, "max_position_embeddings": 1024}
    tiny.build("qwen3_moe", **sizes, **experts, **rest, initializer_range=0.05).to(torch.bfloat16).save_pretrained(
        tmp_path
    )
    spec = load_spec(tmp_path)
    assert serves_model(spec, torch.bfloat16)
    assert most_rows(spec) == 8
    rng = random.Random(0)
    prompts = [[rng.randrange(1, 1000) for _ in range(rng.randint(1, 200))] for _ in range(24)]
    said = []
    for attention in ("flashinfer", "torch"):
        with Engine(
            model=str(tmp_path),
            device="cuda",
            attention=attention,
            token_budget=256,
            max_num_seqs=6,
            max_model_len=512,
        ) as engine:
            outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
            stats = engine.stats()
        assert (stats.eager_steps, stats.recompilations, stats.graph_replays) == (0, 0, stats.steps)
        said.append([output.token_ids for output in outputs])
    assert sum(a == b for a, b in zip(*said, strict=True)) > len(prompts) // 2
