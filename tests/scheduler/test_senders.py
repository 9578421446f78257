"""Several senders of one engine: each is answered for its own requests, and for no others."""

import os
from collections import deque
from collections.abc import Iterator
from typing import Any, cast

import pytest

from graphgen.ipc.engine_messages import (
    Attach,
    Blamed,
    Cancel,
    EngineStats,
    EngineToScheduler,
    Outputs,
    Ready,
    Rejected,
    ReportRequest,
    SenderEnded,
    StatsRequest,
    TokenOutput,
)
from graphgen.ipc.reports import EngineReport
from graphgen.ipc.senders import first_request_id, sender_of
from graphgen.ipc.worker_messages import Probe, Shutdown, WorkerCounters
from graphgen.scheduler.loop import SchedulerLoop
from graphgen.scheduler.policy import Scheduler
from graphgen.scheduler.senders import Senders, outputs_of_each
from graphgen.scheduler.step_log import StepLog
from tests.fakes import READY
from tests.scheduler.harness import make_limits, make_submit, tokens_of
from tests.scheduler.test_loop import FakeWorkers, _collector_as_it_was  # noqa: F401  # a fixture

Script = list[list[EngineToScheduler]]
NUM_SENDERS = 2


class FakeChannel:
    """One sender: says a batch of its script in each turn of the loop. `heard` is what it was sent."""

    def __init__(self, script: Script) -> None:
        self._script = deque(script)
        self.heard: list[object] = []
        self.receiver, self._writer = os.pipe()
        os.write(self._writer, b"!")  # there is always something to read

    def drain(self) -> Iterator[EngineToScheduler]:
        yield from self._script.popleft() if self._script else []

    def send(self, message: object) -> None:
        self.heard.append(message)

    def close(self) -> None:
        os.close(self.receiver)
        os.close(self._writer)


def run_loop(*scripts: Script, num_slots: int = 4, answers: bool = True) -> list[list[Any]]:
    """What each sender was sent until some turns after the longest script has ended."""
    num_turns = max(map(len, scripts)) + 14
    scripts = tuple([*script, *[[] for _ in range(num_turns - len(script))]] for script in scripts)
    scripts[0].append([Shutdown()])
    channels = [FakeChannel(script) for script in scripts]
    policy = Scheduler(make_limits(num_senders=len(scripts), num_slots=num_slots))
    workers = FakeWorkers([], lambda _: answers)
    try:
        # Any: the fakes have what is used of a Channel and of Workers.
        senders = Senders(cast(Any, channels))
        SchedulerLoop(policy, senders, cast(Any, workers), StepLog(None), READY, WorkerCounters()).run()
    finally:
        for channel in channels:
            channel.close()
    return [channel.heard for channel in channels]


def sent(heard: list[Any], kind: type) -> list[Any]:
    return [message for message in heard if isinstance(message, kind)]


def tokens(heard: list[Any]) -> dict[int, int]:
    """By request: how many tokens the sender heard of."""
    counts: dict[int, int] = {}
    for outputs in sent(heard, Outputs):
        for request_id in tokens_of(outputs):
            counts[request_id] = counts.get(request_id, 0) + 1
    return counts


def test_each_sender_hears_of_its_own_requests_and_of_all_their_tokens() -> None:
    first, second = run_loop([[make_submit(0, [1, 2], 5), make_submit(2, [1], 3)]], [[make_submit(1, [7], 6)]])
    assert tokens(first) == {0: 5, 2: 3}
    assert tokens(second) == {1: 6}
    assert first[0] == second[0] == READY


def test_ids_of_senders_never_meet_also_of_those_that_are_started_at_one_moment() -> None:
    ids = [first_request_id(sender, 3, 12.5) + 3 * count for sender in range(3) for count in range(1000)]
    assert len(set(ids)) == len(ids)
    assert [sender_of(first_request_id(sender, 3, 12.5), 3) for sender in range(3)] == [0, 1, 2]
    assert first_request_id(1, 3, 13.5) > first_request_id(1, 3, 12.5) + 3 * 1_000_000, "a later life is above"


def test_a_request_with_another_senders_id_is_refused_and_does_that_one_no_harm() -> None:
    first, second = run_loop([[make_submit(0, [1, 2], 5)], []], [[], [make_submit(0, [3], 5), Cancel(0)]])
    (rejected,) = sent(second, Rejected)
    assert (rejected.request_id, rejected.error) == (0, "InvalidRequestError")
    assert "count by 2 from 1 on" in rejected.message
    assert tokens(first) == {0: 5}, "nor does its cancel"
    assert not sent(first, Rejected)


