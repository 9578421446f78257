"""Quantised keys and values on a CUDA device: every kernel against the torch backend, stored to the bit, in graphs."""

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from graphgen.ipc.worker_messages import Bucket
from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.reference import TorchStep
from graphgen.models.kv_cache import KVCache
from tests.gpu.test_attention_gpu import (
    MAX_CHUNKS,
    PAGE_SIZE,
    PAGES_PER_SLOT,
    Case,
    attend,
    live_rows,
    poisoned_cache,
    random_case,
    random_rows,
    relative_error,
    static_copy,
)
from tests.gpu.test_engine_gpu import NEAR_TIE, assert_equal_but_for_near_ties, generate
from tests.models import tiny
from tests.models.attention_cases import rules
from tests.models.kept import FORMATS, kept_as, read

if TYPE_CHECKING:
    from graphgen.models.attention.flashinfer import FlashInferAttention

Heads = tuple[int, int, int]

HEADS, WIDE_HEADS = (16, 4, 128), (8, 2, 256)
RULES = rules(HEADS[0], window=200, segment=512)
BUCKETS = ((Bucket(0, 64), 0, 61), (Bucket(448, 64), 440, 60), (Bucket(32, 1), 20, 1))
TOLERANCE = 2e-2
"""Relative norm. The torch backend rotates in bfloat16, so some of the newest keys are rounded to the next number of
the format, a sixteenth away with fp8."""


def open_backend(chunks: str, window: int = 0, heads: Heads = HEADS) -> "FlashInferAttention":
    """FlashInfer's kernels of chunks are FA3's where there are such."""
    from graphgen.models.attention.flashinfer import FlashInferAttention
    from graphgen.models.attention.kernels import AttentionShape, Kernel

    if chunks == "FlashInfer":
        chunks = "FA3" if torch.cuda.get_device_capability()[0] == 9 else "FA2"
    shape = AttentionShape(*heads, PAGE_SIZE, torch.bfloat16, (window,))
    kernels = Kernel[chunks], Kernel.SPLIT_KV
    return FlashInferAttention(shape, MAX_CHUNKS, 2048, 256, kernels, MAX_CHUNKS * PAGES_PER_SLOT)


def skip_without(name: str) -> None:
    """Of a format that this device does not have."""
    if name == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9 (Ada, Hopper) and is tested there")


def make_pages(case: Case, name: str, seed: int, heads: Heads = HEADS) -> LayerPages:
    """Random where a live request's positions are, NaN everywhere else."""
    skip_without(name)
    return kept_as(name, LayerPages(*poisoned_cache(case, *heads[1:], seed)))


def copied(pages: LayerPages) -> LayerPages:
    k, v, *others = (None if tensor is None else tensor.clone() for tensor in pages)
    assert k is not None
    assert v is not None
    return LayerPages(k, v, *others)


def newest(pages: LayerPages, case: Case) -> Tensor:
    """Keys and values of the positions that live rows wrote, as they are read."""
    places = case.tables.kv_locations[live_rows(case)]
    kinds = (pages.k, pages.k_scales), (pages.v, pages.v_scales)
    return torch.stack([read(*kind).flatten(0, 1)[places] for kind in kinds])


@pytest.mark.parametrize(
    ("chunks", "rule", "heads"),
    [
        ("FlashInfer", "plain", HEADS),
        ("FlashInfer", "window", WIDE_HEADS),
        ("TILES", "plain", HEADS),
        ("TILES", "softcap, sinks", HEADS),
    ],
)
@pytest.mark.parametrize("name", FORMATS)
def test_every_path_equals_the_torch_backend(name: str, chunks: str, rule: str, heads: Heads) -> None:
    chosen = RULES[rule]
    if chosen.sinks is not None:
        chosen = chosen._replace(sinks=chosen.sinks.cuda())
    backend = open_backend(chunks, chosen.window, heads)
    for bucket, live_prefill, live_decode in BUCKETS:
        case = random_case(bucket, live_prefill, live_decode, bucket.num_rows)
        rows = random_rows(bucket, heads, bucket.num_rows)
        pages = make_pages(case, name, bucket.num_rows, heads)
        written = copied(pages)
        want = attend(TorchStep(case.tables), rows, written, chosen)
        backend.plan(bucket.prefill_rows, case.starts, case.chunk_kv_lens, case.decode_kv_lens)
        got = attend(backend.prepare(case.tables), rows, pages, chosen)
        live = live_rows(case)
        errors = relative_error(got[live], want[live]), relative_error(newest(pages, case), newest(written, case))
        print(name, chunks, rule, bucket, *(f"{error:.4f}" for error in errors))
        assert errors[0] < TOLERANCE
        assert errors[1] < 2 * TOLERANCE
        assert not got.isnan().any()


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_stored_is_what_plain_pages_would_hold_rounded_once(name: str) -> None:
    """By the kernel of decode rows alone and by that of steps with chunks."""
    backend = open_backend("TILES")
    for bucket, live_prefill, live_decode in BUCKETS:
        case = random_case(bucket, live_prefill, live_decode, 1)
        rows = random_rows(bucket, HEADS, 1)
        plain, pages = LayerPages(*poisoned_cache(case, *HEADS[1:], 1)), make_pages(case, name, 1)
        backend.plan(bucket.prefill_rows, case.starts, case.chunk_kv_lens, case.decode_kv_lens)
        for cache in (plain, pages):
            attend(backend.prepare(case.tables), rows, cache)
        differing = newest(pages, case) != newest(kept_as(name, plain), case)
        assert float(differing.float().mean()) < 1e-4


