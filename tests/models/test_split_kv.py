"""The split-KV kernel in Triton's interpreter against the formula written out, in float64, for each way to score.

Needs Triton, not a GPU (CONTRIBUTING says how to run it where torch came without). Where a CUDA device is,
tests/gpu/test_split_kv_gpu.py runs the compiled kernel: Triton decides when it is imported whether it interprets, so
both cannot be had in one process. tests/conftest.py tells it to.
"""

import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from graphgen.models.attention.pages import LayerPages
from graphgen.models.rope import rotate
from tests.models.attention_cases import Rules, by_hand, rules
from tests.models.kept import FORMATS, convert_fp8_as_a_gpu_does, kept_as, read, read_back, splat_truth_values

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed; comes with torch for CUDA", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("tests/gpu/test_split_kv_gpu.py runs the compiled kernel", allow_module_level=True)

from graphgen.models.attention import split_kv
from graphgen.models.attention.store import rotate_and_store

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES = 6, 2, 16, 16, 40
WINDOW, SEGMENT = 21, 24  # over a page's edge, as a kernel's block is a page
# Around an edge of a page, of the window and of a segment; the shortest; one of many blocks.
KV_LENS = (1, 16, 17, WINDOW - 1, WINDOW, WINDOW + 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT, 2 * SEGMENT + 1, 130)


class Rows(NamedTuple):
    """Decode rows; K and V of all positions but their own lie in pages of NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    pages: LayerPages
    block_tables: Tensor
    kv_lens: Tensor
    histories: list[tuple[Tensor, Tensor]]  # of each row: [positions, Hkv, D], the rotated last one included


def make_rows(kv_lens: Sequence[int], heads: int = HEADS, kv_heads: int = KV_HEADS) -> Rows:
    torch.manual_seed(0)
    num_rows, width = len(kv_lens), -(-max(kv_lens) // PAGE_SIZE) + 1
    q, k, v = (torch.randn(num_rows, count, HEAD_DIM) for count in (heads, kv_heads, kv_heads))
    angles = torch.rand(num_rows, HEAD_DIM // 2).repeat(1, 2) * 6
    cos, sin = angles.cos(), angles.sin()
    pages = torch.full((2, NUM_PAGES + 1, PAGE_SIZE, kv_heads, HEAD_DIM), float("nan"))
    free = torch.randperm(NUM_PAGES).tolist()
    tables, histories = torch.full((num_rows, width), NUM_PAGES, dtype=torch.int32), []
    for row, kv_len in enumerate(kv_lens):
        table = [free.pop() for _ in range(-(-kv_len // PAGE_SIZE))]
        tables[row, : len(table)] = torch.tensor(table)
        past = torch.randn(2, kv_len - 1, kv_heads, HEAD_DIM)
        places = [table[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE for at in range(kv_len - 1)]
        pages.flatten(1, 2)[:, places] = past
        key = rotate(k[row : row + 1], cos[row : row + 1], sin[row : row + 1])
        histories.append((torch.cat((past[0], key)), torch.cat((past[1], v[row : row + 1]))))
    lens = torch.tensor(kv_lens, dtype=torch.int32)
    return Rows(q, k, v, cos, sin, LayerPages(*pages), tables, lens, histories)


def run(
    rows: Rows,
    rule: Rules,
    fresh: bool,
    temperatures: Tensor | None = None,
    head_norms: split_kv.HeadNorms | None = None,
    part_blocks: int | None = None,
) -> Tensor:
    """fresh: the kernel rotates and stores, as in a step without chunks; else rotate_and_store does. part_blocks: None
    has those that the lengths are shared out to."""
    num_rows, heads, head_dim = rows.q.shape
    kv_heads = rows.k.shape[1]
    workspace = split_kv.open_workspace(num_rows, heads, kv_heads, head_dim, rows.q.device)
    split_kv.share_out(rows.kv_lens, kv_heads, PAGE_SIZE, workspace)
    if part_blocks is not None:
        workspace.part_blocks.fill_(part_blocks)
    out = torch.full_like(rows.q, float("nan"))
    q, fresh_rows = rows.q, None
    if fresh:
        fresh_rows = split_kv.FreshRows(rows.k, rows.v, rows.cos, rows.sin, temperatures, head_norms)
    else:
        newest = rows.kv_lens.long() - 1
        pages = rows.block_tables.long().gather(1, newest[:, None] // PAGE_SIZE)[:, 0]
        locations = pages * PAGE_SIZE + newest % PAGE_SIZE
        inputs = rows.q, rows.k, rows.v, rows.cos, rows.sin, rows.pages, locations
        q = rotate_and_store(*inputs, torch.zeros_like(out), temperatures, chained=False)
    scoring = rule.scoring(head_dim)
    tables = rows.block_tables, rows.kv_lens
    split_kv.split_kv_attention(q, out, rows.pages, *tables, workspace, scoring, fresh_rows, chained=False)
    assert not workspace.finished.any(), "the next layer starts from zero"
    return out


def check(out: Tensor, rows: Rows, rule: Rules, temperatures: Tensor | None = None) -> None:
    q = rotate(rows.q, rows.cos, rows.sin)
    if temperatures is not None:
        q = q * temperatures[:, None, None]
    for row, (k, v) in enumerate(rows.histories):
        torch.testing.assert_close(out[row], by_hand(q[row], k, v, rule), rtol=2e-5, atol=2e-5)


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes the interpreter a millisecond or more. Long rows are still read in several parts."""
    monkeypatch.setattr(split_kv, "num_splits", lambda num_rows, num_kv_heads: (4, 1))


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    splat_truth_values(monkeypatch)
    convert_fp8_as_a_gpu_does(monkeypatch)