def test_a_refusal_reaches_the_one_whose_request_it_is() -> None:
    late = make_submit(3, [1], 30, deadline_ms=0.001)
    first, second = run_loop([[make_submit(0, [], 1)]], [[make_submit(1, [2], 2), late]])
    assert [one.request_id for one in sent(first, Rejected)] == [0]
    assert [one.request_id for one in sent(second, Rejected)] == [3]


@pytest.mark.parametrize("end", [Attach(), SenderEnded(1000)])
def test_the_end_of_a_sender_ends_its_requests_alone(end: EngineToScheduler) -> None:
    script: Script = [[make_submit(1, [3], 30)], [], [end], [], [StatsRequest()]]
    first, second = run_loop([[make_submit(0, [1, 2], 12)]], script)
    assert tokens(first) == {0: 12}
    assert tokens(second).get(1, 0) < 12
    (stats,) = sent(second, EngineStats)
    assert (stats.running, stats.waiting) == (1, 0)
    assert len(sent(second, Ready)) == (2 if isinstance(end, Attach) else 1)
    assert len(sent(first, Ready)) == 1, "nobody took its place"


def test_what_is_told_late_of_a_sender_that_ended_does_not_end_requests_of_its_successor() -> None:
    _, second = run_loop([[]], [[Attach(), make_submit(1001, [3], 6)], [SenderEnded(1001)]])
    assert tokens(second) == {1001: 6}


def test_questions_are_answered_to_the_one_who_asks() -> None:
    """Also probes that both call by the same number, and the last steps, which each gets whole."""
    watching: Script = [[StatsRequest(steps=True)], *[[] for _ in range(8)], [StatsRequest(steps=True)]]
    script: Script = [[make_submit(0, [1, 2], 5), Probe(7)], *watching]
    first, second = run_loop(script, [[Probe(7)], *watching])
    for heard in (first, second):
        assert sent(heard, Probe) == [Probe(7)]
        assert len(sent(heard, EngineStats)) == 2
    of_first, of_second = (sent(heard, EngineStats)[1].recent_steps for heard in (first, second))
    assert of_first == of_second
    assert of_first, "steps have run between the questions"


def test_a_report_tells_the_askers_work_from_that_of_others() -> None:
    """Long prompts of one and short ones of the other, running and waiting: by tokens, not by requests."""
    scheduler = Scheduler(make_limits(num_senders=NUM_SENDERS, num_slots=2))
    for request_id in (0, 2, 4):
        scheduler.add(make_submit(request_id, [1] * 30, 4))
    scheduler.add(make_submit(1, [2, 3], 4))
    for moment in ("waiting", "running"):
        first, second = scheduler.report(0), scheduler.report(1)
        assert (first.num_open, first.num_others, second.num_others) == (4, 1, 3), moment
        assert first.prompt_tokens == second.prompt_tokens
        assert first.others_prompt_tokens + second.others_prompt_tokens == first.prompt_tokens, moment
        assert first.others_output_tokens + second.others_output_tokens == pytest.approx(first.output_tokens, abs=1)
        assert first.others_prompt_tokens <= 2, moment
        assert scheduler.schedule(0.0) is not None
    scheduler.cancel(1)
    report = scheduler.report(0)
    assert (report.num_others, report.others_prompt_tokens, report.others_output_tokens) == (0, 0, 0)


def test_the_loop_asks_the_policy_for_the_report_of_the_one_who_asks() -> None:
    script: Script = [[make_submit(1, [3] * 9, 30)], [ReportRequest()]]
    first, second = run_loop([[], [ReportRequest()]], script, answers=False)
    (of_first,), (of_second,) = sent(first, EngineReport), sent(second, EngineReport)
    assert (of_first.num_others, of_second.num_others) == (1, 0)


def test_a_step_is_parted_without_losing_or_moving_anything() -> None:
    news = tuple(TokenOutput(number, (number,), None, 0.0) for number in (5, 0, 3))
    step = Outputs(news, (1, 2, 4, 8), (10, 20, 40, 80))
    parts = outputs_of_each(step, 3)
    assert [[one.request_id for one in part.outputs] for part in parts] == [[0, 3], [], [5]]
    assert [(part.request_ids, part.token_ids) for part in parts] == [((), ()), ((1, 4), (10, 40)), ((2, 8), (20, 80))]


def test_deaths_are_told_to_those_whose_requests_they_count_against() -> None:
    channels = [FakeChannel([]) for _ in range(3)]
    Senders(cast(Any, channels)).answer(Blamed((3, 1, 4), (7, 8, 9)))
    assert [channel.heard for channel in channels] == [[Blamed((3,), (7,))], [Blamed((1, 4), (8, 9))], []]
    for channel in channels:
        channel.close()
