"""Every family against Hugging Face, in float32 on the CPU: logits at every split of a prompt, and greedy tokens of the
whole engine, token for token.

Prompts of 1 to 331 tokens at once, those of one token around each edge of a page and a bucket among them, at token
budgets 16, 48 and 512, over a page pool so small that requests are preempted and computed again, and once more over
pages that the prefix cache kept.
"""

import functools
import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon

from graphgen.ipc.worker_messages import PageGroup
from graphgen.models.families import FAMILIES, load_spec
from graphgen.models.loader import load_decoder
from graphgen.models.page_layout import page_layout
from graphgen.models.spec import ModelSpec
from tests.models import tiny
from tests.models.driver import Driver
from tests.models.quick_compiler import quick_compiler
from tests.models.splits import assert_equal_at_every_split
from tests.worker.local_engine import LocalEngine, launch_config

NEW_TOKENS = 8
LONGEST = 331
MAX_MODEL_LEN = LONGEST + NEW_TOKENS
PROMPT_LENS = [1, 2, 3, 11, 12, 13, 15, 16, 17, 31, 35, 36, 37, 47, 48, 49, 63, 64, 65, 90, 127, 128, 129, LONGEST]


class Pool(NamedTuple):
    """Of pages, so small that requests must give way."""

    page_size: int
    num_longest: int  # of the longest requests that there may be

    def num_pages(self, spec: ModelSpec, token_budget: int) -> int:
        windows = page_layout(spec.layers, MAX_MODEL_LEN).windows
        of_groups = (PageGroup(window).most_pages(MAX_MODEL_LEN, self.page_size, token_budget) for window in windows)
        return self.num_longest * sum(of_groups)


POOLS = {16: Pool(16, 2), 48: Pool(1, 1), 512: Pool(16, 2)}
"""Per token budget. With pages of 2 positions all running requests grow at once."""


@functools.cache
def prompts() -> tuple[tuple[int, ...], ...]:
    rng, lengths = random.Random(0), list(PROMPT_LENS)
    rng.shuffle(lengths)
    return tuple(tuple(rng.randrange(3, tiny.SMALL["vocab_size"]) for _ in range(length)) for length in lengths)


def wrong_prompts(model: tiny.HuggingFaceModel, got: list[list[int]]) -> list[int]:
    """Numbers of the prompts whose tokens are not those that Hugging Face takes greedily.

    By induction: a token is the greedy one after the prompt and the tokens before it, which were found to be greedy.
    So one forward pass over each sequence says it all, except where a rotation depends on the length of what was
    computed together: there each token is generated in a pass of its own. (Where it depends on the most tokens that a
    request may have, these are what the pass sees.)
    """
    if (getattr(model.config, "rope_parameters", None) or {}).get("rope_type") == "dynamic":
        return differing(got, generated_tokens(model))
    wrong = []
    for number, (prompt, tokens) in enumerate(zip(prompts(), got, strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        if len(tokens) != NEW_TOKENS or logits.argmax(-1).tolist() != tokens:
            wrong.append(number)
    return wrong


def differing(got: list[list[int]], want: list[list[int]]) -> list[int]:
    return [number for number, (a, b) in enumerate(zip(got, want, strict=True)) if a != b]


def generated_tokens(model: tiny.HuggingFaceModel) -> list[list[int]]:
    """Each prompt alone. A model with dynamic rope keeps state between calls, so its rope is put back each time."""
    fresh = model.model.rotary_emb.state_dict(), model.model.rotary_emb.__dict__.copy()
    tokens = []
    for prompt in prompts():
        model.model.rotary_emb.__dict__.update(fresh[1])
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.original_inv_freq
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        tokens.append(ids[0, len(prompt) :].tolist())
    return tokens


@pytest.fixture(autouse=True)
def _exact_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """Falcon's are rounded to bfloat16 in transformers, whatever the model's dtype is, so that positions beyond 256
    share one. BLOOM's are the same without that."""
    monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", modeling_bloom.build_alibi_tensor)


@pytest.mark.parametrize("case", tiny.CASES)
def test_logits_and_greedy_tokens_equal_hugging_face(case: str, tmp_path: Path) -> None:
    model = tiny.save(case, tmp_path)
    spec = load_spec(tmp_path)
    driver = Driver(load_decoder(tmp_path, spec, torch.float32, torch.device("cpu")))
    assert_equal_at_every_split(model, driver)
    model_type = model.config.model_type
    if model_type in tiny.TOWERS:
        return  # the engine runs the text model in a case of its own
    is_first = case == next(name for name, (kind, _) in tiny.CASES.items() if kind == model_type)
    preemptions = prefix_hits = 0
    tokens: list[list[list[int]]] = []
    # More cases of a family differ in what a layer computes, which one budget shows.
    for token_budget, pool in (POOLS if is_first else {48: POOLS[48]}).items():
        num_pages = pool.num_pages(spec, token_budget)
        sizes = {"token_budget": token_budget, "num_pages": num_pages, "page_size": pool.page_size}
        config = launch_config(tmp_path, MAX_MODEL_LEN, device="cpu", **sizes)
        engine = LocalEngine(config)
        tokens.append(engine.generate(prompts(), NEW_TOKENS, preempt_after=20))
        # The tokens of the first budget are held to Hugging Face, those of the others to them.
        wrong = wrong_prompts(model, tokens[0]) if len(tokens) == 1 else differing(tokens[-1], tokens[0])
        assert not wrong, f"budget {token_budget}: prompts {wrong} of lengths {[len(prompts()[i]) for i in wrong]}"
        assert engine.scheduler.pages_free == num_pages
        preemptions += engine.scheduler.counters.preemptions
        last = len(prompts()) - 1
        for _ in range(2):  # the second time right over the pages of the first
            assert engine.generate(prompts()[last:], NEW_TOKENS) == tokens[0][last:], "over pages of the prefix cache"
        prefix_hits += engine.scheduler.counters.prefix_hits
        engine.close()
    assert preemptions > len(tokens) or any(spec.windows), "the pool was meant to be too small"
    assert (prefix_hits > 0) is not spec.depends_on_length


def test_every_family_has_a_case() -> None:
    built = {tiny.spec_of(tiny.build(case)).family for case in tiny.CASES}
    assert built == set(FAMILIES)


def test_compiled_tokens_equal_eager_ones_with_two_graphs_and_no_recompilation(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    tokens = []
    for compile_layers in (False, True):
        config = launch_config(
            tmp_path, MAX_MODEL_LEN, device="cpu", token_budget=64, num_pages=200, page_size=16, compile=compile_layers
        )
        with quick_compiler(), torch.inference_mode():  # as the worker's process
            engine = LocalEngine(config)
        tokens.append(engine.generate(prompts(), NEW_TOKENS))
        if compile_layers:
            assert engine.runner.num_compiled_graphs == 2, "all layers and all shapes share a graph for each half"
            assert engine.runner.counters.recompilations == 0
        engine.close()
    assert tokens[0] == tokens[1]
