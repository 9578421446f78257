"""Which tokens are computed and which are shared: exact plans of the prefix cache."""

from array import array

import pytest

from graphgen.ipc.step_schema import live_entries
from graphgen.ipc.worker_messages import Bucket, SamplerParams
from graphgen.scheduler.page_chain import PAGES_AHEAD, PageChain
from graphgen.scheduler.tokens import Tokens
from tests.scheduler.harness import Harness, make_limits, make_submit

PAGE = 4
WIDE = (Bucket(0, 4), Bucket(64, 4))
SYSTEM = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
"""Three pages."""


def open_harness(**limits: int) -> Harness:
    return Harness(make_limits(num_pages=limits.pop("num_pages", 40), page_size=PAGE, **limits))  # type: ignore[arg-type]


def chunks(harness: Harness, request_id: int) -> list[tuple[int, int]]:
    """(start, length) of all chunks of a request."""
    return [entry[1:] for step in harness.descriptions for entry in step.chunks if entry[0] == request_id]


def computed(harness: Harness, request_id: int) -> int:
    return sum(length for _, length in chunks(harness, request_id))


def serve(harness: Harness, *prompts: list[int], max_tokens: int = 2, **fields: object) -> list[int]:
    """Serves the prompts one after another; their request ids."""
    ids = []
    for prompt in prompts:
        ids.append(len(harness.senders))
        harness.add(make_submit(ids[-1], prompt, max_tokens, **fields))  # type: ignore[arg-type]  # named by the test
        harness.run()
    return ids


def copies(harness: Harness, request_id: int) -> int:
    """Pages that were copied for a request."""
    steps = zip(harness.plans, harness.descriptions, strict=True)
    plans = [plan for plan, step in steps if any(entry[0] == request_id for entry in step.chunks)]
    return sum(len(live_entries(plan, "page_copies")) for plan in plans)


@pytest.mark.parametrize("suffix_len", [0, 1, 3, 4, 5, 9])
def test_a_second_prompt_computes_its_suffix_alone(suffix_len: int) -> None:
    harness = open_harness()
    _, second = serve(harness, SYSTEM, SYSTEM + [7] * suffix_len)
    # The last token is always computed, so an equal prompt copies its last page but for that.
    shared = len(SYSTEM) if suffix_len else len(SYSTEM) - 1
    assert chunks(harness, second)[0][0] == shared
    assert copies(harness, second) == (not suffix_len)
    assert computed(harness, second) == len(SYSTEM) + suffix_len - shared
    assert harness.scheduler.counters.prefix_queries == 2 * len(SYSTEM) + suffix_len
    assert harness.scheduler.counters.prefix_hits == shared


def test_cached_tokens_come_with_the_first_and_the_last_token() -> None:
    harness = open_harness()
    serve(harness, SYSTEM)
    harness.add(make_submit(1, [*SYSTEM, 7], 3))
    got = []
    while not harness.senders[1].reason:
        harness.schedule()
        got += [(output.request_id, output.cached_tokens) for output in harness.deliver().outputs]
    assert got == [(1, len(SYSTEM))] * 2


def test_the_next_turn_of_a_conversation_shares_prompt_and_answer() -> None:
    harness = open_harness()
    serve(harness, SYSTEM, max_tokens=12)
    history = SYSTEM + harness.senders[0].received
    (second,) = serve(harness, [*history, 1, 2, 3])
    # 12 + 12 tokens, of which the last one was never computed, and the one before it not known yet when the request
    # gave its pages back: five full pages, and two tokens of the sixth.
    assert chunks(harness, second)[0][0] == 5 * PAGE + 2
    assert copies(harness, second) == 1


def test_prompts_that_differ_in_their_first_token_share_nothing() -> None:
    harness = open_harness()
    _, second = serve(harness, SYSTEM, [2, *SYSTEM[1:]])
    assert chunks(harness, second)[0][0] == 0


def test_a_page_is_not_shared_after_a_different_beginning() -> None:
    harness = open_harness()
    _, second = serve(harness, SYSTEM, [*SYSTEM[:4], 0, 0, 0, 0, *SYSTEM[8:], 1])
    assert chunks(harness, second)[0][0] == PAGE
    assert copies(harness, second) == 0


@pytest.mark.parametrize("num_common", range(PAGE))
def test_of_the_page_where_two_prompts_part_the_beginning_is_copied(num_common: int) -> None:
    harness = open_harness()
    _, second = serve(harness, [*SYSTEM, 1, 2, 3, 4, 5], [*SYSTEM, *[1, 2, 3, 4][:num_common], 9, 9, 9])
    assert chunks(harness, second)[0][0] == len(SYSTEM) + num_common
    assert copies(harness, second) == (num_common > 0)
    assert harness.scheduler.counters.prefix_hits == len(SYSTEM) + num_common


def test_the_page_that_goes_on_the_longest_is_copied() -> None:
    harness = open_harness()
    prompts = [[*SYSTEM, 1, 6, 6, 6, 6], [*SYSTEM, 1, 2, 3, 6, 6], [*SYSTEM, 1, 2, 6, 6, 6]]
    *_, last = serve(harness, *prompts, [*SYSTEM, 1, 2, 3, 4, 5])
    assert chunks(harness, last)[0][0] == len(SYSTEM) + 3