@pytest.mark.parametrize("name", FORMATS)
def test_values_beyond_the_range_stay_finite(name: str) -> None:
    backend = open_backend("FlashInfer")
    for bucket, live_prefill, live_decode in BUCKETS[:2]:
        case = random_case(bucket, live_prefill, live_decode, 2)
        q, k, v = random_rows(bucket, HEADS, 2)
        pages = make_pages(case, name, 2)
        backend.plan(bucket.prefill_rows, case.starts, case.chunk_kv_lens, case.decode_kv_lens)
        assert attend(backend.prepare(case.tables), (q, k, v * 1e5), pages).isfinite().all()
        assert newest(pages, case).isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
def test_one_graph_serves_steps_of_any_lengths(name: str) -> None:
    bucket = Bucket(448, 64)
    backend = open_backend("FlashInfer")
    cases = [random_case(bucket, 448 - 90 * seed, 64 - seed, seed) for seed in range(4)]
    rows = random_rows(bucket, HEADS, 0)
    owned = torch.unique(torch.cat([case.owned for case in cases]))
    pages = make_pages(cases[0]._replace(owned=owned), name, 0)
    pages_each = max(case.tables.chunk_pages.shape[1] for case in cases)
    static, written = static_copy(cases[0].tables, pages_each), copied(pages)
    wants = [attend(TorchStep(case.tables), rows, written).clone() for case in cases]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        backend.plan(bucket.prefill_rows, cases[0].starts, cases[0].chunk_kv_lens, cases[0].decode_kv_lens)
        attend(backend.prepare(static), rows, copied(pages))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = attend(backend.prepare(static), rows, pages)
        gots = []
        for case in cases:
            for target, source in zip(static, static_copy(case.tables, pages_each), strict=True):
                target.copy_(source)
            backend.plan(bucket.prefill_rows, case.starts, case.chunk_kv_lens, case.decode_kv_lens)
            graph.replay()
            gots.append(out.clone())
    stream.synchronize()
    for case, got, want in zip(cases, gots, wants, strict=True):
        assert relative_error(got[live_rows(case)], want[live_rows(case)]) < TOLERANCE


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("page_size", [16, 64])
def test_copies_of_pages_are_whole(name: str, page_size: int) -> None:
    spec = tiny.spec_of(tiny.build("qwen3"))
    device = torch.device("cuda")
    cache = KVCache(spec, 40, page_size, torch.bfloat16, device, kept_as=name)
    for pages, stored in itertools.product(cache.pages, range(4)):
        tensor = pages[stored]
        if tensor is not None and tensor.ndim > 1:
            bytes_ = tensor.view(torch.uint8)
            bytes_.copy_(torch.randint(0, 120, bytes_.shape, dtype=torch.uint8, device="cuda"))  # no NaN
    before = [(read(pages.k, pages.k_scales), read(pages.v, pages.v_scales)) for pages in cache.pages]
    pairs = [(0, 7), (39, 1), (5, 5), (0, 38)]
    cache.copy_pages(torch.tensor(pairs, dtype=torch.int32, device="cuda"))
    for pages, (k, v) in zip(cache.pages, before, strict=True):
        for source, destination in pairs:
            k[destination], v[destination] = k[source].clone(), v[source].clone()
        assert torch.equal(read(pages.k, pages.k_scales), k)
        assert torch.equal(read(pages.v, pages.v_scales), v)


@pytest.mark.parametrize("name", FORMATS)
def test_an_engine_draws_what_the_torch_backend_draws(name: str) -> None:
    """Captured, compiled, chunks and decodes together; `generate` sees to no eager step and no recompilation."""
    skip_without(name)
    fast, _ = generate(attention="flashinfer", kv_cache_dtype=name)
    reference, _ = generate(attention="torch", kv_cache_dtype=name)
    # Unquantised logits judge where they part, and both are further from these than without a format.
    assert_equal_but_for_near_ties(fast, reference, 4 * NEAR_TIE if name == "fp8" else NEAR_TIE)
    tight, stats = generate(kv_cache_dtype=name, num_pages=40, max_model_len=400)
    assert stats.preemptions > 0  # type: ignore[attr-defined]  # EngineStats
    assert_equal_but_for_near_ties(tight, fast, 4 * NEAR_TIE if name == "fp8" else NEAR_TIE)
