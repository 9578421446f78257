"""Where prompts part within a page, against brute force."""

from array import array
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from graphgen.ipc.codec import pack_int32
from graphgen.scheduler.page_branches import MAX_COMPARED, PageBranches, common_len

TOKENS = st.lists(st.integers(0, 2), max_size=9)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


@given(TOKENS, TOKENS)
def test_the_common_beginning_is_that_of_a_plain_loop(one: list[int], other: list[int]) -> None:
    assert common_len(pack_int32(one), pack_int32(other)) == common(one, other)


def test_tokens_that_share_bytes_are_not_equal() -> None:
    assert common_len(array("i", [1, 256]).tobytes(), array("i", [1, 257]).tobytes()) == 1


@given(
    st.lists(st.tuples(st.sampled_from([b"a", b"b"]), st.integers(0, 7), TOKENS, st.booleans()), max_size=40),
    st.sampled_from([b"a", b"b"]),
    TOKENS,
    st.integers(1, 3),
)
def test_the_newest_branches_are_searched_and_forgotten_ones_are_not(
    operations: list[tuple[bytes, int, list[int], bool]], parent: bytes, wanted: list[int], least: int
) -> None:
    branches, held = PageBranches(8), dict[int, tuple[bytes, list[int]]]()
    for of, page, tokens, is_kept in operations:
        branches.remove(page)  # a page is used for something else before it holds anything new
        held.pop(page, None)
        if is_kept:
            branches.put(page, of, pack_int32(tokens))
            held[page] = of, tokens
    newest = [(page, tokens) for page, (of, tokens) in held.items() if of == parent][-MAX_COMPARED:]
    most = max((common(tokens, wanted) for _, tokens in newest), default=0)
    assert branches.holds(parent, pack_int32(wanted)) == any(
        common(tokens, wanted) == len(wanted) for _, tokens in newest
    )
    found = branches.longest(parent, pack_int32(wanted), least)
    if most < least:
        assert found is None
    else:
        assert found is not None
        page, num_tokens = found
        assert num_tokens == most == common(dict(newest)[page], wanted)


def test_a_page_that_fills_up_is_known_with_what_it_holds_now() -> None:
    branches = PageBranches(2)
    for length in (1, 2, 3):
        branches.put(1, b"a", pack_int32([7, 8, 9][:length]))
        assert branches.longest(b"a", pack_int32([7, 8, 9, 10]), 1) == (1, length)
    branches.remove(1)
    branches.remove(1)
    assert branches.longest(b"a", pack_int32([7]), 1) is None


def test_of_many_branches_the_newest_are_compared() -> None:
    """A conversation that goes on continues the page that was written last, however many parted there before."""
    branches = PageBranches(MAX_COMPARED + 3)
    for page in range(MAX_COMPARED + 3):
        branches.put(page, b"parent", pack_int32([5, page, 7]))
    newest, oldest = MAX_COMPARED + 2, 0
    assert branches.longest(b"parent", pack_int32([5, newest, 7, 8]), 1) == (newest, 3)
    found = branches.longest(b"parent", pack_int32([5, oldest, 7, 8]), 1)
    assert found is not None
    assert found[0] != oldest
    assert branches.holds(b"parent", pack_int32([5, newest]))
    assert not branches.holds(b"parent", pack_int32([5, oldest]))
