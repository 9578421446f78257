"""Requests that follow a grammar: rows ahead of it, rows that await their token, and draws that are repeated."""

import random
from collections import deque
from typing import NamedTuple

import msgspec
import pytest

from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.engine_messages import Submit
from graphgen.ipc.worker_messages import SamplerParams, StepPlan
from graphgen.scheduler.policy import Scheduler
from graphgen.scheduler.request import LEAST_CAUTION
from tests.scheduler.harness import make_limits, make_submit, tokens_of


def constrained(
    request_id: int, prompt: list[int], max_tokens: int = 4, ahead: bool = False, tenant: str = ""
) -> Submit:
    """ahead: it may run ahead of its grammar; one with a penalty may not, since the device counts its tokens."""
    sampler = SamplerParams(frequency_penalty=0.0 if ahead else 0.5)
    submit = make_submit(request_id, prompt, max_tokens, sampler=sampler, tenant=tenant)
    return msgspec.structs.replace(submit, grammar="g")


def planned(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule(0.0)
    assert plan is not None
    scheduler.prepare()
    return plan


def requests_of(scheduler: Scheduler, plan: StepPlan) -> list[int]:
    """Those that draw, in the order of the result."""
    return [request.request_id for request in scheduler._life.in_flight.find(plan.step_id).drawing]


def position_of(plan: StepPlan, slot: int) -> int:
    """Of the decode row of a slot."""
    return dict(zip(unpack_int32(plan.decode_slots), unpack_int32(plan.decode_positions), strict=True))[slot]


def test_a_request_that_awaits_its_tokens_has_a_row_in_every_other_plan_and_its_neighbour_in_each() -> None:
    scheduler = Scheduler(make_limits())
    scheduler.add(constrained(1, [7, 8, 9]))
    scheduler.add(make_submit(2, [4, 5], 8))
    first = planned(scheduler)
    assert requests_of(scheduler, first) == [1, 2]
    assert [chunk.init.grammar for chunk in first.chunks if chunk.init] == ["g", ""]
    second = planned(scheduler)
    assert requests_of(scheduler, second) == [2], "the token of the first is not known"
    assert tokens_of(scheduler.update(0, [21, 22])) == {1: (21, None), 2: (22, None)}
    third = planned(scheduler)
    assert set(requests_of(scheduler, third)) == {1, 2}
    positions = dict(zip(unpack_int32(third.decode_slots), unpack_int32(third.decode_positions), strict=True))
    assert sorted(positions.values()) == [3, 3], "the prompt of 3 and its token; the prompt of 2 and two tokens"
    scheduler.update(1, [23])
    assert requests_of(scheduler, planned(scheduler)) == [2]


def test_a_lone_request_that_awaits_its_tokens_has_one_step_in_flight() -> None:
    scheduler = Scheduler(make_limits())
    scheduler.add(constrained(1, [7, 8, 9], 3))
    for step, token in enumerate((21, 22, 23)):
        planned(scheduler)
        assert scheduler.schedule(0.0) is None
        outputs = scheduler.update(step, [token])
    assert tokens_of(outputs) == {1: (23, "length")}
    assert scheduler.pages_free == scheduler.pages_total
    assert scheduler.schedule(0.0) is None


@pytest.mark.parametrize("num_known", [0, 1, 3], ids=["of the prompt", "in between", "the last one"])
def test_a_refused_draw_is_planned_again_as_a_decode_of_its_last_token_and_nobody_else_notices(num_known: int) -> None:
    scheduler = Scheduler(make_limits())
    prompt = [7, 8, 9]
    scheduler.add(constrained(1, prompt, 4))
    scheduler.add(make_submit(2, [4, 5], 12))
    known = list(prompt)
    step = 0
    while len(known) < len(prompt) + num_known:
        drawing = requests_of(scheduler, planned(scheduler))
        scheduler.update(step, [30 + step if request == 1 else 50 for request in drawing])
        known += [30 + step] * (1 in drawing)
        step += 1
    for _ in range(2):  # it may be refused again
        drawing = requests_of(scheduler, planned(scheduler))
        assert 1 in drawing
        place = drawing.index(1)
        outputs = scheduler.update(step, [49 if request == 1 else 50 for request in drawing], refused=[place])
        assert set(tokens_of(outputs)) == {2}
        step += 1
        plan = planned(scheduler)
        assert not plan.chunks
        slot, token, of_output = unpack_int32(plan.redrawn)
        assert (token, of_output) == (known[-1], num_known > 0)
        assert position_of(plan, slot) == len(known) - 1
        drawing = requests_of(scheduler, plan)
        assert sorted(drawing) == [1, 2]
        place = drawing.index(1)
        scheduler.update(step, [49 if request == 1 else 50 for request in drawing], refused=[place])
        step += 1
    plan = planned(scheduler)
    assert unpack_int32(plan.redrawn)[1] == known[-1]
    drawing = requests_of(scheduler, plan)
    outputs = scheduler.update(step, [33 if request == 1 else 50 for request in drawing])
    assert tokens_of(outputs)[1] == (33, "length" if num_known == 3 else None)
    assert tokens_of(outputs)[2] == (50, None)


def test_one_that_starts_again_brings_the_tokens_that_it_has() -> None:
    scheduler = Scheduler(make_limits())
    scheduler.add(constrained(1, [7, 8, 9]))
    planned(scheduler)
    scheduler.update(0, [21])
    planned(scheduler)
    life = scheduler._life
    life.preemption.preempt(next(life.running.victims()))
    assert scheduler.schedule(0.0) is None, "its token is in flight, and kept"
    scheduler.update(1, [22])
    (chunk,) = planned(scheduler).chunks
    assert chunk.init is not None
    assert list(unpack_int32(chunk.init.output_token_ids)) == [21, 22]
    scheduler.update(2, [23])
    planned(scheduler)
    scheduler.worker_lost()
    scheduler.renew(None)
    (chunk,) = planned(scheduler).chunks
    assert chunk.init is not None
    assert list(unpack_int32(chunk.init.output_token_ids)) == [21, 22, 23]


def test_a_draw_that_is_refused_after_its_request_was_preempted_is_lost_alone() -> None:
    scheduler = Scheduler(make_limits())
    scheduler.add(constrained(1, [7, 8, 9]))
    planned(scheduler)
    scheduler.update(0, [21])
    planned(scheduler)
    life = scheduler._life
    life.preemption.preempt(next(life.running.victims()))
    assert not scheduler.update(1, [22], refused=[0])
    (chunk,) = planned(scheduler).chunks
    assert chunk.init is not None
    assert list(unpack_int32(chunk.init.output_token_ids)) == [21]


def test_a_grammar_that_cannot_go_on_ends_its_request_and_says_why() -> None:
    scheduler = Scheduler(make_limits())
    scheduler.add(constrained(1, [7, 8, 9]))
    scheduler.add(make_submit(2, [4, 5], 8))
    planned(scheduler)
    (rejected,) = scheduler.fail_grammars(0, [(0, "too many states")])
    assert (rejected.request_id, rejected.error) == (1, "InvalidRequestError")
    assert rejected.message == "after 0 tokens of output its grammar cannot go on: too many states"
    assert set(tokens_of(scheduler.update(0, [21, 22]))) == {2}
    assert scheduler.request_ids == (2,)


def test_one_of_several_tenants_rests_and_awaits_without_losing_its_place() -> None:
    scheduler = Scheduler(make_limits(num_slots=4))
    for request_id, tenant in enumerate("aabb"):
        scheduler.add(constrained(request_id, [7, 8, request_id], 9, tenant=tenant))
    received: dict[int, list[int]] = {request_id: [] for request_id in range(4)}
    pending: list[StepPlan] = []
    for _ in range(200):
        while (plan := scheduler.schedule(0.0)) is not None:
            pending.append(plan)
        if not pending:
            break
        plan = pending.pop(0)
        drawing = requests_of(scheduler, plan)
        outputs = scheduler.update(plan.step_id, [len(received[one]) for one in drawing])
        for request_id, (token, _) in tokens_of(outputs).items():
            received[request_id].append(token)
    assert all(tokens == list(range(9)) for tokens in received.values())
    assert scheduler.pages_free == scheduler.pages_total


def test_a_request_runs_ahead_until_a_draw_is_refused_and_again_some_tokens_later() -> None:
    scheduler = Scheduler(make_limits())
    scheduler.add(constrained(1, [7, 8, 9], 40, ahead=True))
    for _ in range(2):
        planned(scheduler)
    assert tokens_of(scheduler.update(0, [20])) == {1: (20, None)}
    planned(scheduler)
    assert not scheduler.update(1, [21], refused=[0])
    plan = planned(scheduler)
    slot, token, of_output = unpack_int32(plan.redrawn)
    assert (position_of(plan, slot), token, of_output) == (3, 20, 1), "the last that is known"
    assert not scheduler.update(2, [22], refused=[0]), "it came behind the refused one"
    known, step = 1, 3
    for _ in range(LEAST_CAUTION):
        assert scheduler.schedule(0.0) is None
        assert tokens_of(scheduler.update(step, [30])) == {1: (30, None)}
        known, step = known + 1, step + 1
        plan = planned(scheduler)
        assert list(unpack_int32(plan.decode_positions)) == [3 + known - 1]
    assert list(unpack_int32(planned(scheduler).decode_positions)) == [3 + known], "ahead again"


REFUSED = 999
"""What a device draws that no grammar allows."""


class DeviceDraw(NamedTuple):
    request_id: int
    place: int  # of the token in the output
    is_wrong: bool
    is_of_right_token: bool


class Device:
    """Draws the tokens 0, 1, 2, ... of each request, and for those with a grammar now and then one that it refuses. A
    token counts if the row that drew it had the right token as its input."""

    def __init__(self, scheduler: Scheduler, share: float, seed: int) -> None:
        self.scheduler = scheduler
        self.rng = random.Random(seed)
        self.share = share
        self.received: dict[int, list[int]] = {}
        self.last_token: dict[int, int] = {}  # of each slot
        self.in_flight: deque[tuple[int, list[DeviceDraw]]] = deque()

    def plan(self) -> bool:
        plan = self.scheduler.schedule(0.0)
        if plan is None:
            return False
        drawing = self.scheduler._life.in_flight.find(plan.step_id).drawing
        redrawn = unpack_int32(plan.redrawn)
        self.last_token |= dict(zip(redrawn[::3], redrawn[1::3], strict=True))
        rows = [(chunk.slot, chunk.start + chunk.length) for chunk in plan.chunks if chunk.draws]
        decodes = zip(unpack_int32(plan.decode_slots), unpack_int32(plan.decode_positions), strict=True)
        inputs: list[int | None] = [None] * len(rows)
        for slot, position in decodes:
            rows.append((slot, position + 1))
            inputs.append(self.last_token[slot])
        draws = []
        for request, (slot, at), token in zip(drawing, rows, inputs, strict=True):
            index = at - request.prompt_len
            wanted = index - 1 if index else request.tokens.prompt[-1]
            is_wrong = request.is_constrained and self.rng.random() < self.share
            draws.append(DeviceDraw(request.request_id, index, is_wrong, token is None or token == wanted))
            self.last_token[slot] = REFUSED if is_wrong else index
        for chunk, record in zip(plan.chunks, self.scheduler._life.in_flight.find(plan.step_id).chunks, strict=True):
            if chunk.init is not None and chunk.init.grammar:
                assert list(unpack_int32(chunk.init.output_token_ids)) == self.received[record.request.request_id]
        self.in_flight.append((plan.step_id, draws))
        self.scheduler.prepare()
        return True

    def answer(self) -> None:
        step_id, draws = self.in_flight.popleft()
        record = self.scheduler._life.in_flight.find(step_id)
        refused = []
        for place, draw in enumerate(draws):
            known = len(self.received[draw.request_id])
            if record.drawing[place].is_constrained and (draw.place != known or draw.is_wrong):
                assert draw.place >= known or record.drawing[place].ended
                refused.append(place)
            elif not record.drawing[place].ended:
                assert draw.is_of_right_token
        outputs = self.scheduler.update(step_id, [draw.place for draw in draws], refused=refused)
        for request_id, (token, _) in tokens_of(outputs).items():
            self.received[request_id].append(token)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.4])