def test_a_copy_worth_less_than_an_eighth_of_a_page_is_not_made() -> None:
    harness = Harness(make_limits(num_pages=10, page_size=16, max_model_len=128))
    prompt = list(range(30))
    _, less, enough = serve(harness, prompt, [*prompt[:17], 40, 40], [*prompt[:18], 41, 41])
    assert (chunks(harness, less)[0][0], chunks(harness, enough)[0][0]) == (16, 18)


def test_a_page_is_copied_while_its_owner_writes_on() -> None:
    harness = open_harness()
    harness.add(make_submit(0, [*SYSTEM, 1, 2], 8))
    while not harness.senders[0].received:
        harness.schedule()
        harness.deliver()
    harness.schedule()  # a token behind the prompt is being written to that page
    harness.add(make_submit(1, [*SYSTEM, 1, 2, 3], 8))
    harness.run()
    assert chunks(harness, 1) == [(len(SYSTEM) + 2, 1)]


def test_a_source_that_is_the_only_free_page_becomes_the_copy() -> None:
    """The pool has no page to spare: the page that holds the beginning is handed out as the one it is copied to."""
    harness = open_harness(num_pages=4)
    _, second = serve(harness, [*SYSTEM, 1, 2], [*SYSTEM, 1, 7], max_tokens=2)
    assert chunks(harness, second) == [(len(SYSTEM) + 1, 1)]
    (((source, destination),),) = [live_entries(plan, "page_copies") for plan in harness.plans if plan.page_copies]
    assert source == destination


def test_a_source_is_not_handed_out_in_the_plan_that_copies_it() -> None:
    """Two prompts copy a page each, and the least recently used page is what the first of them copies: nobody holds it,
    but as the page that the second copies to it would be written while it is read."""
    harness = open_harness(num_pages=9, max_chunks=4)
    other = [40 + number for number in range(8)] + [30] * 4
    serve(harness, [*SYSTEM, 1, 2], [*other, 1, 2], max_tokens=1)
    harness.add(make_submit(2, [*SYSTEM, 1, 7], 1))
    harness.add(make_submit(3, [*other, 1, 7], 1))
    harness.schedule()
    assert [entry[0] for entry in harness.descriptions[-1].chunks] == [2], "the other waits for a page"
    harness.check_page_owners()
    harness.run()
    assert [copies(harness, number) for number in (2, 3)] == [1, 1]


def test_two_tenants_never_share() -> None:
    harness = open_harness()
    serve(harness, [*SYSTEM, 1], cache_salt="one")
    (other,) = serve(harness, [*SYSTEM, 1], cache_salt="two")
    (same,) = serve(harness, [*SYSTEM, 1], cache_salt="one")
    assert (chunks(harness, other)[0][0], chunks(harness, same)[0][0]) == (0, len(SYSTEM))


def test_switched_off_nothing_is_shared() -> None:
    harness = Harness(make_limits(num_pages=40, prefix_cache=False))
    _, second = serve(harness, SYSTEM, SYSTEM)
    assert computed(harness, second) == len(SYSTEM)
    assert harness.scheduler.pages_cached == 0


def test_running_prompts_are_shared_as_soon_as_their_steps_are_planned() -> None:
    harness = open_harness()
    harness.add(make_submit(0, SYSTEM, 8))
    harness.schedule()  # 8 of 12 tokens; nothing of it has run
    harness.schedule()
    harness.add(make_submit(1, [*SYSTEM, 7], 8))
    harness.deliver()
    harness.schedule()
    assert chunks(harness, 1) == [(12, 1)]
    pages = [one.all_pages() for one in harness.scheduler._life.running]
    assert pages[0][:3] == pages[1][:3]
    harness.check_page_owners()
    harness.run()


@pytest.mark.parametrize("num_samples", [2, 4])
def test_samples_of_one_prompt_compute_it_once(num_samples: int) -> None:
    harness = open_harness(max_chunks=4)
    prompt = [*SYSTEM, 7, 8]
    for number in range(num_samples):
        harness.add(make_submit(number, prompt, 6, sampler=SamplerParams(temperature=1.0, seed=number)))
    harness.run()
    assert computed(harness, 0) == len(prompt)
    assert [computed(harness, number) for number in range(1, num_samples)] == [1] * (num_samples - 1)
    inits = {chunk.init.sampler.seed for plan in harness.plans for chunk in plan.chunks if chunk.init is not None}
    assert inits == set(range(num_samples))


@pytest.mark.parametrize(("num_common", "waits"), [(3, False), (4, True), (15, True)])
def test_a_request_waits_a_step_for_a_quarter_of_a_page_and_not_for_less(num_common: int, waits: bool) -> None:
    """The first is about to compute what the second could copy from the next plan on."""
    harness = Harness(make_limits(num_pages=10, page_size=16, max_model_len=128, token_budget=68, buckets=WIDE))
    common = list(range(20, 20 + num_common))
    harness.add(make_submit(0, [*common, *[1] * 4], 2))
    harness.add(make_submit(1, [*common, *[2] * 4], 2))
    harness.schedule()
    assert [entry[0] for entry in harness.descriptions[0].chunks] == ([0] if waits else [0, 1])
    harness.run()
    assert computed(harness, 1) == 4 + (0 if waits else num_common)


