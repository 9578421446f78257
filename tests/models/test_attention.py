"""The `torch` attention backend, on both of its paths, against attention written out row by row."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.reference import TorchStep, all_rows, write_kv
from graphgen.models.attention.tables import RowTables
from tests.models.attention_cases import Rules, by_hand, rules

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES = 6, 2, 8, 4, 64


class Step(NamedTuple):
    """Arguments of the operator, and of every live row the K and V of the positions before it and its own."""

    q: Tensor
    k: Tensor
    v: Tensor
    pages: LayerPages
    tables: RowTables
    histories: dict[int, tuple[Tensor, Tensor]]


def make_step(
    chunks: list[tuple[int, int]], decodes: list[int], padded_prefill: int = 3, padded_decodes: int = 2
) -> Step:
    """chunks: (start, length) each. decodes: positions. Pages hold NaN wherever nothing was written."""
    torch.manual_seed(0)
    pages = torch.full((2, NUM_PAGES + 1, PAGE_SIZE, KV_HEADS, HEAD_DIM), float("nan"))
    free = torch.randperm(NUM_PAGES).tolist()
    num_prefill = sum(length for _, length in chunks) + padded_prefill
    num_rows = num_prefill + len(decodes) + padded_decodes
    width = max([start + length for start, length in chunks] + [at + 1 for at in decodes] + [1]) // PAGE_SIZE + 2
    locations = torch.full((num_rows,), NUM_PAGES * PAGE_SIZE)
    kv = torch.randn(2, num_rows, KV_HEADS, HEAD_DIM)
    histories: dict[int, tuple[Tensor, Tensor]] = {}

    def place(start: int, length: int, first_row: int) -> list[int]:
        table = [free.pop() for _ in range(-(-(start + length) // PAGE_SIZE))]
        past = torch.randn(2, start, KV_HEADS, HEAD_DIM)
        where = [table[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE for at in range(start + length)]
        pages.flatten(1, 2)[:, where[:start]] = past
        locations[first_row : first_row + length] = torch.tensor(where[start:])
        for row in range(first_row, first_row + length):
            k, v = torch.cat((past, kv[:, first_row : row + 1]), dim=1)
            histories[row] = (k, v)
        return table + [free[0]] * (width - len(table))  # filled up with a page of nobody, which holds NaN

    starts, chunk_tables = [0], []
    for start, length in chunks:
        chunk_tables.append(place(start, length, starts[-1]))
        starts.append(starts[-1] + length)
    decode_tables = [place(at, 1, num_prefill + row) for row, at in enumerate(decodes)]
    trash = [NUM_PAGES] * width
    tables = RowTables(
        kv_locations=locations,
        chunk_starts=torch.tensor([*starts, starts[-1]], dtype=torch.int32),
        chunk_kv_lens=torch.tensor([sum(chunk) for chunk in chunks] + [0], dtype=torch.int32),
        chunk_pages=torch.tensor([*chunk_tables, trash], dtype=torch.int32),
        decode_kv_lens=torch.tensor([at + 1 for at in decodes] + [1] * padded_decodes, dtype=torch.int32),
        decode_pages=torch.tensor(decode_tables + [trash] * padded_decodes, dtype=torch.int32).view(-1, width),
    )
    return Step(torch.randn(num_rows, HEADS, HEAD_DIM), kv[0], kv[1], LayerPages(*pages), tables, histories)


def attend(step: Step, rule: Rules, path: str = "live rows", temperatures: Tensor | None = None) -> Tensor:
    """With angles of zero: the rotation is tested through whole models."""
    if path == "static shapes":
        write_kv(step.pages, step.k, step.v, step.tables.kv_locations)
        return all_rows(step.q, step.pages, step.tables, rule.scoring(HEAD_DIM))
    ones, zeros = (make(len(step.q), HEAD_DIM, device=step.q.device) for make in (torch.ones, torch.zeros))
    variant = rule.variant(HEAD_DIM)
    return TorchStep(step.tables).attend(step.q, step.k, step.v, ones, zeros, step.pages, variant, temperatures)


def check(out: Tensor, step: Step, rule: Rules) -> None:
    for row, (k, v) in step.histories.items():
        torch.testing.assert_close(out[row], by_hand(step.q[row], k, v, rule), rtol=1e-5, atol=1e-5)


STEPS = {
    "chunks_and_decodes": ([(0, 9), (5, 6), (11, 1), (4, 4)], [0, 3, 4, 30, 17]),
    "chunks_only": ([(0, 1), (0, 12)], []),
    "decodes_only": ([], [7, 8, 0, 40]),
    "nothing_live": ([], []),
}


PATHS = pytest.mark.parametrize("path", ["live rows", "static shapes"])


@pytest.mark.parametrize("window", [0, 1, 3, 8, 100])
@pytest.mark.parametrize("name", STEPS)
@PATHS
def test_every_row_sees_its_own_positions_only(path: str, name: str, window: int) -> None:
    step, rule = make_step(*STEPS[name]), Rules(window=window)
    out = attend(step, rule, path)
    check(out, step, rule)
    num_prefill = len(out) - len(step.tables.decode_kv_lens)
    padding = [row for row in range(num_prefill) if row not in step.histories]
    assert padding
    assert (out[padding] == 0).all()
    assert out.isfinite().all()


RULES = rules(HEADS, window=5, segment=6)  # within a page of four, across its edge, and beyond


@pytest.mark.parametrize("name", RULES)
@PATHS
def test_rows_at_every_distance_from_an_edge_score_by_the_formula(path: str, name: str) -> None:
    step = make_step([(0, 14), (9, 5), (17, 1), (4, 4)], [0, 3, 4, 5, 6, 11, 12, 13, 40])
    out = attend(step, RULES[name], path)
    check(out, step, RULES[name])
    assert out.isfinite().all()


def test_temperatures_multiply_the_query_of_their_row() -> None:
    step = make_step(*STEPS["chunks_and_decodes"])
    factors = torch.linspace(0.5, 3.0, len(step.q))
    out = attend(step, Rules(), temperatures=factors)
    check(out, step._replace(q=step.q * factors[:, None, None]), Rules())


@PATHS
@pytest.mark.parametrize("name", ["plain", "all"])
def test_long_chunks_are_worked_through_in_blocks_of_rows(path: str, name: str) -> None:
    step = make_step([(3, 150), (0, 20)], [5])
    out = attend(step, RULES[name], path)
    for row in (0, 63, 64, 127, 128, 149, 150, 169):
        wanted = by_hand(step.q[row], *step.histories[row], RULES[name])
        torch.testing.assert_close(out[row], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("prefill", "decodes"), [(0, 2), (5, 0)])
def test_a_region_may_be_empty(prefill: int, decodes: int) -> None:
    step = make_step([(2, prefill)] if prefill else [], [9] * decodes, padded_prefill=0, padded_decodes=0)
    for rule in (Rules(), Rules(window=4), RULES["all"]):
        out = attend(step, rule)
        assert len(out) == prefill + decodes == len(step.histories)
        check(out, step, rule)


def test_writes_only_the_positions_of_its_rows() -> None:
    step = make_step([(0, 5)], [6])
    before = step.pages.k.clone()
    attend(step, Rules())
    live = step.tables.kv_locations
    torch.testing.assert_close(step.pages.k.flatten(0, 1)[live[:5]], step.k[:5])
    untouched = torch.ones(before.shape[:2].numel(), dtype=torch.bool)
    untouched[live] = False
    same = (step.pages.k == before) | (step.pages.k.isnan() & before.isnan())
    assert same.flatten(0, 1)[untouched].all()


def test_tracing_knows_the_shape_and_dtype_of_the_result() -> None:
    step = make_step([(0, 5)], [6])
    q, k, v = (tensor.to("meta") for tensor in step[:3])
    pages = LayerPages(step.pages.k.to("meta"), step.pages.v.to("meta"))
    tables = RowTables(*(tensor.to("meta") for tensor in step.tables))
    out = attend(Step(q.to(torch.bfloat16), k, v, pages, tables, {}), Rules())
    assert (out.device.type, out.shape, out.dtype) == ("meta", step.q.shape, torch.bfloat16)
