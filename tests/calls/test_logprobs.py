"""Log-probabilities as a sequence."""

import struct

import pytest

from graphgen.calls.logprobs import Logprobs

VALUES = struct.pack("<fIfIfI", -0.5, 1, -1.0, 2, -1.5, 3)
THREE = Logprobs(0, (7, 8, 9), VALUES, (b"a", b"b", b"c"))


@pytest.mark.parametrize("part", [slice(2), slice(1, None), slice(None, None, -1), slice(-2, 9), slice(3, 1)])
def test_a_slice_has_what_one_of_a_list_has(part: slice) -> None:
    assert THREE[part] == list(THREE)[part]


@pytest.mark.parametrize("place", [-4, 3])
def test_a_place_outside_is_none(place: int) -> None:
    with pytest.raises(IndexError, match="of 3 log-probabilities"):
        THREE[place]
