"""What the overload guard foretells, against what then happens in virtual time."""

import re

import pytest

from graphgen.ipc.codec import pack_int32
from graphgen.ipc.engine_messages import Submit
from graphgen.ipc.errors import OverloadedError
from graphgen.ipc.worker_messages import SamplerParams
from tests.scheduler.virtual_time import TOKEN, VirtualEngine


def foretold_s(engine: VirtualEngine, prompt_len: int, output_len: int, deadline_ms: float) -> tuple[float, float]:
    """Of a request that is refused for its deadline: when it would be complete, and when it may come back."""
    submit = Submit(
        request_id=10**6,
        prompt_token_ids=pack_int32([9, *[TOKEN] * (prompt_len - 1)]),
        max_tokens=output_len,
        min_tokens=0,
        stop_token_ids=(),
        sampler=SamplerParams(),
        arrived_s=engine.now_s,
        deadline_ms=deadline_ms,
    )
    with pytest.raises(OverloadedError) as caught:
        engine.scheduler.add(submit)
    found = re.search(r"complete after about (\d+) ms", caught.value.message)
    assert found is not None
    return int(found[1]) / 1000.0, caught.value.retry_after_s


@pytest.mark.parametrize(
    ("num_ahead", "prompt_len", "output_len", "num_slots", "most"),
    [(10, 3000, 20, 64, 1.6), (40, 3000, 20, 64, 1.6), (40, 200, 400, 8, 3.5), (150, 200, 100, 16, 3.5)],
)
def test_the_time_that_is_foretold_behind_a_queue_is_about_what_it_takes(
    num_ahead: int, prompt_len: int, output_len: int, num_slots: int, most: float
) -> None:
    """A queue of prompts, and one of outputs that wait for slots, whose steps are all taken to hold prompts."""
    engine = VirtualEngine(num_slots=num_slots)
    for _ in range(num_ahead):
        engine.send(prompt_len, output_len)
    engine.run(until_s=0.02)
    deadline_ms = 400.0 if output_len < 50 else 2500.0
    told_s, retry_s = foretold_s(engine, 500, 50, deadline_ms)
    assert retry_s == pytest.approx(told_s - deadline_ms / 1000.0, abs=0.002)
    sent_s, last = engine.now_s, engine.send(500, 50)
    engine.run()
    took_s = last.times_s[-1] - sent_s
    assert 0.6 * took_s < told_s < most * took_s


@pytest.mark.parametrize("prompt_len", [500, 4000])
def test_who_is_turned_away_from_a_full_queue_finds_room_when_it_comes_back(prompt_len: int) -> None:
    """Not much before that, and not at once for a long queue: a quarter of it is served meanwhile."""
    engine = VirtualEngine(num_slots=64, max_waiting=40)
    for _ in range(64 + 40):
        engine.send(prompt_len, 2)
        engine.run(until_s=engine.now_s)
    while engine.scheduler.waiting < 40:
        engine.send(prompt_len, 2)
    submit = engine.send(prompt_len, 2).submit
    with pytest.raises(OverloadedError, match="max_waiting is 40") as caught:
        engine.scheduler.add(submit)
    engine.run(until_s=engine.now_s + caught.value.retry_after_s)
    assert 40 * 0.6 < engine.scheduler.waiting < 40 * 0.9
