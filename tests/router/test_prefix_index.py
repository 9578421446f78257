"""The index against brute force, and what it costs."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from graphgen.router.prefix_index import PrefixIndex
from tests.router.engines import digests

PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=70)
"""Of two kinds of pages, so that many begin alike; some are longer than what is looked at page by page."""


def brute_force(kept: dict[int, set[bytes]], prompt: tuple[bytes, ...]) -> dict[int, int]:
    """How many of the prompt's first pages each engine keeps."""
    found = {}
    for number, pages in kept.items():
        count = next((place for place, digest in enumerate(prompt) if digest not in pages), len(prompt))
        if count:
            found[number] = count
    return found


@given(
    sent=st.lists(st.tuples(st.integers(0, 5), PROMPTS), max_size=20),
    prompt=PROMPTS,
    among=st.sets(st.integers(0, 5)),
    most=st.integers(1, 4),
)
def test_those_that_keep_most_of_a_prompt_are_found(
    sent: list[tuple[int, list[int]]], prompt: list[int], among: set[int], most: int
) -> None:
    index = PrefixIndex(10**6, Random(0))
    kept: dict[int, set[bytes]] = {number: set() for number in range(6)}
    for number in kept:
        index.join(number, 10**6)
    for number, pages in sent:
        index.add(number, digests(*pages))
        kept[number] |= set(digests(*pages))
    mask = sum(1 << number for number in among)
    found = index.holders(digests(*prompt), mask, most)
    expected = {number: count for number, count in brute_force(kept, digests(*prompt)).items() if number in among}
    assert dict(found).items() <= expected.items()
    counts = [count for _, count in found]
    assert counts == sorted(expected.values(), reverse=True)[:most]
    assert index.num_pairs == sum(map(len, kept.values()))


@given(
    sent=st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), min_size=1, max_size=6)), max_size=40),
    capacity=st.integers(1, 12),
    most=st.integers(3, 20),
)
def test_an_engine_keeps_its_newest_pages_and_of_each_prompt_a_beginning(
    sent: list[tuple[int, list[int]]], capacity: int, most: int
) -> None:
    index = PrefixIndex(most, Random(0))
    for number in range(3):
        index.join(number, capacity)
    room = min(capacity, most // 3)
    for number, pages in sent:
        index.add(number, digests(*pages))
        assert index.num_pages(number) <= room
        assert index.num_pairs <= most
        found = dict(index.holders(digests(*pages), 1 << number, 1))
        assert found[number] == min(len(pages), room), "what was sent last is kept as far as there is room"


def test_an_engine_that_gave_a_page_up_has_none_that_is_older() -> None:
    index = PrefixIndex(1000, Random(0))
    index.join(0, 1000)
    old, middle, new = digests(1, 1, 1), digests(2, 2, 2), digests(3, 3, 3)
    for prompt in (old, middle, new):
        index.add(0, prompt)
    age = index.add(0, middle)
    assert age is not None
    index.correct(0, age)
    assert index.holders(old, 1, 1) == []
    assert index.holders(middle, 1, 1) == [(0, 3)]
    assert index.holders(new, 1, 1) == [(0, 3)]


def test_an_engine_that_leaves_is_forgotten_and_its_number_begins_anew() -> None:
    index = PrefixIndex(1000, Random(0))
    for number in (0, 1):
        index.join(number, 1000)
        index.add(number, digests(1, 2, 3))
    index.leave(0)
    assert index.num_pairs == 3
    index.join(0, 1000)
    assert index.holders(digests(1, 2, 3), 0b11, 2) == [(1, 3)]


class Counted(bytes):
    """Counts its look-ups in dictionaries."""

    num_hashes = 0

    def __hash__(self) -> int:
        Counted.num_hashes += 1
        return super().__hash__()

    __eq__ = bytes.__eq__


def test_a_look_up_costs_the_same_with_a_thousand_engines_as_with_ten() -> None:
    prompt = tuple(Counted(digest) for digest in digests(*range(512)))
    counts = []
    for num_engines in (10, 1000):
        index = PrefixIndex(10**6, Random(0))
        for number in range(num_engines):
            index.join(number, 1000)
            index.add(number, prompt[: 1 + number * 511 // num_engines])
        Counted.num_hashes = 0
        assert len(index.holders(prompt, (1 << num_engines) - 1, 4)) == 4
        counts.append(Counted.num_hashes)
    assert max(counts) <= 32 + 4 * 16 + 4


def test_engines_that_join_take_their_part_of_the_index_from_the_others_at_once() -> None:
    index = PrefixIndex(60, Random(0))
    index.join(0, 1000)
    index.add(0, digests(*range(60)))
    assert index.num_pairs == 60
    index.join(1, 1000)
    index.join(2, 1000)
    assert index.num_pages(0) == 20
    index.add(1, digests(*range(100, 160)))
    assert index.num_pairs == 40
