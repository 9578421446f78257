"""The page pool's shapes and sizes."""

import pytest
import torch

from graphgen.ipc.errors import ConfigError
from graphgen.models.kv_cache import KVCache, bytes_per_page
from graphgen.models.page_layout import one_group
from tests.models import tiny


def test_the_trash_page_comes_on_top_of_the_pages_to_give_out() -> None:
    spec = tiny.spec_of(tiny.build("qwen3"))
    cache = KVCache(spec, num_pages=5, page_size=4, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert cache.trash_page == 5
    assert cache.num_bytes == 6 * bytes_per_page(spec, one_group(spec.num_layers), 4, "bfloat16")
    layout = one_group(spec.num_layers)
    assert bytes_per_page(spec, layout, 4, "bfloat16") == 4 * spec.kv_bytes_per_token("bfloat16")
    assert len(cache.k_pages) == len(cache.v_pages) == spec.num_layers
    for pages in (*cache.k_pages, *cache.v_pages):
        assert pages.shape == (6, 4, spec.attention.num_kv_heads, spec.attention.head_dim)
        assert pages.dtype == torch.bfloat16
        assert pages.is_contiguous()
        assert not pages.any()
    with pytest.raises(ConfigError, match="num_pages is 0"):
        KVCache(spec, num_pages=0, page_size=4, dtype=torch.bfloat16, device=torch.device("cpu"))


def test_copies_are_whole_and_touch_nothing_else() -> None:
    """On the CPU; tests/gpu/test_page_copy_gpu.py has the kernel."""
    spec = tiny.spec_of(tiny.build("qwen3"))
    cache = KVCache(spec, num_pages=7, page_size=4, dtype=torch.float32, device=torch.device("cpu"))
    tensors = (*cache.k_pages, *cache.v_pages)
    for pages in tensors:
        pages.normal_()
    before = [pages.clone() for pages in tensors]
    cache.copy_pages(torch.tensor([(0, 3), (6, 1), (5, 5), (0, 4)], dtype=torch.int32))
    for pages, old in zip(tensors, before, strict=True):
        assert torch.equal(pages, old[[0, 6, 2, 0, 0, 5, 6, 7]])
