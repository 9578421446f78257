"""The kernel that reads quantised pages for chunks, in Triton's interpreter. See test_split_kv.py."""

import importlib.util

import pytest
import torch

from tests.models.kept import FORMATS, kept_as, read

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed; comes with torch for CUDA", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("tests/gpu/test_attention_gpu.py runs the compiled kernel", allow_module_level=True)

from graphgen.models.attention import plain_pages
from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.ragged import flatten_pages
from graphgen.models.attention.row_tiles import Rows

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
