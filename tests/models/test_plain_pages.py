"""The kernel that reads quantised pages for chunks, in Triton's interpreter. See test_split_kv.py."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graphgen.models.attention.tables import RowTables
from graphgen.models.attention.variant import Scoring
from graphgen.models.families import load_spec
from graphgen.models.loader import load_decoder
from tests.models import tiny
from tests.models.driver import Driver
from tests.models.kept import FORMATS, convert_fp8_as_a_gpu_does, kept_as, read, splat_truth_values
from tests.models.splits import run_mixed, tokens

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed; comes with torch for CUDA", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("tests/gpu/test_attention_gpu.py runs the compiled kernel", allow_module_level=True)

from graphgen.models.attention import flashinfer, plain_pages, split_kv
from graphgen.models.attention.kernels import Kernel
from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.planned import PlannedTensors, no_requests
from graphgen.models.attention.ragged import flatten_pages
from graphgen.models.attention.row_tiles import Rows, TileShape, attend_in_tiles
from graphgen.models.attention.row_tiles import open_workspace as open_tiles

PAGE_SIZE, NUM_PAGES, HEADS, HEAD_DIM = 16, 30, 3, 16
CHUNKS = ((5, 5), (16, 48), (1, 33), (7, 100))  # (rows, positions that the last sees)


@pytest.mark.parametrize("window", [0, 1, 16, 17, 1000])
@pytest.mark.parametrize("name", FORMATS)
def test_pages_that_a_chunk_sees_are_read_and_no_others(
    name: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_pages, "_ELEMENTS", 32 * HEAD_DIM)  # a part that divides no page evenly
    torch.manual_seed(0)
    pages = LayerPages(*torch.randn(2, NUM_PAGES + 1, PAGE_SIZE, HEADS, HEAD_DIM))
    pages = kept_as(name, pages)
    order = iter(torch.randperm(NUM_PAGES).tolist())
    places: dict[int, int] = {}  # of a plain page: the page that is read to it
    tables = torch.full((len(CHUNKS) + 2, 8), NUM_PAGES, dtype=torch.int32)  # two entries are unused
    count = 0
    for chunk, (num_rows, kv_len) in enumerate(CHUNKS):
        for index in range(-(-kv_len // PAGE_SIZE)):
            tables[chunk, index] = next(order)
            if not window or (index + 1) * PAGE_SIZE > kv_len - num_rows + 1 - window:
                places[count] = int(tables[chunk, index])
            count += 1
    lengths = torch.tensor([0, *(num_rows for num_rows, _ in CHUNKS), 0, 0])
    rows = Rows(lengths.cumsum(0).int(), torch.tensor([*(kv_len for _, kv_len in CHUNKS), 0, 0]).int(), tables)
    page_starts, flat_pages, _ = flatten_pages(rows.kv_lens, tables, PAGE_SIZE)
    plain = torch.full((2, count + 3, PAGE_SIZE, HEADS, HEAD_DIM), torch.nan)
    plain_pages.fill_plain_pages(plain, pages, rows, page_starts, flat_pages, window)
    for got, want in zip(plain, (read(pages.k, pages.k_scales), read(pages.v, pages.v_scales)), strict=True):
        assert {place for place in range(len(got)) if not got[place].isnan().all()} == set(places)
        for place, page in places.items():
            assert torch.equal(got[place], want[page])


def attend_over_places(
    kernel: Kernel, q: Tensor, out: Tensor, k_pages: Tensor, v_pages: Tensor, tensors: PlannedTensors, scoring: Scoring
) -> None:
    """What a planned kernel does, by row tiles: the pages of each chunk are where `plain_places` says."""
    places, begins = tensors.plain_places, tensors.page_starts.tolist()
    counts = [end - begin for begin, end in itertools.pairwise(begins)]
    tables = torch.zeros(len(counts), max(counts) + 1, dtype=torch.int32)
    for chunk, (begin, count) in enumerate(zip(begins, counts, strict=False)):
        tables[chunk, :count] = places[begin : begin + count]
    lens = torch.tensor([max(count - 1, 0) * PAGE_SIZE for count in counts], dtype=torch.int32) + tensors.last_lens
    shape = TileShape(q.shape[1], k_pages.shape[2], q.shape[2], 0)
    workspace = open_tiles(shape, len(q), len(counts), False, q.device)
    rows = Rows(tensors.starts, lens, tables)
    attend_in_tiles(q, out, LayerPages(k_pages, v_pages), rows, shape, workspace, scoring)


@pytest.mark.parametrize("chunks", [Kernel.FA3, Kernel.TILES])
@pytest.mark.parametrize("name", FORMATS)
def test_a_model_over_quantised_pages_gives_the_logits_of_the_torch_backend(
    name: str, chunks: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashInfer's operator with our kernels, and plain pages read by a stand-in for FA3."""
    convert_fp8_as_a_gpu_does(monkeypatch)
    splat_truth_values(monkeypatch)
    monkeypatch.setattr(flashinfer, "run_beside", lambda chunks, decodes: (decodes(), chunks()))
    monkeypatch.setattr(flashinfer, "can_chain", lambda: False)
    monkeypatch.setattr(flashinfer, "run_planned", attend_over_places)
    monkeypatch.setattr(split_kv, "num_splits", lambda num_rows, num_kv_heads: (4, 1))
    library = torch.library.Library("graphgen", "IMPL")
    library.impl("paged_attention_flashinfer", flashinfer._paged_attention, "CPU")
    tiny.save("llama", tmp_path, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    decoder = load_decoder(tmp_path, load_spec(tmp_path), torch.float32, torch.device("cpu"))
    mixer = decoder.spec.attention
    sizes = mixer.num_heads, mixer.num_kv_heads, mixer.width
    kernels = torch.tensor([chunks, Kernel.SPLIT_KV])
    decode = split_kv.open_workspace(16, *sizes, torch.device("cpu"))
    plain = torch.full((2, 40, PAGE_SIZE, *sizes[1:]), torch.nan)

    def step(tables: RowTables) -> flashinfer.FlashInferStep:
        if chunks is Kernel.TILES:
            tiles = open_tiles(TileShape(*sizes, 0), 128, 16, False, torch.device("cpu"))
            return flashinfer.FlashInferStep(tables, kernels, tiles, decode)
        _, page_starts, flat, last_lens, _ = no_requests(1, torch.device("cpu"))
        if len(tables.chunk_kv_lens):
            page_starts, flat, last_lens = flatten_pages(tables.chunk_kv_lens, tables.chunk_pages, PAGE_SIZE)
        places = torch.arange(len(flat), dtype=torch.int32).clamp(max=39)
        nothing = torch.empty(0)
        unused = (nothing, nothing, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64))
        planned = PlannedTensors(tables.chunk_starts, page_starts, flat, last_lens, *unused, plain, places)
        return flashinfer.FlashInferStep(tables, kernels, planned, decode)

    prompts = [tokens(20), tokens(5, seed=1)]
    wants, gots = (
        run_mixed(driver, [driver.request(prompt) for prompt in prompts], seed=0)
        for driver in (
            Driver(decoder, PAGE_SIZE, kept_as=name),
            Driver(decoder, PAGE_SIZE, kept_as=name, attention=step),
        )
    )
    for got, want in zip(gots, wants, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
