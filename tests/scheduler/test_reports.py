"""What an engine reports to routers, against what then happens in virtual time."""

import pytest

from graphgen.scheduler.policy import Scheduler
from tests.scheduler.harness import make_limits, make_submit
from tests.scheduler.virtual_time import VirtualEngine, slow_step_ms


def test_the_reported_work_is_what_the_engine_takes_for_it() -> None:
    """Prompts alone, and outputs alone that fill the slots: tokens times their seconds is when all is done."""
    engine = VirtualEngine(num_slots=64)
    for _ in range(40):
        engine.send(3000, 1)
    engine.run(until_s=0.1)
    said = engine.scheduler.report()
    assert (said.num_open, said.is_serving, said.epoch) == (
        engine.scheduler.running + engine.scheduler.waiting,
        True,
        0,
    )
    begun_s = engine.now_s
    engine.run()
    assert said.prompt_tokens * said.prompt_token_s == pytest.approx(engine.now_s - begun_s, rel=0.15)

    for _ in range(64):
        engine.send(100, 400)
    engine.run(until_s=engine.now_s + 1.0)
    said = engine.scheduler.report()
    assert (said.num_open, said.prompt_tokens) == (64, 0)
    begun_s = engine.now_s
    engine.run()
    assert said.output_tokens * said.output_token_s == pytest.approx(engine.now_s - begun_s, rel=0.2)
    assert said.step_s == pytest.approx(said.output_token_s * 64, rel=0.1)


def test_an_idle_engine_reports_no_work_and_the_step_of_one_request() -> None:
    engine = VirtualEngine()
    idle = engine.scheduler.report()
    assert (idle.num_open, idle.prompt_tokens, idle.output_tokens, idle.num_steps) == (0, 0, 0, 0)
    engine.send(64, 1)
    engine.send(64, 200)
    engine.run(until_s=0.5)
    one = engine.scheduler.report()
    assert one.step_s == pytest.approx(idle.step_s, rel=0.1)
    assert one.num_steps > 50


def test_a_slower_device_reports_longer_seconds() -> None:
    fast, slow = VirtualEngine().scheduler.report(), VirtualEngine(step_ms=slow_step_ms).scheduler.report()
    assert slow.prompt_token_s > 5 * fast.prompt_token_s
    assert slow.output_token_s > 50 * fast.output_token_s


def test_what_was_never_timed_is_reported_as_unknown() -> None:
    said = Scheduler(make_limits()).report()
    assert (said.prompt_token_s, said.output_token_s, said.step_s) == (0.0, 0.0, 0.0)


def test_a_lost_group_is_reported_until_another_serves() -> None:
    scheduler = Scheduler(make_limits())
    scheduler.add(make_submit(1, [1, 2, 3, 4, 5]))
    assert scheduler.schedule(0.0) is not None
    assert (scheduler.report().prompt_tokens, scheduler.report().num_tenants) == (0, 1)
    scheduler.add(make_submit(2, [1], tenant="other"))
    assert scheduler.report().num_tenants == 2
    scheduler.cancel(2)
    scheduler.worker_lost()
    lost = scheduler.report()
    assert (lost.is_serving, lost.epoch, lost.num_open, lost.prompt_tokens) == (False, 1, 1, 5)
    scheduler.renew(None)
    assert scheduler.report().is_serving
