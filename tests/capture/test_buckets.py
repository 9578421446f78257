"""The ladder serves every step the scheduler may plan, within the budget, without waste at its edges."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphgen.capture.buckets import build_ladder, essential_of, slots_for
from graphgen.ipc.errors import ConfigError
from graphgen.ipc.worker_messages import Bucket
from graphgen.scheduler.buckets import BucketTable

BUDGETS = st.integers(8, 4096)


@given(BUDGETS, st.integers(1, 1024))
def test_every_number_of_decodes_fits_alone_and_beside_a_full_budget(token_budget: int, max_num_seqs: int) -> None:
    slots = slots_for(max_num_seqs, token_budget)
    ladder = build_ladder(token_budget, slots)
    for decodes in {1, slots // 2 or 1, slots - 1 or 1, slots}:
        assert any(bucket.prefill_rows == 0 and bucket.decode_rows >= decodes for bucket in ladder)
        assert any(
            bucket.prefill_rows > 0 and bucket.decode_rows >= decodes and bucket.num_rows == token_budget
            for bucket in ladder
        )


@given(BUDGETS, st.integers(1, 1024))
def test_no_bucket_exceeds_the_budget_and_none_is_listed_twice(token_budget: int, max_num_seqs: int) -> None:
    ladder = build_ladder(token_budget, slots_for(max_num_seqs, token_budget))
    assert max(bucket.num_rows for bucket in ladder) == token_budget
    assert len(set(ladder)) == len(ladder)
    assert all(bucket.decode_rows >= 1 and bucket.prefill_rows >= 0 for bucket in ladder)
    assert [bucket.num_rows for bucket in ladder] == sorted(bucket.num_rows for bucket in ladder)


@given(BUDGETS, st.integers(1, 1024))
def test_prompts_keep_a_quarter_of_the_budget_whatever_decodes(token_budget: int, max_num_seqs: int) -> None:
    slots = slots_for(max_num_seqs, token_budget)
    ladder = build_ladder(token_budget, slots)
    widest = max(
        bucket.prefill_rows for bucket in ladder if bucket.decode_rows >= slots and bucket.num_rows == token_budget
    )
    assert widest >= token_budget // 4


def test_the_default_ladder_pads_few_rows_where_steps_are_small() -> None:
    ladder = build_ladder(2048, 256)
    decode_rungs = [bucket.decode_rows for bucket in ladder if not bucket.prefill_rows]
    assert decode_rungs == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert Bucket(1984, 64) in ladder
    assert Bucket(112, 16) in ladder
    rows = {bucket.num_rows for bucket in ladder if bucket.prefill_rows}
    assert rows == {32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048}


@pytest.mark.parametrize("token_budget", [128, 256, 1024])
@pytest.mark.parametrize(
    ("prompt_tokens", "decodes", "most_rows"), [(20, 0, 32), (28, 4, 32), (40, 4, 64), (50, 8, 64)]
)
def test_a_short_prompt_beside_few_decodes_has_a_small_step(
    token_budget: int, prompt_tokens: int, decodes: int, most_rows: int
) -> None:
    """The next turn of a chat, behind a cached prefix."""
    table = BucketTable(build_ladder(token_budget, slots_for(256, token_budget)), token_budget)
    assert table.smallest(prompt_tokens, decodes).num_rows <= most_rows


@pytest.mark.parametrize(("token_budget", "sizes"), [(1024, [1024]), (2048, [1024, 1536])])
@pytest.mark.parametrize(("num_decodes", "padded"), [(15, 17), (22, 10), (32, 0), (33, 31)])
def test_steps_that_grow_for_a_queue_pad_few_decode_rows(
    token_budget: int, sizes: list[int], num_decodes: int, padded: int
) -> None:
    """Of 64 clients with long prompts and short outputs some 22 decode while the others wait."""
    table = BucketTable(build_ladder(token_budget, slots_for(256, token_budget)), token_budget)
    of_size = {bucket.num_rows: bucket.decode_rows - num_decodes for bucket in table.mixed(num_decodes)}
    assert [of_size[rows] for rows in sizes] == [padded] * len(sizes)


def test_an_engine_that_is_never_idle_has_the_steps_that_grow_for_a_queue() -> None:
    """With the default budget, in which they are as large as a step may be."""
    ladder = build_ladder(1024, slots_for(256, 1024))
    whole, part = BucketTable(ladder, 1024), BucketTable(essential_of(ladder), 1024)
    assert all(part.mixed(num_decodes)[-1] == whole.mixed(num_decodes)[-1] for num_decodes in range(257))


@given(BUDGETS, st.integers(1, 1024))
def test_no_two_buckets_of_a_size_serve_the_same(token_budget: int, max_num_seqs: int) -> None:
    ladder = build_ladder(token_budget, slots_for(max_num_seqs, token_budget))
    assert all(bucket.prefill_rows + bucket.decode_rows == bucket.num_rows for bucket in ladder)
    assert len({(bucket.num_rows, bucket.decode_rows) for bucket in ladder}) == len(ladder)


@pytest.mark.parametrize(("token_budget", "most"), [(256, 25), (512, 40), (1024, 45), (2048, 55)])
def test_no_ladder_has_many_more_graphs_than_a_start_can_spare(token_budget: int, most: int) -> None:
    assert len(build_ladder(token_budget, slots_for(256, token_budget))) <= most


@pytest.mark.parametrize(("token_budget", "num_slots"), [(7, 1), (16, 13), (16, 0)])
def test_an_impossible_ladder_is_refused_with_its_numbers(token_budget: int, num_slots: int) -> None:
    with pytest.raises(ConfigError, match=str(token_budget)):
        build_ladder(token_budget, num_slots)


@given(BUDGETS, st.integers(1, 1024))
def test_every_step_of_a_ladder_fits_into_an_essential_bucket(token_budget: int, max_num_seqs: int) -> None:
    slots = slots_for(max_num_seqs, token_budget)
    ladder = build_ladder(token_budget, slots)
    essential = essential_of(ladder)
    assert set(essential) <= set(ladder)
    whole, part = BucketTable(ladder, token_budget), BucketTable(essential, token_budget)
    assert part.most_slots == whole.most_slots
    assert part.max_decode_rows == whole.max_decode_rows
    assert part.long_prompt_len == whole.long_prompt_len, (
        "what a prompt is taken for is decided before they are captured"
    )
    for num_decodes in range(slots + 1):
        if num_decodes in (0, slots):
            assert part.chunk_room(num_decodes) == whole.chunk_room(num_decodes)
        assert part.chunk_room(num_decodes) >= min(whole.chunk_room(num_decodes), token_budget // 4)
        assert num_decodes == 0 or part.smallest(0, num_decodes).prefill_rows == 0
        part.smallest(part.chunk_room(num_decodes), num_decodes)


@pytest.mark.parametrize(("token_budget", "most"), [(512, 0.45), (1024, 0.4), (2048, 0.4)])
def test_little_more_than_a_third_of_the_default_ladders_is_essential(token_budget: int, most: float) -> None:
    ladder = build_ladder(token_budget, slots_for(256, token_budget))
    assert len(essential_of(ladder)) <= most * len(ladder)
