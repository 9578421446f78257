"""The choice of a bucket equals a search over all of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphgen.ipc.errors import ConfigError
from graphgen.ipc.worker_messages import Bucket
from graphgen.scheduler.buckets import BucketTable

LADDER = tuple(Bucket(0, d) for d in (1, 2, 4, 8)) + tuple(Bucket(p, d) for p in (16, 32, 64) for d in (4, 8))

buckets = st.builds(Bucket, st.sampled_from([0, 4, 8, 16]), st.integers(1, 12))
ladders = st.lists(buckets, min_size=1, max_size=8).map(lambda some: (Bucket(4, 3), *some))


@given(ladders, st.integers(7, 30), st.data())
def test_the_smallest_bucket_that_holds_both_counts_is_chosen(
    ladder: tuple[Bucket, ...], budget: int, data: st.DataObject
) -> None:
    table = BucketTable(ladder, budget)
    usable = [bucket for bucket in ladder if bucket.num_rows <= budget]
    num_decodes = data.draw(st.integers(0, table.max_decode_rows))
    room = table.chunk_room(num_decodes)
    num_prefills = data.draw(st.integers(0, room))
    holding = [b for b in usable if b.prefill_rows >= num_prefills and b.decode_rows >= num_decodes]
    assert table.smallest(num_prefills, num_decodes) == min(holding, key=lambda b: (b.num_rows, b.decode_rows))


@given(ladders, st.integers(7, 30), st.data())
def test_a_mixed_bucket_is_offered_unless_a_smaller_one_has_as_much_room(
    ladder: tuple[Bucket, ...], budget: int, data: st.DataObject
) -> None:
    table = BucketTable(ladder, budget)
    num_decodes = data.draw(st.integers(0, table.max_decode_rows))
    fitting = [b for b in ladder if b.prefill_rows and b.num_rows <= budget and b.decode_rows >= num_decodes]
    cheapest = {
        b.prefill_rows: min(b2.num_rows for b2 in fitting if b2.prefill_rows >= b.prefill_rows) for b in fitting
    }
    offered = table.mixed(num_decodes)
    assert set(offered) <= set(fitting)
    # For every number of prompt tokens that fits at all, the fewest rows that hold it are on offer.
    for room, rows in cheapest.items():
        assert min(b.num_rows for b in offered if b.prefill_rows >= room) == rows
    assert [b.prefill_rows for b in offered] == sorted({b.prefill_rows for b in offered})
    assert [b.num_rows for b in offered] == sorted({b.num_rows for b in offered})
    assert table.chunk_room(num_decodes) == max((b.prefill_rows for b in fitting), default=0)


@pytest.mark.parametrize(
    ("num_prefills", "num_decodes", "expected"),
    [
        (0, 1, "0+1"),
        (0, 2, "0+2"),
        (0, 3, "0+4"),
        (1, 0, "16+4"),
        (15, 4, "16+4"),
        (16, 4, "16+4"),
        (17, 4, "32+4"),
        (16, 5, "16+8"),
        (64, 8, "64+8"),
    ],
)
def test_bucket_edges(num_prefills: int, num_decodes: int, expected: str) -> None:
    assert str(BucketTable(LADDER, 72).smallest(num_prefills, num_decodes)) == expected


@pytest.mark.parametrize(("budget", "rooms"), [(72, (64, 64)), (71, (64, 32)), (40, (32, 32)), (39, (32, 16))])
def test_the_token_budget_bounds_the_chunk_room(budget: int, rooms: tuple[int, int]) -> None:
    table = BucketTable(LADDER, budget)
    assert (table.chunk_room(4), table.chunk_room(5)) == rooms


@pytest.mark.parametrize(("budget", "num_slots"), [(72, 8), (23, 5)])
def test_as_many_may_run_as_can_decode_beside_a_prompt(budget: int, num_slots: int) -> None:
    # Within 23 rows the only mixed bucket is 16+4: four decode while the fifth computes its prompt.
    assert BucketTable(LADDER, budget).most_slots == num_slots


def test_a_budget_without_a_bucket_for_prompts_is_refused() -> None:
    with pytest.raises(ConfigError, match="token_budget 19"):
        BucketTable(LADDER, 19)


def test_more_than_any_bucket_holds_is_an_error() -> None:
    with pytest.raises(ValueError, match="no bucket holds 65 prompt tokens and 1 decodes"):
        BucketTable(LADDER, 72).smallest(65, 1)
    with pytest.raises(ValueError, match="no bucket holds 0 prompt tokens and 9 decodes"):
        BucketTable(LADDER, 72).smallest(0, 9)
