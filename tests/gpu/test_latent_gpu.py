"""Latent attention on a GPU: the compiled kernels against the torch backend, under graphs, and in an engine."""

import random
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from graphgen import Engine, SamplingParams
from graphgen.ipc.worker_messages import Bucket
from graphgen.models.attention.backend import StepAttention
from graphgen.models.attention.reference import TorchStep
from graphgen.models.attention.variant import AttentionVariant, Numbers
from tests.gpu.test_attention_gpu import (
    BUCKETS,
    MAX_CHUNKS,
    PAGE_SIZE,
    TOLERANCE,
    edge_counts,
    live_rows,
    poisoned_cache,
    random_case,
    relative_error,
    static_copy,
    written_error,
)
from tests.models import tiny

LATENT, REST = 512, 64
SCALE = 192**-0.5
HEADS = [16, 20, 128]  # DeepSeek-V2-Lite and Moonlight, GLM-4.7-Flash, DeepSeek-V3
MOST_ROWS = 512
NEW_TOKENS = 8
NEAR_TIE = 0.1  # of the logits' standard deviation; bfloat16 moves them by some hundredths of it


def make_backend(heads: int):  # type: ignore[no-untyped-def]  # Triton is needed to name its type
    from graphgen.models.attention.latent_tiles import LatentTiles
    from graphgen.models.attention.row_tiles import TileShape

    shape, device = TileShape(heads, 1, LATENT, REST), torch.device("cuda", 0)
    return LatentTiles(shape, PAGE_SIZE, torch.bfloat16, MAX_CHUNKS, MOST_ROWS, 256, device)


def random_inputs(bucket: Bucket, heads: int, seed: int) -> tuple[Tensor, Tensor]:
    """Queries and what each row keeps."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = (bucket.num_rows, heads, LATENT + REST), (bucket.num_rows, LATENT + REST)
    q, row = (torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16) for shape in shapes)
    return q, row


def attend(step: StepAttention, inputs: tuple[Tensor, Tensor], pages: Tensor) -> Tensor:
    return step.attend_latent(*inputs, pages, LATENT, AttentionVariant(Numbers(SCALE).packed()))


@pytest.mark.parametrize("heads", HEADS)
def test_buckets_equal_the_reference_at_their_edges_over_poisoned_memory(heads: int) -> None:
    backend = make_backend(heads)
    failures = []
    for seed, bucket in enumerate([bucket for bucket in BUCKETS if bucket.prefill_rows <= MOST_ROWS][::4]):
        for prefill, decode in edge_counts(bucket):
            case = random_case(bucket, prefill, decode, seed)
            inputs = random_inputs(bucket, heads, seed)
            pages, _ = poisoned_cache(case, 1, LATENT + REST, seed)
            written = pages.clone()
            want = attend(TorchStep(case.tables), inputs, written)
            got = attend(backend.prepare(case.tables), inputs, pages)
            live = live_rows(case)
            error = max(relative_error(got[live], want[live]), written_error(pages, written, case))
            padded = got[int(case.starts[-1]) : bucket.prefill_rows]
            if not (error < TOLERANCE and not padded.any() and not got.isnan().any()):
                failures.append((str(bucket), prefill, decode, error))
    assert not failures, failures


def test_one_graph_serves_steps_of_any_lengths() -> None:
    bucket, heads = Bucket(256, 32), 16
    backend = make_backend(heads)
    cases = [random_case(bucket, 256 - 9 * seed, 32 - seed % 5, seed) for seed in range(12)]
    inputs = random_inputs(bucket, heads, 0)
    owned = torch.unique(torch.cat([case.owned for case in cases]))
    pages, _ = poisoned_cache(cases[0]._replace(owned=owned), 1, LATENT + REST, 0)
    pages_each = max(case.tables.chunk_pages.shape[1] for case in cases)
    wants = []
    again = pages.clone()
    for case in cases:
        wants.append(attend(TorchStep(case.tables), inputs, pages).clone())
    static = static_copy(cases[0].tables, pages_each)
    attend(backend.prepare(static), inputs, again.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(backend.prepare(static), inputs, again)
    for case, want in zip(cases, wants, strict=True):
        for target, source in zip(static, static_copy(case.tables, pages_each), strict=True):
            target.copy_(source)
        graph.replay()
        live = live_rows(case)
        assert relative_error(out[live], want[live]) < TOLERANCE


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(1, 1000) for _ in range(rng.randint(1, 300))] for _ in range(32)]


def generate(model: Path, attention: Literal["auto", "flashinfer", "torch"]) -> list[list[int]]:
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with Engine(
        model=str(model), device="cuda", attention=attention, token_budget=256, max_num_seqs=16, max_model_len=512
    ) as engine:
        outputs = engine.generate(prompts(), sampling)
        stats = engine.stats()
    assert (stats.eager_steps, stats.recompilations, stats.graph_replays) == (0, 0, stats.steps)
    return [list(output.token_ids) for output in outputs]


def save(folder: Path, num_dense: int) -> torch.nn.Module:
    """A small model with latents of the published size, in bfloat16. num_dense: of its 3 layers, without experts."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": LATENT, "qk_rope_head_dim": REST}
    rest = {"vocab_size": 1024, "max_position_embeddings": 1024, "first_k_dense_replace": num_dense}
    model = tiny.build("deepseek_v2", **sizes, **heads, **rest, initializer_range=0.05)
    model.to(torch.bfloat16).save_pretrained(folder)
    wide: torch.nn.Module = model.float()
    return wide


def test_greedy_tokens_equal_those_of_the_torch_backend_but_for_near_ties(tmp_path: Path) -> None:
    model = save(tmp_path, num_dense=3).cuda()
    got, want = generate(tmp_path, "flashinfer"), generate(tmp_path, "torch")
    parted = 0
    for prompt, a, b in zip(prompts(), got, want, strict=True):
        place = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if place is None:
            continue
        parted += 1
        with torch.no_grad():
            logits = model(torch.tensor([prompt + a[:place]]).cuda()).logits[0, -1]
        near = NEAR_TIE * float(logits.std())
        assert float((logits[a[place]] - logits[b[place]]).abs()) < near
        assert float(logits.max() - logits[a[place]]) < near
    assert parted < len(got) // 2


def test_layers_with_experts_are_replayed_too(tmp_path: Path) -> None:
    """A router's near ties make other tokens of the same arithmetic, so none are compared."""
    save(tmp_path, num_dense=1)
    assert all(len(tokens) == NEW_TOKENS for tokens in generate(tmp_path, "auto"))
