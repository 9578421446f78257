"""The pages that a step's chunks may see together."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from graphgen.scheduler.shares import PromptShares
from tests.scheduler.harness import make_limits

PAGE = 4


class Prompt:
    """What is asked of a RunningRequest."""

    def __init__(self, computed: int, missing: int, is_long: bool = False) -> None:
        self.request = SimpleNamespace(is_scored=False)
        self.num_prefilled, self.num_missing, self.is_long = computed, missing, is_long


def lengths(begun: Sequence[Any], room: int, max_chunk_pages: int | None) -> list[int]:
    limits = make_limits(page_size=PAGE, max_chunks=8, max_chunk_pages=max_chunk_pages)
    shares = PromptShares(room, limits, 0, SimpleNamespace())  # type: ignore[arg-type]  # others wait: no budget is asked
    shares.give_begun(begun, others_wait=True)
    shares.give_rest()
    given = dict(shares.items())
    return [given.get(one, 0) for one in begun]


@pytest.mark.parametrize(
    ("max_chunk_pages", "want"),
    [
        (None, [3, 2, 5, 1]),
        (16, [3, 2, 5, 1]),  # 5 + 2 + 8 + 1 pages
        (15, [3, 2, 5, 0]),
        (14, [3, 2, 0, 1]),
        (8, [3, 2, 0, 1]),
        (7, [3, 2, 0, 0]),
        (5, [3, 0, 0, 0]),
    ],
)
def test_chunks_see_no_more_pages_together_than_they_may(max_chunk_pages: int | None, want: list[int]) -> None:
    begun = [Prompt(17, 3), Prompt(5, 2), Prompt(27, 5), Prompt(0, 1)]
    assert lengths(begun, 20, max_chunk_pages) == want


@pytest.mark.parametrize("max_chunk_pages", [16, 7, 6, 5])
def test_a_long_prompt_that_gets_rows_only_at_the_end_is_counted_too(max_chunk_pages: int) -> None:
    begun = [Prompt(0, 16, is_long=True), Prompt(4, 16, is_long=True), Prompt(0, 1)]
    given = lengths(begun, 16, max_chunk_pages)
    seen = [-(-(one.num_prefilled + length) // PAGE) for one, length in zip(begun, given, strict=True) if length]
    assert given[0] > 0
    assert sum(seen) <= max_chunk_pages
