"""The runner with the policy: what one request gets does not depend on what else is there."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from graphgen.demo import model_folder
from graphgen.ipc.worker_messages import SamplerParams
from graphgen.models.decoder import Decoder
from tests.models.sampling_cases import biases
from tests.worker.local_engine import LocalEngine, launch_config

PROMPTS = [
    [number * 7 % 1000 for number in range(start, start + length)] for start, length in ((1, 30), (5, 3), (9, 70))
]
MIXED = [
    SamplerParams(),
    SamplerParams(temperature=0.9, seed=11),
    SamplerParams(temperature=1.2, top_k=5, seed=12),
    SamplerParams(temperature=1.0, top_p=0.8, seed=13),
    SamplerParams(temperature=1.0, min_p=0.1, seed=14),
    SamplerParams(repetition_penalty=1.3),
    SamplerParams(presence_penalty=0.5, frequency_penalty=0.4),
    SamplerParams(temperature=0.7, top_k=40, top_p=0.9, repetition_penalty=1.1, seed=15),
    SamplerParams(biases=biases(dict.fromkeys(range(300, 340), 100.0))),
    SamplerParams(temperature=0.8, seed=16, biases=biases(dict.fromkeys(range(0, 900, 2), -100.0))),
]


@pytest.fixture(params=[True])
def engine(request: pytest.FixtureRequest) -> Iterator[LocalEngine]:
    """The parameter says whether prompts share pages."""
    config = launch_config(
        model_folder(), 256, device="cpu", token_budget=64, num_pages=80, prefix_cache=bool(request.param)
    )
    engine = LocalEngine(config)
    yield engine
    engine.close()


def test_any_mix_of_sampling_rules_gives_each_request_the_tokens_it_gets_alone(engine: LocalEngine) -> None:
    prompts = [PROMPTS[number % 3] for number in range(len(MIXED))]
    together = engine.generate(prompts, 20, MIXED)
    alone = [engine.generate([prompt], 20, [sampler])[0] for prompt, sampler in zip(prompts, MIXED, strict=True)]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == len(together), "the rules do change the tokens"
    assert set(together[8]) <= set(range(300, 340))
    assert all(token % 2 or token >= 900 for token in together[9])


def test_penalised_requests_keep_their_counts_and_biases_through_preemption() -> None:
    prompts = [list(range(10 + 20 * number, 26 + 20 * number)) for number in range(6)]
    preferred = biases(dict.fromkeys(range(100, 200), 3.0))
    sampler = SamplerParams(repetition_penalty=1.4, frequency_penalty=0.6, temperature=0.8, seed=3, biases=preferred)
    results = []
    for num_pages in (80, 8):
        engine = LocalEngine(
            launch_config(model_folder(), 128, device="cpu", token_budget=64, num_pages=num_pages, page_size=16)
        )
        results.append(engine.generate(prompts, 40, [sampler] * 6))
        preemptions = engine.scheduler.counters.preemptions
        engine.close()
    assert preemptions > 0
    assert results[0] == results[1]


def test_without_graphs_a_step_has_the_rows_of_its_plan_and_none_runs_before_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[tuple[int, int]] = []
    forward = Decoder.forward

    def counting(self: Decoder, token_ids: Tensor, *more: Any, **named: Any) -> Tensor:  # what it takes besides
        logits = forward(self, token_ids, *more, **named)
        steps.append((token_ids.shape[0], logits.shape[0]))
        return logits

    monkeypatch.setattr(Decoder, "forward", counting)
    engine = LocalEngine(launch_config(model_folder(), 256, device="cpu", token_budget=64, num_pages=80))
    assert steps == []
    engine.generate([PROMPTS[2]], 4)
    assert steps == [(60, 1), (10, 1), (1, 1), (1, 1), (1, 1)], "rows and logits of each step"
    steps.clear()
    engine.generate(PROMPTS[:2], 3)
    assert steps == [(33, 2), (2, 2), (2, 2)]
    counters = engine.scheduler.counters
    assert (counters.padding_rows, counters.total_rows) == (0, 110)
    engine.close()


@pytest.mark.parametrize("engine", [False], indirect=True)  # the cache's pages belong to no request and are read
def test_memory_that_belongs_to_no_request_is_never_read(engine: LocalEngine) -> None:
    want = engine.generate(PROMPTS, 20)
    cache = engine.runner.kv_cache
    for pages in (*cache.k_pages, *cache.v_pages):
        pages.fill_(torch.nan)
    assert engine.generate(PROMPTS, 20) == want


def test_greedy_tokens_do_not_depend_on_the_budget_or_the_page_size() -> None:
    results = []
    for token_budget, page_size in ((8, 1), (16, 8), (33, 16), (256, 32)):
        config = launch_config(
            model_folder(), 128, device="cpu", token_budget=token_budget, num_pages=300, page_size=page_size
        )
        engine = LocalEngine(config)
        results.append(engine.generate(PROMPTS, 12))
        engine.close()
    assert all(result == results[0] for result in results)


def test_prompts_one_token_around_every_bucket_edge_are_served(engine: LocalEngine) -> None:
    edges = {bucket.prefill_rows for bucket in engine.runner.describe().buckets if bucket.prefill_rows}
    lengths = sorted({edge + off for edge in edges for off in (-1, 0, 1)} - {0})
    prompts = [[1 + (index * 13) % 900 for index in range(length)] for length in lengths]
    one_by_one = [engine.generate([prompt], 3)[0] for prompt in prompts]
    assert engine.generate(prompts, 3) == one_by_one