def test_every_request_gets_each_token_once_whatever_is_refused_preempted_or_lost(share: float) -> None:
    for seed in range(30):
        rng = random.Random(seed)
        scheduler = Scheduler(make_limits(num_pages=10, num_slots=4, steps_in_flight=2))
        device = Device(scheduler, share, seed)
        wanted = {}
        for request_id in range(6):
            max_tokens = rng.randint(1, 14)
            wanted[request_id] = list(range(max_tokens))
            prompt, tenant = [rng.randrange(50) for _ in range(rng.randint(1, 9))], rng.choice("ab") if seed % 3 else ""
            submit = constrained(request_id, prompt, max_tokens, ahead=rng.random() < 0.7, tenant=tenant)
            scheduler.add(submit if rng.random() < 0.8 else msgspec.structs.replace(submit, grammar=""))
            device.received[request_id] = []
        for _ in range(2000):
            while device.plan():
                pass
            if not device.in_flight:
                break
            event = rng.random()
            if event < 0.03 and (victims := list(scheduler._life.running.victims())):
                scheduler._life.preemption.preempt(rng.choice(victims))
            elif event < 0.04:
                device.in_flight.clear()
                scheduler.worker_lost()
                scheduler._trials._suspects.clear()
                scheduler._trials.are_held = False
                scheduler.renew(None)
            else:
                device.answer()
        assert device.received == wanted
        assert scheduler.pages_free == scheduler.pages_total
        assert not scheduler.request_ids
