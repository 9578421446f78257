"""Any interleaving of requests, cancels, plans and results keeps the promises of the policy.

The promises themselves are in `Harness`: it checks every plan, every row the fake worker computes and every output.
"""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.scheduler.fake_worker import VOCABULARY
from tests.scheduler.harness import Harness, make_limits, make_submit

token_ids = st.integers(0, VOCABULARY - 1)


class AnyInterleaving(RuleBasedStateMachine):
    harness: Harness

    @initialize(
        num_pages=st.integers(6, 20),
        page_size=st.sampled_from([1, 2, 4]),
        max_running=st.integers(1, 4),
        max_chunks=st.integers(1, 3),
        token_budget=st.sampled_from([8, 10, 12]),
        steps_in_flight=st.integers(1, 3),
    )
    def start(
        self,
        num_pages: int,
        page_size: int,
        max_running: int,
        max_chunks: int,
        token_budget: int,
        steps_in_flight: int,
    ) -> None:
        self.harness = Harness(
            make_limits(
                num_pages=num_pages,
                page_size=page_size,
                max_running=max_running,
                max_chunks=max_chunks,
                token_budget=token_budget,
                steps_in_flight=steps_in_flight,
            )
        )

    @rule(data=st.data(), max_tokens=st.integers(1, 12), min_tokens=st.integers(0, 4), stops=st.booleans())
    def add(self, data: st.DataObject, max_tokens: int, min_tokens: int, stops: bool) -> None:
        limits = self.harness.limits
        positions = min(limits.num_pages * limits.page_size, limits.max_model_len - 1)
        max_tokens = min(max_tokens, positions)
        prompt_len = data.draw(st.integers(1, min(30, positions - max_tokens + 1)), label="prompt_len")
        request_id = len(self.harness.clients)
        prompt = [(7 * request_id + 3 * position) % VOCABULARY for position in range(prompt_len)]
        stop = tuple(range(0, VOCABULARY, 4)) if stops else ()
        self.harness.add(make_submit(request_id, prompt, max_tokens, min_tokens=min(min_tokens, max_tokens), stop=stop))

    @precondition(lambda self: self.harness.clients)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.harness.cancel(data.draw(st.integers(0, len(self.harness.clients)), label="request_id"))

    @rule(times=st.integers(1, 3))
    def schedule(self, times: int) -> None:
        for _ in range(times):
            in_flight = self.harness.scheduler.steps_in_flight
            if self.harness.schedule() is None:
                idle = not self.harness.scheduler.running and not self.harness.scheduler.waiting
                assert in_flight or idle, "there is work, nothing is in flight, and nothing was planned"
            assert self.harness.scheduler.steps_in_flight <= self.harness.limits.steps_in_flight

    @precondition(lambda self: self.harness.results)
    @rule()
    def deliver(self) -> None:
        self.harness.deliver()

    @rule(times=st.integers(1, 6))
    def serve(self, times: int) -> None:
        """The usual rhythm: as many plans as may be in flight, then one result."""
        for _ in range(times):
            while self.harness.schedule() is not None:
                pass
            if self.harness.results:
                self.harness.deliver()

    @invariant()
    def every_page_and_slot_has_at_most_one_owner(self) -> None:
        self.harness.check_page_owners()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.run()


TestAnyInterleaving = AnyInterleaving.TestCase
TestAnyInterleaving.settings = settings(
    max_examples=120, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_a_crowded_pool_preempts_often_and_loses_nothing(steps_in_flight: int) -> None:
    harness = Harness(make_limits(num_pages=10, page_size=2, steps_in_flight=steps_in_flight))
    for request_id in range(12):
        prompt = [(5 * request_id + position) % VOCABULARY for position in range(1 + request_id % 7)]
        harness.add(make_submit(request_id, prompt, max_tokens=9 + request_id % 5))
    harness.run()
    assert harness.scheduler.counters.preemptions >= 5
