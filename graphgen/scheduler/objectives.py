"""What the engine is to be good at where requests state no target: short gaps, or a high rate.

Owns the numbers of the three objectives. `graphgen.scheduler.budget` chooses the size of steps by them,
`graphgen.scheduler.prompts` says by them when a first token is in a hurry.

Up to the saturation point larger steps compute more prompt tokens a second, and every objective takes them. Beyond it a
larger step gains a little more, most beside many decodes, whose rows and positions cost the same in a small step. It
also makes every gap longer, so that requests decode longer, more of them decode at once and fewer wait. Where few wait,
larger steps are not full, and the rate falls instead of rising. So a step is larger only while the prompts that are
left fill it many times over.
"""

from collections.abc import Mapping

from msgspec import Struct

from graphgen.ipc.messages import ObjectiveName


class Objective(Struct, frozen=True):
    """How far steps grow beyond the saturation point."""

    num_backlog_steps: int | None
    """A step larger than the saturation point is taken while the prompts that are left fill so many of its size. None:
    never."""
    most_ms: float | None = None
    """What such a step may take; None: any time."""
    hurry_share: float | None = None
    """Steps grow to the token budget when a first token would come later than this share of its request's target, if
    the request asks nothing of its gaps, and also when it is late already. None: as for all others, when the target
    would be missed."""


OBJECTIVES: Mapping[ObjectiveName, Objective] = {
    "latency": Objective(num_backlog_steps=None),
    "balanced": Objective(num_backlog_steps=16, most_ms=30.0, hurry_share=0.5),
    "throughput": Objective(num_backlog_steps=8, hurry_share=0.5),
}
