"""The steps before the first request: everything a request passes, scheduler, worker and device, has been passed once.

Owns two requests and a policy of its own that serves them and is thrown away: the one that serves users starts with
all pages free, an empty prefix cache and counters at zero. What the worker's slots and pages keep of them is
overwritten by whoever gets them next, as after any request. Called by `graphgen.scheduler.process`.

What would otherwise be left to the first request: code that Python has never run, and on the device whatever a library
does at its first call.
"""

import time
from collections.abc import Callable

from graphgen.ipc.codec import pack_int32
from graphgen.ipc.engine_messages import Submit
from graphgen.ipc.step_schema import unpack_columns
from graphgen.ipc.worker_messages import SamplerParams, StepPlan, StepResult, WorkerCounters
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.policy import Scheduler

PROMPT_LEN = 8
MAX_TOKENS = 3
SAMPLERS = (
    SamplerParams(),
    SamplerParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1, frequency_penalty=0.1),
)
"""One request each: greedy, and with every rule of a draw."""


def warm_up(
    limits: SchedulerLimits, send: Callable[[StepPlan], None], receive: Callable[[], StepResult]
) -> WorkerCounters:
    """Serves the requests to their end; returns what the worker has counted by then.

    Does nothing where the model's context or the cache has no room for such a request. Logits that are not numbers are
    for real requests to report.
    """
    policy = Scheduler(limits)
    counters = WorkerCounters()
    most_positions = limits.num_pages // len(limits.windows) * limits.page_size
    prompt_len = min(PROMPT_LEN, limits.max_model_len - MAX_TOKENS, most_positions - MAX_TOKENS)
    if prompt_len < 1:
        return counters
    for number, sampler in enumerate(SAMPLERS):
        policy.add(Submit(number, pack_int32([0] * prompt_len), MAX_TOKENS, 0, (), sampler, 0.0))
    while policy.running or policy.waiting or policy.steps_in_flight:
        while (plan := policy.schedule(time.monotonic())) is not None:
            send(plan)
            policy.prepare()
        result = receive()
        policy.fail_draws(result.step_id, result.failed_draws)
        policy.update(result.step_id, unpack_columns(result.drawn)["token_ids"])
        counters = result.counters
    return counters
