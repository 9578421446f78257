"""A request goes on at this engine behind what another has emitted of it. `Harness` holds every row and token of it to
an undisturbed run; any interleaving is in `test_state_machine.py`."""

import msgspec
import pytest

from graphgen.ipc.codec import pack_int32, unpack_int32
from graphgen.ipc.errors import InvalidRequestError, OverloadedError
from graphgen.ipc.worker_messages import SamplerParams
from graphgen.scheduler.policy import Scheduler
from graphgen.scheduler.trials import CLEARING_TOKENS, MAX_FRUITLESS
from tests.scheduler.harness import Harness, make_limits, make_sender, make_submit

PROMPT = [(5 * position) % 11 for position in range(9)]
PENALTIES = SamplerParams(presence_penalty=0.5), SamplerParams(repetition_penalty=1.1), SamplerParams()


@pytest.mark.parametrize("num_had", [0, 1, 4, 11])
@pytest.mark.parametrize("sampler", PENALTIES)
@pytest.mark.parametrize("min_tokens", [0, 6])
def test_it_gets_the_tokens_that_it_would_have_got(num_had: int, sampler: SamplerParams, min_tokens: int) -> None:
    harness = Harness(make_limits())
    stop = tuple(range(0, 50, 7))
    asked = make_submit(0, PROMPT, 12, min_tokens=min_tokens, stop=stop, sampler=sampler, logprobs=1, prompt_logprobs=0)
    harness.add(make_submit(1, PROMPT, 12))
    harness.add_moved(asked, num_had)
    plan = harness.schedule()
    assert plan is not None
    harness.run()
    (init,) = (chunk.init for plan in harness.plans for chunk in plan.chunks if chunk.init and chunk.init.logprobs)
    assert (init.prompt_len, init.min_length, init.max_len) == (9, 9 + min_tokens, 21)
    assert init.sampler == sampler


def test_what_was_said_of_its_prompt_is_not_asked_again() -> None:
    harness = Harness(make_limits())
    harness.add_moved(make_submit(0, PROMPT, 4, prompt_logprobs=0), 2)
    harness.run()
    assert not any(plan.scored_rows for plan in harness.plans)


def test_a_grammar_follows_the_tokens_that_it_had() -> None:
    scheduler = Scheduler(make_limits())
    moved = msgspec.structs.replace(
        make_submit(0, PROMPT, 9), grammar="g", num_moves=1, output_token_ids=pack_int32([21, 22, 23])
    )
    scheduler.add(moved)
    plan = scheduler.schedule(0.0)
    assert plan is not None
    (init,) = (chunk.init for chunk in plan.chunks)
    assert init is not None
    assert list(unpack_int32(init.output_token_ids)) == [21, 22, 23]


def test_a_full_queue_does_not_refuse_it_and_it_keeps_its_place_in_the_order_of_service() -> None:
    harness = Harness(make_limits(max_waiting=2, num_slots=1))
    for request_id in (0, 1):
        assert harness.add(make_submit(request_id, [1 + request_id] * 6, arrived_s=5.0))
    with pytest.raises(OverloadedError):
        harness.scheduler.add(make_submit(9, [1], arrived_s=5.0))
    harness.add_moved(make_submit(2, PROMPT, 6, arrived_s=1.0), 3)
    assert harness.schedule() is not None
    assert harness.descriptions[0].chunks[0][0] == 2
    assert harness._order_of_service() == [2, 0, 1]
    harness.run()


def test_a_missed_deadline_is_not_foreseen_for_it() -> None:
    """It was accepted when it came; what is left of its time is another question."""
    harness = Harness(make_limits())
    harness.add(make_submit(0, PROMPT, 6))
    harness.run()  # steps have been timed
    late = make_submit(1, PROMPT, 40, deadline_ms=1.0)
    assert not harness.add(late)
    harness.add_moved(late, 2)
    harness.now_s = 1.0
    assert harness.expire() == [1]


@pytest.mark.parametrize(("num_deaths", "num_here"), [(0, MAX_FRUITLESS), (1, MAX_FRUITLESS - 1), (9, 2)])
def test_the_deaths_of_which_it_is_not_cleared_come_along(num_deaths: int, num_here: int) -> None:
    """Those that it brings make it run alone, and only two deaths of workers that it had alone fail it."""
    harness = Harness(make_limits(num_pages=100))
    harness.add(make_submit(1, PROMPT, 20))
    harness.add_moved(make_submit(0, PROMPT[1:], 20), 4, num_deaths=num_deaths)
    for number in range(1, num_here + 1):
        while harness.senders[0].is_live and 0 not in harness._ids_in_flight():  # until it is its turn
            assert harness.schedule() is not None or harness.results
            if harness.results and 0 not in harness._ids_in_flight():
                harness.deliver()
        alone = harness._ids_in_flight() == {0}
        failed = harness.die()
        harness.renew()
        assert failed == ([0] if number == num_here else [])
        assert alone or not failed
    harness.run()


def test_new_tokens_clear_it_here_as_well() -> None:
    harness = Harness(make_limits(num_pages=100))
    harness.add_moved(make_submit(0, PROMPT, 20), 4, num_deaths=9)
    sender = harness.senders[0]
    for _ in range(6):
        had = len(sender.received)
        while len(sender.received) < had + CLEARING_TOKENS:
            assert harness.schedule() is not None
            harness.deliver()
        assert harness.schedule() is not None
        assert harness.die() == []
        harness.renew()
    harness.run()


def test_the_time_of_its_first_token_is_kept_for_the_target_of_its_mean_gap() -> None:
    harness = Harness(make_limits())
    submit = make_submit(0, PROMPT, 6, tpot_target_ms=1000.0)
    harness.add_moved(msgspec.structs.replace(submit, first_token_s=-100.0), 3)
    harness.run()
    assert harness.scheduler.counters.tpot_targets_missed == 1


@pytest.mark.parametrize("num_had", [5, 6])
def test_one_that_had_ended_is_refused(num_had: int) -> None:
    scheduler, submit = Scheduler(make_limits()), make_submit(0, PROMPT, 5)
    output = make_sender(make_submit(0, PROMPT, 6)).drawn[:num_had]
    with pytest.raises(InvalidRequestError, match=f"{num_had} tokens of output, max_tokens is 5"):
        scheduler.add(msgspec.structs.replace(submit, num_moves=1, output_token_ids=pack_int32(output)))
    stopped = make_submit(0, PROMPT, 9, stop=output[3:4])
    with pytest.raises(InvalidRequestError, match="has ended"):
        scheduler.add(msgspec.structs.replace(stopped, num_moves=1, output_token_ids=pack_int32(output[:4])))
    assert not scheduler.request_ids


def test_output_that_is_no_int32_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="the output of request 0 has 3 bytes"):
        Scheduler(make_limits()).add(msgspec.structs.replace(make_submit(0, PROMPT), output_token_ids=b"abc"))
