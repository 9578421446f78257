"""Attention of the CPU outside a compiled graph: that it is attention, test_attention.py says; here what it costs."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from graphgen.models.attention import live
from graphgen.models.attention.live import LiveStep
from graphgen.models.attention.pages import take
from tests.models.attention_cases import Rules
from tests.models.test_attention import HEAD_DIM, PAGE_SIZE, make_step


def test_rows_are_looked_at_once_for_all_layers_that_see_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[list[int]] = []
    group = live._rows_of_similar_length

    def counted(kv_lens: Sequence[int], page_size: int) -> Iterator[tuple[list[int], int]]:
        looked_at.append(list(kv_lens))
        return group(kv_lens, page_size)

    monkeypatch.setattr(live, "_rows_of_similar_length", counted)
    made = make_step([(0, 5)], [3, 9, 30])
    step = LiveStep(made.tables, PAGE_SIZE)
    angles = torch.ones(len(made.q), HEAD_DIM), torch.zeros(len(made.q), HEAD_DIM)

    def layer(window: int) -> Tensor:
        variant = Rules(window=window).variant(HEAD_DIM)
        return step.attend(made.q, made.k, made.v, *angles, made.pages, variant)

    first = layer(0)
    assert torch.equal(layer(0), first)
    assert len(looked_at) == 1
    layer(2)
    layer(0)
    layer(2)
    assert len(looked_at) == 2, "a window has rows that see something else"


@pytest.mark.parametrize("position", [0, PAGE_SIZE - 1, PAGE_SIZE, 5 * PAGE_SIZE + 1])
def test_a_row_alone_reads_no_more_than_it_sees(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def counted(pages: Tensor, scales: Tensor | None, index: Tensor, dtype: torch.dtype) -> Tensor:
        taken.append(len(index))
        return take(pages, scales, index, dtype)

    monkeypatch.setattr(live, "take", counted)
    made = make_step([], [position], padded_prefill=0, padded_decodes=0)
    angles = torch.ones(1, HEAD_DIM), torch.zeros(1, HEAD_DIM)
    variant = Rules(window=PAGE_SIZE).variant(HEAD_DIM)
    LiveStep(made.tables, PAGE_SIZE).attend(made.q, made.k, made.v, *angles, made.pages, variant)
    first_seen = max(0, position - PAGE_SIZE + 1)
    assert taken == [position // PAGE_SIZE - first_seen // PAGE_SIZE + 1] * 2
