"""Prompt and output read as one sequence, wherever the border between them lies."""

from array import array
from itertools import combinations_with_replacement

import pytest

from graphgen.scheduler.tokens import Tokens

ALL = [5, 3, 8, 1, 9, 2]


@pytest.mark.parametrize("prompt_len", range(1, len(ALL) + 1))
def test_every_part_is_that_of_the_whole(prompt_len: int) -> None:
    tokens = Tokens(array("i", ALL[:prompt_len]))
    tokens.output.extend(ALL[prompt_len:])
    assert len(tokens) == len(ALL)
    for start, end in combinations_with_replacement(range(len(ALL) + 1), 2):
        assert tokens.part(start, end) == array("i", ALL[start:end])