def test_a_request_does_not_wait_for_a_page_of_one_that_is_served_after_it() -> None:
    harness = open_harness()
    harness.add(make_submit(0, SYSTEM * 2, 2))
    harness.schedule()
    harness.add(make_submit(1, SYSTEM * 2, 2, priority=1))
    harness.schedule()
    assert chunks(harness, 1)[0][0] == 8, "what is planned is shared, and the rest is computed at once"
    harness.run()


def test_when_the_prompt_that_was_waited_for_is_cancelled_the_next_goes_on() -> None:
    harness = open_harness()
    for request_id in range(3):
        harness.add(make_submit(request_id, SYSTEM * 2, 2))
    harness.schedule()
    assert {entry[0] for entry in harness.descriptions[0].chunks} == {0}
    harness.cancel(0)
    harness.run()
    assert chunks(harness, 1)[0] == (8, 8)
    assert computed(harness, 2) == 1


def test_the_least_recently_used_pages_go_first_and_leaves_before_their_parents() -> None:
    harness = open_harness(num_pages=9)
    first, second = [1] * 12, [2] * 12
    serve(harness, first, second, max_tokens=1)
    assert harness.scheduler.pages_cached == 6
    serve(harness, [*first, 1], max_tokens=1)  # uses the first again, and keeps the page its last token is in
    serve(harness, [3] * 16, max_tokens=1)  # takes the empty pages, then two of the second prompt's
    (again,) = serve(harness, [*second, 1], max_tokens=1)
    assert chunks(harness, again)[0][0] == PAGE, "its first page outlives the ones after it"


def test_a_preempted_request_finds_its_own_pages() -> None:
    harness = Harness(make_limits(num_pages=6, page_size=4))
    harness.add(make_submit(0, [1] * 4, 14))
    harness.add(make_submit(1, [2] * 8, 8))
    harness.run()
    assert harness.scheduler.counters.preemptions > 0
    returns = [start for start, _ in chunks(harness, 1)[1:] if start]
    assert returns, "not all of it was computed again"


@pytest.mark.parametrize(
    ("sampler", "shared"),
    [
        (SamplerParams(repetition_penalty=1.2), 0),
        (SamplerParams(presence_penalty=0.5), 12),
        (SamplerParams(frequency_penalty=0.5), 12),
    ],
)
def test_tokens_that_a_penalty_counts_are_computed(sampler: SamplerParams, shared: int) -> None:
    """The device counts the tokens it computes for a slot: a repetition penalty is over the prompt as well."""
    harness = open_harness()
    serve(harness, [*SYSTEM, 1])
    (second,) = serve(harness, [*SYSTEM, 1], sampler=sampler)
    assert chunks(harness, second)[0][0] == shared


def test_shared_pages_are_in_the_block_table_before_the_new_ones() -> None:
    harness = open_harness()
    serve(harness, SYSTEM)
    harness.add(make_submit(1, [*SYSTEM, 7], 1))
    plan = harness.schedule()
    assert plan is not None
    assert [index for _, _, index, _ in live_entries(plan, "new_pages")] == [0, 1, 2, 3]
    harness.run()


def test_digests_depend_on_every_token_before_and_on_the_salt() -> None:
    def digests(tokens: list[int], salt: str = "") -> list[bytes | None]:
        chain = PageChain(Tokens(array("i", tokens)), 2, salt)
        return [chain.digest(index) for index in range(3)]

    base = digests([1, 2, 3, 4, 5])
    assert base[2] is None, "the last page is not full"
    for place in range(4):
        changed = [1, 2, 3, 4, 5]
        changed[place] = 9
        equal = [a == b for a, b in zip(base, digests(changed), strict=True)]
        assert equal == [place >= 2, False, True]
    assert not set(base[:2]) & set(digests([1, 2, 3, 4, 5], "salt")[:2])
    # A salt is not confused with tokens, nor a page with two of half its size.
    assert len({*base[:2], *digests([3, 4, 1, 2, 5])[:2]}) == 4


def test_a_chain_grows_with_its_tokens_and_prepares_only_so_much() -> None:
    tokens = Tokens(array("i", range(3 * PAGES_AHEAD - 1)))
    tokens.output.append(3 * PAGES_AHEAD - 1)
    chain = PageChain(tokens, 2, "")
    chain.prepare(PAGES_AHEAD)
    assert len(chain._digests) == PAGES_AHEAD + 1
    assert chain.digest(3 * PAGES_AHEAD // 2) is None
    tokens.output += [1, 2]
    whole = PageChain(Tokens(tokens.part(0, len(tokens))), 2, "")
    last = len(tokens) // 2 - 1
    assert chain.digest(last) == whole.digest(last) is not None
