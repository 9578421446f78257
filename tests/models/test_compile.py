"""A compiled layer: one graph of each half for all layers and shapes, the same logits, no copy of the KV cache."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from graphgen.models.decoder import Decoder
from graphgen.models.families import load_spec
from graphgen.models.loader import load_decoder
from tests.models import tiny
from tests.models.driver import Driver
from tests.models.quick_compiler import quick_compiler

PROMPT = list(range(3, 73))
NUM_PAGES = 93  # a number no other size has, to be found in generated code


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with quick_compiler():
        yield
    torch._dynamo.reset()


def load(case: str, folder: Path) -> Decoder:
    tiny.save(case, folder)
    return load_decoder(folder, load_spec(folder), torch.float32, torch.device("cpu"))


def run_every_shape(decoder: Decoder, one_row_first: bool = False) -> torch.Tensor:
    """Logits of steps of many shapes: T = 1, 2, 7, 64, each region empty, narrow and wide block tables."""
    bare, padded = Driver(decoder, padded_rows=0, num_pages=NUM_PAGES), Driver(decoder, num_pages=NUM_PAGES - 8)
    logits = []
    for driver in (bare, padded) if one_row_first else (padded, bare):
        request, short = driver.request(PROMPT), driver.request(PROMPT[:9])
        logits += driver.step([(request, 1)])
        logits += driver.step([(request, 2), (short, 5)])
        logits += driver.step(decodes=[request])
        logits += driver.step(decodes=[short, request])
        logits += driver.step([(request, 63)], [short])
    wide = Driver(decoder, page_size=4, num_pages=120, padded_rows=0)
    logits += wide.step([(wide.request(PROMPT * 4), 64)])
    return torch.cat(logits)


@pytest.mark.parametrize("one_row_first", [True, False])
def test_one_graph_of_each_half_serves_all_layers_and_shapes(one_row_first: bool, tmp_path: Path) -> None:
    decoder = load("llama", tmp_path)
    eager = run_every_shape(decoder, one_row_first)
    assert decoder.num_compiled_graphs() == 0
    decoder.compile_layers()
    compiled = run_every_shape(decoder, one_row_first)
    assert decoder.num_compiled_graphs() == 2
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    assert torch.equal(compiled.argmax(-1), eager.argmax(-1))


def test_layers_of_different_windows_share_their_graphs(tmp_path: Path) -> None:
    decoder = load("qwen3_window", tmp_path)
    assert len(set(decoder.spec.windows)) == 2
    eager = run_every_shape(decoder)
    decoder.compile_layers()
    torch.testing.assert_close(run_every_shape(decoder), eager, rtol=1e-4, atol=1e-4)
    assert decoder.num_compiled_graphs() == 2


def test_each_kind_of_feed_forward_is_one_graph_more(tmp_path: Path) -> None:
    decoder = load("qwen2_moe", tmp_path)
    eager = run_every_shape(decoder)
    decoder.compile_layers()
    torch.testing.assert_close(run_every_shape(decoder), eager, rtol=1e-4, atol=1e-4)
    assert decoder.num_compiled_graphs() == 3


def test_generated_code_never_allocates_or_copies_pages(tmp_path: Path) -> None:
    decoder = load("llama", tmp_path)
    decoder.compile_layers()
    driver = Driver(decoder, num_pages=NUM_PAGES)
    request = driver.request(PROMPT)
    _, codes = run_and_get_code(lambda: driver.step([(request, 7)]))
    with_attention, without = sorted(codes, key=lambda code: "paged_attention_torch" not in code)
    assert "paged_attention_torch" not in without
    body = re.search(r"def call\(self, args\):.*?return \(", with_attention, re.DOTALL)
    assert body is not None
    code = body.group()
    call = re.search(r"paged_attention_torch\.default\(.*?, arg\w+, arg\w+, (arg\w+), (arg\w+), arg", code)
    assert call is not None, "the pages reach the operator as they came in"
    for pages in call.groups():
        uses = [line.strip() for line in code.splitlines() if re.search(rf"\b{pages}\b", line)]
        # From torch 2.14 on the sizes of several inputs are asserted in one call.
        allowed = (f"assert_size_stride({pages},", "assert_size_stride_grouped(", f"del {pages}", "buf", "arg0_1, ")
        assert all(use.startswith(allowed) for use in uses), uses
        assert sum(use.startswith("buf") for use in uses) == 1, uses  # the operator's own line
    page_size, num_heads, head_dim = driver.kv_cache.k_pages[0].shape[1:]
    num_pages = set(re.findall(rf"\((u\d+), {page_size}, {num_heads}, {head_dim}\)", code))
    assert num_pages, "the generated code knows the caches by symbols"
    allocations = re.findall(r"empty_strided\w*\(.*", code)
    assert allocations
    assert not [line for line in allocations if num_pages & set(re.findall(r"\w+", line))]


NUM_GRAPHS = {
    **dict.fromkeys(("smollm3", "gpt2", "stablelm_parallel", "opt_350m", "cohere", "hunyuan"), 2),
    **dict.fromkeys(("gemma3", "bloom", "ministral3"), 2),
    "deepseek_v3": 3,  # latent attention, a dense feed-forward, experts
    "llama4": 3,  # layers that rotate norm their heads, the others have a temperature
}


@pytest.mark.parametrize("case", NUM_GRAPHS)
def test_layers_of_one_kind_share_their_graphs(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs by layer in number, as rotation, window and scale, compiles nothing anew."""
    eager = torch._dynamo.lookup_backend("eager")
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: eager)
    decoder = load(case, tmp_path)
    decoder.compile_layers()
    driver = Driver(decoder, num_pages=NUM_PAGES)
    request, other = driver.request(PROMPT), driver.request(PROMPT[:9])
    driver.step([(request, 60)])
    driver.step([(other, 9)], [request])
    driver.step(decodes=[request])
    assert decoder.num_compiled_graphs() == NUM_GRAPHS[case]
