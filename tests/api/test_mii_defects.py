"""Ten defects of DeepSpeed-MII 0.3, the first engine with Dynamic SplitFuse, each with the test that keeps it out.

D1   tokens lost by preemption            tests/scheduler/test_requests.py, a_preempted_request_keeps_its_output
D2   a prompt that does not fit kills     tests/scheduler/test_requests.py, a_prompt_that_does_not_fit_yet_waits
D3   mixed sampling parameters kill       tests/scheduler/test_requests.py, requests_with_different_sampling
D4   mixed stop strings kill              tests/api/test_engine.py, requests_with_different_numbers_of_stop_strings
D5   stop strings switch EOS off          here
D6   min_tokens counts the prompt         tests/scheduler/test_requests.py, min_tokens_counts_output
D7   temperature 0 is refused             here
D8   temperature after top-k and top-p    here
D9   state grows with parameter values    here
D10  a client that leaves leaks pages     tests/api/test_engine.py, leaving_a_stream_frees_its_pages; its tokens here
"""

import gc
import types

import torch

from graphgen import SamplingParams
from graphgen.ipc.ggp.messages import SamplingDefaults
from graphgen.ipc.worker_messages import SamplerParams, SlotInit
from graphgen.models.sampling import make_sampler, pack_slot
from graphgen.scheduler.policy import Scheduler
from tests.scheduler.harness import make_limits, make_submit


def test_d7_temperature_zero_is_greedy_and_draws_the_likeliest_token_whatever_the_seed() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.9, 0.0]]).repeat(16, 1)
    greedy = [SamplingParams(temperature=0, seed=seed) for seed in range(16)]
    drawn = _draw(logits, [sampling.resolve_sampler(SamplingDefaults(), 0) for sampling in greedy])
    assert drawn == [1] * 16


def test_d8_the_temperature_flattens_before_top_p_chooses() -> None:
    # At temperature 1 two tokens hold 90 %; at 100 all four are nearly equal, and four are needed for 90 %.
    logits = torch.tensor([[4.0, 3.0, 1.0, 0.0]]).repeat(200, 1)
    hot = [SamplerParams(temperature=100.0, top_p=0.9, seed=seed) for seed in range(200)]
    cool = [SamplerParams(temperature=1.0, top_p=0.9, seed=seed) for seed in range(200)]
    assert set(_draw(logits, hot)) == {0, 1, 2, 3}
    assert set(_draw(logits, cool)) == {0, 1}


def test_d9_nothing_is_kept_of_requests_that_ended_whatever_their_parameters() -> None:
    scheduler = Scheduler(make_limits(num_pages=40, prefix_cache=False))

    def serve(first_id: int) -> int:
        """Objects that the scheduler holds on to after 200 requests, no two with equal parameters."""
        for request_id in range(first_id, first_id + 200):
            scheduler.add(
                make_submit(
                    request_id,
                    [1, 2, 3],
                    4,
                    stop=[request_id],
                    sampler=SamplerParams(temperature=1.0 + request_id, top_k=request_id, seed=request_id),
                    priority=request_id % 10,
                    itl_target_ms=1.0 + request_id,
                    ttft_target_ms=1.0 + request_id,
                    cache_salt=str(request_id),
                )
            )
        while (plan := scheduler.schedule(0.0)) is not None:
            scheduler.update(plan.step_id, [7] * plan.num_drawing_rows)
        assert (scheduler.running, scheduler.waiting) == (0, 0)
        return _num_reachable(scheduler)

    serve(1000)
    before = serve(2000)
    assert serve(3000) <= before + 20  # an odd integer, not an object for each request


def test_d10_tokens_of_a_request_that_was_cancelled_in_flight_reach_nobody() -> None:
    scheduler = Scheduler(make_limits())
    scheduler.add(make_submit(0, [1, 2], 10))
    scheduler.schedule(0.0)
    scheduler.schedule(0.0)
    scheduler.cancel(0)
    assert scheduler.pages_free == scheduler.pages_total
    assert not any(scheduler.update(step_id, [5]) for step_id in (0, 1))
    assert scheduler.schedule(0.0) is None


def _draw(logits: torch.Tensor, samplers: list[SamplerParams]) -> list[int]:
    """One token for each row, by its own rules."""
    count, vocab_size = logits.shape
    sampler = make_sampler(count, vocab_size, torch.device("cpu"))
    slots = torch.arange(count)
    rows = [torch.from_numpy(pack_slot(SlotInit(1, 0, (), one), vocab_size)) for one in samplers]
    sampler.write_slots(torch.stack(rows), slots, torch.ones(count, dtype=torch.int32))
    return [int(token) for token in sampler.sample(logits, slots, torch.full((count,), 5))]


def _num_reachable(root: object) -> int:
    """Objects that the collector finds from `root`, classes and modules left out."""
    seen: set[int] = set()
    todo: list[object] = [root]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType | types.FunctionType):
            continue
        seen.add(id(one))
        todo.extend(gc.get_referents(one))
    return len(seen)
