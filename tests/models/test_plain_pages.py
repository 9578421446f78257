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
    pages = kept_as(name, pages, with_plain=True)
    order, seen = iter(torch.randperm(NUM_PAGES).tolist()), set()
    tables = torch.full((len(CHUNKS) + 2, 8), NUM_PAGES, dtype=torch.int32)  # two entries are unused
    for chunk, (num_rows, kv_len) in enumerate(CHUNKS):
        for index in range(-(-kv_len // PAGE_SIZE)):
            tables[chunk, index] = next(order)
            if not window or (index + 1) * PAGE_SIZE > kv_len - num_rows + 1 - window:
                seen.add(int(tables[chunk, index]))
    lengths = torch.tensor([0, *(num_rows for num_rows, _ in CHUNKS), 0, 0])
    rows = Rows(lengths.cumsum(0).int(), torch.tensor([*(kv_len for _, kv_len in CHUNKS), 0, 0]).int(), tables)
    page_starts, flat_pages, _ = flatten_pages(rows.kv_lens, tables, PAGE_SIZE)
    plain_pages.fill_plain_pages(pages, rows, page_starts, flat_pages, window)
    kinds = (pages.k_plain, pages.k, pages.k_scales), (pages.v_plain, pages.v, pages.v_scales)
    for plain, stored, scales in kinds:
        assert plain is not None
        want = read(stored, scales)
        filled = [page for page in range(NUM_PAGES + 1) if not plain[page].isnan().all()]
        assert set(filled) == seen
        assert torch.equal(plain[filled], want[filled])
