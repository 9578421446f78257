"""Models whose layers see windows, in the whole engine: what lies behind a window is given to others and never read."""

from pathlib import Path

import pytest
import torch

from graphgen.ipc.codec import pack_int32
from graphgen.ipc.engine_messages import Submit
from graphgen.ipc.worker_messages import SamplerParams
from tests.models import tiny
from tests.scheduler.harness import tokens_of
from tests.worker.local_engine import LocalEngine, launch_config, token_ids_of

PROMPTS = [
    [3 + (7 * position + number) % 90 for position in range(length)] for number, length in enumerate((70, 41, 5))
]
MAX_TOKENS = 40


def open_engine(folder: Path, num_pages: int) -> LocalEngine:
    sizes = {"token_budget": 32, "num_pages": num_pages, "page_size": 4, "prefix_cache": False}
    return LocalEngine(launch_config(folder, 128, device="cpu", **sizes))


def free_pages(engine: LocalEngine) -> torch.Tensor:
    pool = engine.scheduler._life.cache.pool
    return torch.tensor([page for page in range(pool.num_pages) if not pool.num_holders(page)], dtype=torch.int64)


def serve(engine: LocalEngine) -> tuple[list[list[int]], int]:
    """Tokens of all prompts, and the fewest pages that were free. Before each step, pages of nobody hold NaN."""
    for number, prompt in enumerate(PROMPTS):
        engine.scheduler.add(Submit(number, pack_int32(prompt), MAX_TOKENS, 0, (), SamplerParams(), 0.0))
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    cache, least_free = engine.runner.kv_cache, engine.scheduler.pages_total
    while (plan := engine.scheduler.schedule(0.0)) is not None:
        free = free_pages(engine)
        least_free = min(least_free, len(free))
        for pages in (*cache.k_pages, *cache.v_pages):
            pages[free] = torch.nan
        step = engine.runner.launch(plan, received_s=0.0)
        step.fetched.wait()
        for number, (token_id, _) in tokens_of(engine.scheduler.update(step.step_id, token_ids_of(step))).items():
            tokens[number].append(token_id)
    return tokens, least_free


@pytest.mark.parametrize("case", ["mistral_window", "qwen2_window", "olmo3"])
def test_pages_that_no_request_holds_are_never_read(case: str, tmp_path: Path) -> None:
    model = tiny.save(case, tmp_path)
    engine = open_engine(tmp_path, num_pages=400)
    tokens, least_free = serve(engine)
    engine.close()
    for prompt, got in zip(PROMPTS, tokens, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *got[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == got
    num_groups = len(engine.runner.describe().page_groups)
    all_positions = sum(-(-(len(prompt) + MAX_TOKENS) // 4) for prompt in PROMPTS)
    assert 400 - least_free < num_groups * all_positions, "pages behind windows are free"


def test_a_context_that_would_fill_the_memory_several_times_is_served_through_a_window(tmp_path: Path) -> None:
    """A window of 11 and chunks of up to 32 positions: 3 pages, 8, and one for a copy."""
    tiny.save("mistral_window", tmp_path)
    engine = open_engine(tmp_path, num_pages=12)
    want = open_engine(tmp_path, num_pages=400)
    assert engine.generate(PROMPTS, MAX_TOKENS) == want.generate(PROMPTS, MAX_TOKENS)
    assert engine.scheduler.pages_free == engine.scheduler.pages_total == 12
    for one in (engine, want):
        one.close()
