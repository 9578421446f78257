"""Pages copied on a CUDA device: every byte of them in every layer, and nothing else."""

import pytest
import torch

from graphgen import Engine, EngineConfig, SamplingParams
from graphgen.models.kv_cache import KVCache
from tests.models import tiny


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("page_size", [16, 64])
def test_copies_are_whole_and_touch_nothing_else(dtype: torch.dtype, page_size: int) -> None:
    spec = tiny.spec_of(tiny.build("qwen3"))
    cache = KVCache(spec, num_pages=40, page_size=page_size, dtype=dtype, device=torch.device("cuda"))
    for pages in (*cache.k_pages, *cache.v_pages):
        pages.normal_()
    before = [pages.clone() for pages in (*cache.k_pages, *cache.v_pages)]
    pairs = torch.tensor([(0, 7), (39, 1), (5, 5), (0, 38)], dtype=torch.int32, device="cuda")
    cache.copy_pages(pairs)
    for pages, old in zip((*cache.k_pages, *cache.v_pages), before, strict=True):
        expected = old.clone()
        for source, destination in pairs.tolist():
            expected[destination] = old[source]
        assert torch.equal(pages, expected)


def test_samples_that_copy_the_last_page_draw_what_they_draw_alone() -> None:
    """A prompt of one page and 37 tokens; without the copy a sample would attend to what its new page held before."""
    sampling = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, n=4)
    prompt = [(7 * position) % 900 + 1 for position in range(64 + 37)]
    with Engine(
        EngineConfig(device="cuda", dtype="float32", attention="torch", compile=False, max_num_seqs=8)
    ) as engine:
        samples = engine.generate([prompt], sampling)
        again = engine.generate([prompt], sampling)
    with Engine(
        EngineConfig(
            device="cuda", dtype="float32", attention="torch", compile=False, max_num_seqs=8, prefix_cache=False
        )
    ) as engine:
        (alone,) = engine.generate([prompt], SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
    assert [output.cached_tokens for output in samples] == [0, 100, 100, 100]
    assert [output.cached_tokens for output in again] == [100] * 4
    assert {output.token_ids for output in (*samples, *again)} == {alone.token_ids}