RULES = rules(HEADS, WINDOW, SEGMENT)


@pytest.mark.parametrize("name", RULES)
def test_fresh_rows_score_by_the_formula(name: str) -> None:
    rows = make_rows(KV_LENS)
    check(run(rows, RULES[name], fresh=True), rows, RULES[name])


@pytest.mark.parametrize("part_blocks", [1, 2, 3, 5, 9, 16])
def test_a_row_is_the_sum_of_its_parts_however_long_they_are(part_blocks: int) -> None:
    rows = make_rows(KV_LENS)
    for name in ("plain", "all"):  # one with a window, whose parts follow from that
        check(run(rows, RULES[name], fresh=False, part_blocks=part_blocks), rows, RULES[name])


@pytest.mark.parametrize(
    ("kv_lens", "blocks"),
    [
        ([2600] * 16, 10),  # 16 x 8 heads x 41 blocks: parts of 10 make 5 of a row, 640 in all
        ([1024] * 64, 8),  # more rows: twice that
        ([2600] * 32, 10),
        ([16000, *[500] * 15], 6),  # the long row is split into more parts than there would be of its own length alone
        ([1] * 8, 1),
        ([8192] * 256, 16),  # where the device is full anyway parts stay short: the last ones end sooner
        ([64] * 1025 + [65], 8),
    ],
)
def test_parts_of_all_rows_are_what_a_device_runs_at_once(kv_lens: list[int], blocks: int) -> None:
    workspace = split_kv.open_workspace(len(kv_lens), 32, 8, 16, torch.device("cpu"))
    split_kv.share_out(torch.tensor(kv_lens, dtype=torch.int32), 8, 64, workspace)
    assert workspace.part_blocks.item() == blocks


@pytest.mark.parametrize("name", ["plain", "all"])
def test_rows_beside_chunks_score_by_the_formula(name: str) -> None:
    rows = make_rows(KV_LENS)
    check(run(rows, RULES[name], fresh=False), rows, RULES[name])


