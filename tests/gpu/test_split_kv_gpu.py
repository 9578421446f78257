"""The compiled split-KV kernel and FlashInfer's variants against the torch backend, for each way to score."""

import itertools

import pytest
import torch

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.ipc.worker_messages import Bucket
from graphgen.models.attention.kernels import AttentionShape, Kernel, Scores
from graphgen.models.attention.reference import TorchStep
from tests.gpu.test_attention_gpu import (
    MAX_CHUNKS,
    PAGE_SIZE,
    TOLERANCE,
    attend,
    live_rows,
    poisoned_cache,
    random_case,
    random_rows,
    relative_error,
    written_error,
)
from tests.models.attention_cases import Rules, rules

HEADS = (16, 4, 128)
RULES = rules(HEADS[0], window=200, segment=512)
# bfloat16 queries err in proportion to the scores: 0.7, eight times the usual scale of this size, leaves 1.2e-2.
RULES["scale"] = Rules(scale=2 * HEADS[2] ** -0.5)


def on_gpu(rule: Rules) -> Rules:
    sinks, slopes = (None if heads is None else heads.cuda() for heads in (rule.sinks, rule.slopes))
    return rule._replace(sinks=sinks, slopes=slopes)


def scores_of(rule: Rules) -> Scores | None:
    try:
        return Scores.of(rule.scoring(HEADS[2]))
    except UnsupportedModelError:
        return None


@pytest.mark.parametrize("tempered", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_rows_of_a_step_score_as_in_the_torch_backend(name: str, tempered: bool) -> None:
    """Decode rows alone, and beside chunks, which row tiles attend for where FlashInfer has no library."""
    from graphgen.models.attention.flashinfer import FlashInferAttention

    rule = on_gpu(RULES[name])
    scores = scores_of(rule)
    shape = AttentionShape(*HEADS, PAGE_SIZE, torch.bfloat16, (rule.window,), scores)
    backends = [FlashInferAttention(shape, MAX_CHUNKS, 2048, 256)]
    if scores is not None:
        kernels = Kernel.TILES, Kernel.SPLIT_KV
        backends.append(FlashInferAttention(shape, MAX_CHUNKS, 2048, 256, kernels))
    buckets = [(Bucket(0, 64), 0, 61), (Bucket(448, 64), 440, 60), (Bucket(32, 1), 20, 1), (Bucket(0, 1), 0, 1)]
    for backend, (bucket, live_prefill, live_decode) in itertools.product(backends, buckets):
        seed = bucket.num_rows
        case = random_case(bucket, live_prefill, live_decode, seed)
        rows = random_rows(bucket, HEADS, seed)
        factors = torch.linspace(0.5, 2.0, bucket.num_rows, device="cuda") if tempered else None
        cache = poisoned_cache(case, *HEADS[1:], seed)
        written = tuple(pages.clone() for pages in cache)
        want = attend(TorchStep(case.tables), rows, written, rule, factors)
        backend.plan(bucket.prefill_rows, case.starts, case.chunk_kv_lens, case.decode_kv_lens)
        got = attend(backend.prepare(case.tables), rows, cache, rule, factors)
        live = live_rows(case)
        assert relative_error(got[live], want[live]) < TOLERANCE
        assert all(written_error(*pages, case) < TOLERANCE for pages in zip(cache, written, strict=True))
        assert not got.isnan().any()
