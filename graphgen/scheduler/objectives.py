"""What the engine is to be good at where requests state no target: short gaps, or a high rate.

Owns the numbers of the three objectives. `graphgen.scheduler.budget` chooses the size of steps by them,
`graphgen.scheduler.prompts` says by them when a first token is in a hurry.

Up to the saturation point larger steps compute more prompt tokens a second, and every objective takes them. Beyond it a
larger step gains a little more, most beside many decodes, whose rows and positions cost the same in a small step. It
also makes every gap longer, so that requests decode longer, more of them decode at once and fewer wait. Where few wait,
larger steps are not full, and the rate falls instead of rising. So steps grow only when the prompts that are left fill
the larger size many times over. Larger steps themselves shorten the queue that they were chosen for; so with `balanced`
they stay until it is half as long, and do not end while the load would still keep them full.
"""

from collections.abc import Iterable, Mapping

from msgspec import Struct

from graphgen.ipc.engine_messages import ObjectiveName
from graphgen.ipc.worker_messages import Bucket

JUDGED_ROWS = 1024
"""See `judged`."""


class Objective(Struct, frozen=True):
    """How far steps grow beyond the saturation point."""

    num_backlog_steps: int | None
    """Steps grow beyond the saturation point when the prompts that are left fill so many of the larger size. None:
    never."""
    num_kept_steps: int = 0
    """Steps that have grown stay larger while the prompts that are left fill so many."""
    most_ms: float | None = None
    """What such a step may take; None: any time."""
    hurry_share: float | None = None
    """Steps grow to the token budget when a first token would come later than this share of its request's target, if
    the request asks nothing of its gaps, and also when it is late already. None: as for all others, when the target
    would be missed."""


OBJECTIVES: Mapping[ObjectiveName, Objective] = {
    "latency": Objective(num_backlog_steps=None),
    "balanced": Objective(num_backlog_steps=28, num_kept_steps=14, most_ms=30.0, hurry_share=0.5),
    "throughput": Objective(num_backlog_steps=8, num_kept_steps=8, hurry_share=0.5),
}


def judged(buckets: Iterable[Bucket], objective: Objective) -> list[Bucket]:
    """Those among which the saturation point is found: all that hold prompts, or where the objective grows steps, those
    of up to JUDGED_ROWS rows, or half of the largest if that is more.

    The largest are there for growing. A start that times them 5 % too short, which happens, would take 1024 rows for
    the saturation point of an 8B model on an H200, where 512 compute 0.96 of what 1024 do: simulated, that costs
    `throughput` 2 to 4 % of its rate where few prompts wait, and makes the median gap 22 ms where it is 15.
    """
    mixed = [bucket for bucket in buckets if bucket.prefill_rows]
    if objective.num_backlog_steps is None:
        return mixed
    most_rows = max(JUDGED_ROWS, max((bucket.num_rows for bucket in mixed), default=0) // 2)
    return [bucket for bucket in mixed if bucket.num_rows <= most_rows]
