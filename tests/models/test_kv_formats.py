"""Quantised keys and values in torch: sizes, arithmetic, and that what else is in a step changes no result."""

from pathlib import Path

import pytest
import torch

from graphgen.capture.memory import pages_that_fit
from graphgen.ipc.errors import ConfigError
from graphgen.launch.config import EngineConfig
from graphgen.launch.resolve import resolve
from graphgen.models.attention.pages import LayerPages
from graphgen.models.families import load_spec
from graphgen.models.kv_cache import KVCache, bytes_per_page
from graphgen.models.loader import load_decoder
from graphgen.models.page_layout import page_layout
from graphgen.models.spec import kv_format
from tests.models import tiny
from tests.models.driver import Driver
from tests.models.kept import FORMATS, head_scales, kept_as, read, read_back
from tests.models.splits import run_mixed, tokens

CPU = torch.device("cpu")
SHAPE = Path(__file__).parents[2] / "benchmarks" / "shapes" / "llama-3.1-8b"


# --- sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "least"), [("fp8", 2.0), ("int8", 1.9)])
def test_the_same_memory_holds_about_twice_the_tokens(name: str, least: float) -> None:
    """As the worker counts it, for the layers of Llama 3.1 8B on the CPU."""
    spec = load_spec(SHAPE)
    layout = page_layout(spec.layers, 8192)
    pages = {
        kept: pages_that_fit(16 * 2**30, bytes_per_page(spec, layout, 64, kept), wanted_pages=10**9, least_pages=1)
        for kept in ("bfloat16", name)
    }
    assert pages["bfloat16"] == 2048
    assert least * 2048 <= pages[name] <= 2.0 * 2048


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", ["qwen3", "qwen2_window"])
def test_a_cache_takes_the_memory_that_is_counted_and_copies_whole_pages(case: str, name: str) -> None:
    spec = tiny.spec_of(tiny.build(case))
    layout = page_layout(spec.layers, 64)
    cache = KVCache(spec, 7, 4, torch.float32, CPU, layout, kept_as=name)
    assert cache.num_bytes == 8 * bytes_per_page(spec, layout, 4, name)
    noise = kept_as(name, LayerPages(*torch.randn(2, 8, *cache.pages[0].k.shape[1:])))
    for pages in cache.pages:
        for tensor, values in zip(pages, noise, strict=True):
            if tensor is not None and values is not None and tensor.ndim > 1:
                tensor.view(torch.uint8).copy_(values.view(torch.uint8))
    before = [(read(pages.k, pages.k_scales), read(pages.v, pages.v_scales)) for pages in cache.pages]
    cache.copy_pages(torch.tensor([(0, 3), (6, 1), (5, 5), (0, 4)], dtype=torch.int32))
    for pages, (k, v) in zip(cache.pages, before, strict=True):
        assert torch.equal(read(pages.k, pages.k_scales), k[[0, 6, 2, 0, 0, 5, 6, 7]])
        assert torch.equal(read(pages.v, pages.v_scales), v[[0, 6, 2, 0, 0, 5, 6, 7]])
    cache.fill_with_noise(3)
    assert all(read(pages.k, pages.k_scales)[:3].std() > 0.3 for pages in cache.pages)
    cache.clear(3)
    assert not any(read(pages.k, pages.k_scales)[:3].any() for pages in cache.pages)


# --- arithmetic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(("name", "error"), [("fp8", 1 / 16), ("int8", 1 / 254)])
def test_what_is_read_is_what_was_stored_within_the_formats_step(name: str, error: float, size: float) -> None:
    """fp8: half a step of three bits of mantissa, between its smallest and its largest number. int8: half a step of
    127 to the largest value of the head."""
    k, v = size * torch.randn(2, 50, 3, 16)
    for scales, values, got in zip(head_scales(3), (k, v), read_back(name, k, v), strict=True):
        assert got.isfinite().all()
        if name == "int8":
            limit = values.abs().amax(-1, keepdim=True).expand(values.shape)
        else:
            most = 448 * scales[:, None]
            values = values.clamp(-most, most)
            limit = values.abs().clamp(min=2**-6 * scales[:, None])
        assert ((got - values).abs() <= limit * error * (1 + 1e-5)).all()


def test_zeros_are_read_as_zeros() -> None:
    zeros = torch.zeros(5, 3, 16)
    for name in FORMATS:
        assert not any(part.any() for part in read_back(name, zeros, zeros))


# --- steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["qwen3_window", "llama"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_else_is_in_a_step_changes_no_logit(name: str, case: str, tmp_path: Path) -> None:
    """Prompts in any chunks, beside any others and any decodes, over pages computed before. In float64: a difference
    of float32's size would now and then round a key to the next number of its format."""
    tiny.save(case, tmp_path)
    decoder = load_decoder(tmp_path, load_spec(tmp_path), torch.float64, CPU)
    prompts = [tokens(length, seed=length) for length in (70, 33, 1, 16)]
    alone = Driver(decoder, kept_as=name)
    wants = [alone.step([(alone.request(prompt), len(prompt))])[0] for prompt in prompts]
    plain = Driver(decoder)
    difference = plain.step([(plain.request(prompts[0]), 70)])[0] - wants[0]
    assert difference.abs().max() > 1e-4, "the format was not used"
    for seed in range(6):
        driver = Driver(decoder, seed=seed, kept_as=name)
        requests = [driver.request(prompt) for prompt in prompts]
        for want, got in zip(wants, run_mixed(driver, requests, seed), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            assert torch.equal(got.argmax(-1), want.argmax(-1))
        again = driver.request(prompts[0])  # the first 40 positions are another request's pages, as of a prefix cache
        again.pages[: 40 // driver.kv_cache.page_size] = requests[0].pages[: 40 // driver.kv_cache.page_size]
        again.num_computed = 40
        torch.testing.assert_close(driver.step([(again, 30)])[0], wants[0][40:], rtol=1e-5, atol=1e-5)


# --- choices ---------------------------------------------------------------------------------------------------


def launch_format(case: str, **settings: object) -> str:
    spec = tiny.spec_of(tiny.build(case))
    return resolve(EngineConfig(device="cpu", **settings), spec, Path()).kv_format  # type: ignore[arg-type]  # a test's


def test_the_format_is_the_dtype_unless_another_is_asked_for() -> None:
    assert launch_format("llama") == "float32"
    assert launch_format("llama", dtype="bfloat16") == "bfloat16"
    assert launch_format("llama", kv_cache_dtype="float32") == "float32"
    assert launch_format("llama", kv_cache_dtype="fp8") == "fp8"
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'bfloat16', dtype is 'float32'"):
        launch_format("llama", kv_cache_dtype="bfloat16")
    with pytest.raises(ConfigError, match="'fp8', this DeepseekV3ForCausalLM has latent attention"):
        launch_format("deepseek_v3", kv_cache_dtype="fp8")
    with pytest.raises(ConfigError, match="KV format is 'fp4', supported are float32, bfloat16, float16, fp8, int8"):
        kv_format("fp4")
