"""An engine over quantised keys and values: tokens do not depend on how its requests are computed."""

import pytest

from graphgen.demo import model_folder
from graphgen.ipc.errors import ConfigError
from graphgen.worker.backend import MOST_CHUNK_PAGES, check_kv_format, most_chunk_pages
from tests.models.kept import FORMATS
from tests.models.splits import tokens
from tests.worker.local_engine import LocalEngine, launch_config

PROMPTS = [tokens(length, seed=length) for length in (100, 1, 33, 17, 64, 5)]


def open_engine(token_budget: int, num_pages: int, page_size: int, kv_cache_dtype: str) -> LocalEngine:
    sizes = {"token_budget": token_budget, "num_pages": num_pages, "page_size": page_size}
    return LocalEngine(launch_config(model_folder(), 256, device="cpu", kv_cache_dtype=kv_cache_dtype, **sizes))


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_depend_on_no_budget_page_size_preemption_or_prefix(name: str) -> None:
    results, preemptions, hits = [], 0, 0
    for token_budget, num_pages, page_size in ((256, 60, 16), (16, 30, 16), (48, 200, 4)):
        engine = open_engine(token_budget, num_pages, page_size, name)
        results.append(engine.generate(PROMPTS, 12, preempt_after=8))
        preemptions += engine.scheduler.counters.preemptions
        results.append(engine.generate(PROMPTS, 12))  # over pages of the prefix cache
        hits += engine.scheduler.counters.prefix_hits
        engine.close()
    assert preemptions
    assert hits
    assert all(result == results[0] for result in results)


def test_pages_of_the_counted_size_are_made() -> None:
    plain, fp8, int8 = (open_engine(16, 40, 16, name) for name in ("auto", "fp8", "int8"))
    sizes = [engine.runner.describe().page_bytes for engine in (plain, fp8, int8)]
    assert sizes[0] == 4 * sizes[1]
    assert sizes[1] < sizes[2] < 1.07 * sizes[1], "float32 scales of heads of 64"
    for engine, page_bytes in zip((plain, fp8, int8), sizes, strict=True):
        assert engine.runner.kv_cache.num_bytes == 41 * page_bytes
        engine.close()


def test_fp8_is_refused_on_a_gpu_whose_kernels_cannot_read_it() -> None:
    with pytest.raises(ConfigError, match=r"needs compute capability 8.9, this device has 8.0: use 'int8'"):
        check_kv_format("fp8", (8, 0))
    check_kv_format("fp8", (8, 9))
    check_kv_format("int8", (8, 0))


@pytest.mark.parametrize(
    ("max_model_len", "want"),
    [(256, 32 * 16), (512, MOST_CHUNK_PAGES), (16 * MOST_CHUNK_PAGES + 1, MOST_CHUNK_PAGES + 1)],
)
def test_plain_pages_hold_any_context_and_no_more_than_steps_can_see(max_model_len: int, want: int) -> None:
    config = launch_config(model_folder(), max_model_len, device="cpu", page_size=16)
    assert most_chunk_pages(config, most_chunks=32) == want
