"""What the rows of requests with a grammar read of pages, when draws are refused, repeated, and left behind.

A FakeWorker executes the plans, so that a token that is wrong, or lies in the wrong page, changes what is drawn.
"""

import random
from collections import deque

import msgspec
import pytest

from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.worker_messages import SamplerParams
from graphgen.scheduler.policy import Scheduler
from tests.scheduler.fake_worker import VOCABULARY, FakeWorker, Windows, generate
from tests.scheduler.harness import make_limits, make_submit, tokens_of

NUM_SEEDS = 40
Drawn = tuple[int, int, int, bool]
"""The request, where in its output, the token, and whether its grammar refuses it."""


class Engine:
    """Some requests, most of which follow a grammar that allows the token that is drawn from the right context."""

    def __init__(self, seed: int, share: float, windows: Windows) -> None:
        """share: of the draws that are wrong."""
        self.rng = rng = random.Random(seed)
        self.share, self.windows = share, windows
        page_size = rng.choice([1, 2, 4])
        self.limits = make_limits(
            num_pages=24 if page_size == 4 else 90,
            page_size=page_size,
            windows=windows,
            steps_in_flight=rng.choice([1, 2, 3]),
            prefix_cache=rng.random() < 0.8,
        )
        self.scheduler = Scheduler(self.limits)
        self.in_flight: deque[tuple[int, list[Drawn]]] = deque()
        self.wanted: dict[int, list[int]] = {}
        self.received: dict[int, list[int]] = {}
        self.beginning = [rng.randrange(VOCABULARY) for _ in range(9)]
        self.start_worker()

    def start_worker(self) -> None:
        self.in_flight.clear()
        self.worker = FakeWorker(self.limits.num_pages, self.limits.page_size, self.windows)

    def add(self, request_id: int) -> None:
        rng = self.rng
        length, max_tokens = rng.randint(1, 9), rng.randint(1, 14)
        prompt = self.beginning[:length]
        if rng.random() < 0.4:
            prompt = [rng.randrange(VOCABULARY) for _ in prompt]
        stop = [rng.randrange(VOCABULARY)] if rng.random() < 0.5 else []
        sampler = SamplerParams(frequency_penalty=rng.choice([0.0, 0.0, 0.5]))  # with one it does not run ahead
        submit = make_submit(request_id, prompt, max_tokens, stop=stop, sampler=sampler, tenant=rng.choice("aaab"))
        if rng.random() < 0.7:
            submit = msgspec.structs.replace(submit, grammar="g")
        self.scheduler.add(submit)
        tokens = generate(prompt, max_tokens, stop, 0, self.windows)
        end = next((place for place, token in enumerate(tokens, 1) if token in stop), max_tokens)
        self.wanted[request_id], self.received[request_id] = tokens[:end], []

    def plan(self) -> bool:
        plan = self.scheduler.schedule(0.0)
        if plan is None:
            return False
        token_ids, _ = self.worker.execute(plan)
        rows = [(chunk.slot, chunk.start + chunk.length) for chunk in plan.chunks if chunk.draws]
        decodes = zip(unpack_int32(plan.decode_slots), unpack_int32(plan.decode_positions), strict=True)
        rows += [(slot, position + 1) for slot, position in decodes]
        drawn: list[Drawn] = []
        requests = self.scheduler.find_step(plan.step_id).drawing
        for request, (slot, position), token_id in zip(requests, rows, token_ids, strict=True):
            is_wrong = request.is_constrained and self.rng.random() < self.share
            if is_wrong:
                self.worker.draw_instead(slot, (token_id + 1) % VOCABULARY)
            drawn.append((request.request_id, position - request.prompt_len, token_id, is_wrong))
        self.in_flight.append((plan.step_id, drawn))
        if self.rng.random() < 0.7:
            self.scheduler.prepare()
        return True

    def answer(self) -> None:
        step_id, drawn = self.in_flight.popleft()
        requests, refused = self.scheduler.find_step(step_id).drawing, []
        for place, (request_id, at, token_id, is_wrong) in enumerate(drawn):
            if requests[place].ended:
                continue
            if is_wrong or at != len(self.received[request_id]):
                assert requests[place].is_constrained
                refused.append(place)
            else:
                assert token_id == self.wanted[request_id][at]
        outputs = self.scheduler.update(step_id, [token_id for _, _, token_id, _ in drawn], refused=refused)
        for request_id, (token_id, _) in tokens_of(outputs).items():
            self.received[request_id].append(token_id)

    def disturb(self, event: float) -> bool:
        scheduler = self.scheduler
        if event < 0.04:
            scheduler._life.books.settle()
            victims = list(scheduler._life.running.victims())
            if victims:
                scheduler._life.preemption.preempt(self.rng.choice(victims))
        elif event < 0.05:
            scheduler.worker_lost()
            scheduler._trials._suspects.clear()
            scheduler._trials.are_held = False
            scheduler.renew(None)
            self.start_worker()
        elif event < 0.06 and scheduler.request_ids:
            request_id = self.rng.choice(scheduler.request_ids)
            scheduler.cancel(request_id)
            self.wanted[request_id] = self.received[request_id]
        return event < 0.06


@pytest.mark.parametrize("windows", [(None,), (None, 4), (3,)])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_every_row_reads_the_tokens_that_its_grammar_has_allowed(share: float, windows: Windows) -> None:
    for seed in range(NUM_SEEDS):
        engine = Engine(seed, share, windows)
        num_requests = engine.rng.randint(6, 12)
        for _ in range(3000):
            if len(engine.wanted) < num_requests and engine.rng.random() < 0.3:
                engine.add(len(engine.wanted))
            while engine.plan():
                pass
            if engine.in_flight and not engine.disturb(engine.rng.random()):
                engine.answer()
            elif len(engine.wanted) == num_requests and not engine.scheduler.request_ids and not engine.in_flight:
                break
        assert engine.received == engine.wanted
        assert engine.scheduler.pages_free == engine.scheduler.pages_total
        assert not engine.scheduler.request_ids