@pytest.mark.parametrize("fresh", [True, False])
def test_temperatures_multiply_the_query_of_their_row(fresh: bool) -> None:
    rows = make_rows((1, 17, 40))
    factors = torch.tensor([0.5, 1.0, 2.5])
    check(run(rows, Rules(), fresh, factors), rows, Rules(), factors)


def test_heads_are_normed_before_they_turn() -> None:
    """Each with the one weight of the queries or of the keys, the stored key too."""
    rows, weights, eps = make_rows((1, 17, 40)), torch.randn(2, HEAD_DIM), 1e-2

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, (HEAD_DIM,), weight, eps)

    keys = rotate(normed(rows.k, weights[1]), rows.cos, rows.sin)
    histories = [(torch.cat((k[:-1], keys[row, None])), v) for row, (k, v) in enumerate(rows.histories)]
    norms = split_kv.HeadNorms(weights[0], weights[1], eps)
    out = run(rows, Rules(), fresh=True, head_norms=norms)
    check(out, rows._replace(q=normed(rows.q, weights[0]), histories=histories), Rules())


@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 1), (17, 1), (40, 2)])
def test_any_number_of_heads_may_share_keys(heads: int, kv_heads: int) -> None:
    rows, rule = make_rows((3, 70), heads, kv_heads), rules(heads, WINDOW, SEGMENT)["all"]
    check(run(rows, rule, fresh=True), rows, rule)


@pytest.mark.parametrize("sink", [float("-inf"), -200.0, 200.0])
def test_sinks_far_from_all_scores_take_nothing_or_all(sink: float) -> None:
    rows, rule = make_rows((5, 70)), Rules(sinks=torch.full((HEADS,), sink))
    out = run(rows, rule, fresh=True)
    check(out, rows, Rules() if sink < 0 else Rules(sinks=torch.full((HEADS,), 200.0)))
    assert out.isfinite().all()


# --- quantised pages -------------------------------------------------------------------------------------------


def quantised(rows: Rows, name: str) -> Rows:
    """The same rows over pages of a format: what a row sees is what is read from there, its own position too."""
    histories = [read_back(name, *history) for history in rows.histories]
    return rows._replace(pages=kept_as(name, rows.pages), histories=histories)


@pytest.mark.parametrize("rule", ["plain", "softcap", "all"])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_quantised_pages_are_read_as_they_were_stored(name: str, fresh: bool, rule: str) -> None:
    rows = quantised(make_rows(KV_LENS[-4:]), name)
    check(run(rows, RULES[rule], fresh), rows, RULES[rule])


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_stored_alike_alone_and_beside_chunks_and_as_torch_does(name: str) -> None:
    """To the last bit: a request's pages do not tell with what else it was computed."""
    stored = []
    for fresh in (True, False):
        rows = quantised(make_rows((5, 17, 40)), name)
        run(rows, Rules(), fresh)
        stored.append(rows)
    for row, kv_len in enumerate((5, 17, 40)):
        page, offset = divmod(kv_len - 1, PAGE_SIZE)
        place = int(stored[0].block_tables[row, page]), offset
        for rows in stored:
            own = (read(rows.pages.k, rows.pages.k_scales)[place], read(rows.pages.v, rows.pages.v_scales)[place])
            for got, want in zip(own, rows.histories[row], strict=True):
                assert torch.equal(got, want[-1])


@pytest.mark.parametrize("fresh", [True, False])
def test_values_beyond_the_range_of_fp8_are_clamped(fresh: bool) -> None:
    rows = make_rows((5, 17))
    far = rows._replace(v=rows.v * 1e4)
    far = quantised(far._replace(histories=[(k, v * 1e4) for k, v in rows.histories]), "fp8")
    out = run(far._replace(pages=kept_as("fp8", LayerPages(rows.pages.k, rows.pages.v * 1e4))), Rules(), fresh)
    assert out.isfinite().all()
    check(out, far, Rules())
