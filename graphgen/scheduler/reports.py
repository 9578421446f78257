"""What the engine says of itself to those that route requests to it: how much there is to do, and how fast it is done.

Pure, and reads no more than a few numbers of each running request: it is asked for ten times a second between two
plans. Called by `graphgen.scheduler.policy`.
"""

from graphgen.ipc.attended import Attended
from graphgen.ipc.reports import EngineReport
from graphgen.scheduler.life import WorkerLife
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.tenants import Tenants


def report_of(
    life: WorkerLife, limits: SchedulerLimits, tenants: Tenants, num_steps: int, is_serving: bool, sender: int
) -> EngineReport:
    """Of one worker group, and of all requests that have not ended. num_steps: since the engine's start. sender: who
    asks, and knows better what is its own."""
    prompt_tokens = tenants.num_waiting_tokens + sum(begun.num_missing for begun in life.running.begun)
    output_tokens = life.guard.expected_outputs()
    num_open, own = sum(one.num_open for one in tenants.of_sender), tenants.of_sender[sender]
    own_prompt, own_output = prompt_tokens, output_tokens
    if own.num_open < num_open:
        own_begun = sum(begun.num_missing for begun in life.running.begun if begun.request.sender == sender)
        own_prompt = own.num_waiting_tokens + own_begun
        own_output = life.guard.expected_outputs_of(sender)
    return EngineReport(
        epoch=life.epoch,
        is_serving=is_serving,
        num_open=num_open,
        num_tenants=len(tenants),
        prompt_tokens=prompt_tokens,
        output_tokens=round(output_tokens),
        num_others=num_open - own.num_open,
        others_prompt_tokens=prompt_tokens - own_prompt,
        others_output_tokens=round(max(0.0, output_tokens - own_output)),
        num_steps=num_steps,
        pages_free=life.cache.pool.num_free,
        prompt_token_s=_prompt_token_s(life),
        output_token_s=_output_token_s(life, limits.num_slots),
        step_s=_step_s(life, prompt_tokens),
    )


def _prompt_token_s(life: WorkerLife) -> float:
    """In a step at the saturation point that holds nothing else; 0 where that is not known."""
    num_rows = life.budget.most_prompt_rows
    step_ms = None if num_rows is None else life.budget.prompt_step_ms(num_rows)
    return 0.0 if step_ms is None or num_rows is None else step_ms / 1000.0 / num_rows


def _output_token_s(life: WorkerLife, num_slots: int) -> float:
    """In a step of as many decodes as may run, at as many positions as those of now; 0 where that is not known."""
    step_ms = life.budget.decode_ms(num_slots, num_slots * _positions_each(life))
    return 0.0 if step_ms is None else step_ms / 1000.0 / num_slots


def _step_s(life: WorkerLife, prompt_tokens: int) -> float:
    """Of the next steps; of an idle engine, that of one decode."""
    num_decodes = max(1, len(life.running.decodes))
    positions = num_decodes * _positions_each(life)
    step_ms = life.budget.decode_ms(num_decodes, positions)
    if prompt_tokens and (bucket := life.budget.usual(num_decodes, positions, prompt_tokens)) is not None:
        rows = min(bucket.prefill_rows, prompt_tokens)
        step_ms = life.budget.bucket_ms(bucket, Attended(positions).with_chunk(0, rows)) or step_ms
    return 0.0 if step_ms is None else step_ms / 1000.0


def _positions_each(life: WorkerLife) -> int:
    decodes = life.running.decodes
    return decodes.num_positions // len(decodes) if len(decodes) else 0
