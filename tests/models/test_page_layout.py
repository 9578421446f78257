"""Which layers share pages, and what that spares."""

import msgspec
import pytest
import torch

from graphgen.ipc.worker_messages import Bucket, PageGroup
from graphgen.models.kv_cache import KVCache, bytes_per_page
from graphgen.models.page_layout import MOST_GROUPS, one_group, page_layout
from graphgen.models.spec import Layer, ModelSpec
from tests.fakes import READY
from tests.models import tiny

MiB = 2**20
LONG = 32_768
PAGE, CHUNK = 64, 2048


def spec_with(windows: list[int | None], num_kv_heads: int = 8, head_dim: int = 64) -> ModelSpec:
    """A model whose layers differ in their windows alone."""
    spec = tiny.spec_of(tiny.build("llama"))
    layer = spec.layers[0]

    def with_window(window: int | None) -> Layer:
        mixer = msgspec.structs.replace(
            layer.mixer, window=window, num_heads=num_kv_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
        )
        return msgspec.structs.replace(layer, mixer=mixer)

    return msgspec.structs.replace(spec, layers=tuple(with_window(window) for window in windows))


GEMMA3_12B = [1024 if (layer + 1) % 6 else None for layer in range(48)]
GEMMA3_27B = [1024 if (layer + 1) % 6 else None for layer in range(62)]
GPT_OSS_20B = [128 if layer % 2 == 0 else None for layer in range(24)]


@pytest.mark.parametrize(
    ("windows", "groups", "num_tensors"),
    [
        ([None] * 32, (None,), 32),
        ([4096] * 32, (4096,), 32),
        (GPT_OSS_20B, (None, 128), 12),
        (GEMMA3_12B, (None, *[1024] * 5), 8),
        (GEMMA3_27B, (None, *[1024] * 6), 10),
        ([None] * 28 + [512], (None, None, None, None, 512), 7),
        ([7, 5, 7, 5], (7, 5), 2),
    ],
)
def test_groups_have_one_window_and_as_many_layers(
    windows: list[int | None], groups: tuple[int | None, ...], num_tensors: int
) -> None:
    layout = page_layout(spec_with(windows).layers, LONG)
    assert (layout.windows, layout.num_tensors) == (groups, num_tensors)
    assert [layout.windows[group] for group in layout.groups] == windows
    places = list(zip(layout.groups, layout.places, strict=True))
    assert len(set(places)) == len(windows), "two layers of a group never share a tensor"


def test_a_window_beyond_the_context_is_none() -> None:
    assert page_layout(spec_with([4096, None]).layers, 4096) == one_group(2)
    assert page_layout(spec_with([4096, None]).layers, 4097).windows == (None, 4096)


def test_there_are_never_too_many_groups() -> None:
    for num_full in range(1, 20):
        for num_windowed in range(0, 60, 7):
            layout = page_layout(spec_with([None] * num_full + [9] * num_windowed).layers, LONG)
            assert len(layout.windows) <= MOST_GROUPS


def request_bytes(spec: ModelSpec, num_positions: int) -> int:
    """Of the pages that a request of so many positions holds."""
    layout = page_layout(spec.layers, 2 * num_positions)
    num_pages = sum(PageGroup(window).most_pages(num_positions, PAGE, CHUNK) for window in layout.windows)
    return num_pages * bytes_per_page(spec, layout, PAGE, "bfloat16")


@pytest.mark.parametrize(
    ("windows", "num_kv_heads", "head_dim", "mib", "mib_before"),
    [(GPT_OSS_20B, 8, 64, 820.5, 1536), (GEMMA3_12B, 8, 256, 3028, 12288)],
    ids=["gpt-oss-20b", "Gemma 3 12B"],
)
def test_a_request_of_32k_takes_so_many_bytes(
    windows: list[int | None], num_kv_heads: int, head_dim: int, mib: float, mib_before: float
) -> None:
    """With the chunks of its prompt, of which the longest has 2048 tokens; later a decode holds fewer."""
    spec = spec_with(windows, num_kv_heads, head_dim)
    assert LONG * spec.kv_bytes_per_token("bfloat16") == mib_before * MiB
    assert request_bytes(spec, LONG) == mib * MiB


def test_the_longest_request_fills_the_pages_and_no_more() -> None:
    """6 pages of 4 positions for all, and 4 for the window: one that it reaches, two of a chunk, one for a copy."""
    groups = (PageGroup(), PageGroup(5))
    ready = msgspec.structs.replace(
        READY.worker, num_pages=10, page_size=4, buckets=(Bucket(8, 2),), page_groups=groups
    )
    assert ready.most_positions(100) == 24
    assert ready.most_positions(20) == 20
    only_windows = msgspec.structs.replace(ready, num_pages=4, page_groups=(PageGroup(5),))
    assert only_windows.most_positions(10**6) == 10**6
    assert msgspec.structs.replace(only_windows, num_pages=3).most_positions(10**6) == 12


def test_layers_of_several_groups_write_to_one_tensor() -> None:
    spec = spec_with([None, 5, 5, None, 5, 5])
    layout = page_layout(spec.layers, LONG)
    cache = KVCache(spec, 3, 4, torch.float32, torch.device("cpu"), layout)
    assert cache.groups == (0, 1, 1, 0, 2, 2)
    assert len({pages.data_ptr() for pages in cache.k_pages}) == 2
    assert cache.num_bytes == 4 * bytes_per_page(spec, layout, 4, "float32")
    for pages in cache.k_pages:
        pages[0] += 1.0
    cache.copy_pages(torch.tensor([(0, 2)], dtype=torch.int32))
    assert torch.equal(cache.k_pages[5][2], torch.full_like(cache.k_pages[5][2], 3.0)), "three layers wrote to it"
