"""What planning a step costs, as requests run and wait. Called by `benchmarks.simulate`."""

from collections.abc import Sequence

from benchmarks.metrics import Figures
from benchmarks.report import percentile
from benchmarks.virtual_engine import StepSeries

RUNNING_EDGES = (0, 1, 8, 32, 64, 128, 256)
WAITING_EDGES = (-1, 0, 100, 1000, 10_000, 100_000)
"""Steps are grouped by counts above one edge and up to the next."""


def cost_rows(runs: Sequence[tuple[str, StepSeries]]) -> list[Figures]:
    """CPU time of the policy for one step, by policy and by how many requests ran and waited. runs: name of the policy,
    and its steps."""
    groups: dict[tuple[str, int, int], list[float]] = {}
    for name, steps in runs:
        for running, waiting, cpu_us in zip(steps.running, steps.waiting, steps.cpu_us, strict=True):
            place = name, group_of(running, RUNNING_EDGES), group_of(waiting, WAITING_EDGES)
            groups.setdefault(place, []).append(cpu_us)
    return [
        {
            "policy": policy,
            "running": range_of(RUNNING_EDGES, running),
            "waiting": range_of(WAITING_EDGES, waiting),
            "steps": len(costs),
            "p50 us": percentile(costs, 50),
            "p99 us": percentile(costs, 99),
        }
        for (policy, running, waiting), costs in sorted(groups.items())
    ]


def group_of(count: int, edges: Sequence[int]) -> int:
    """Number of the group of a count: that of the edge below it; a count above all is in the last."""
    return next((index for index, edge in enumerate(edges[1:]) if count <= edge), len(edges) - 2)


def range_of(edges: Sequence[int], index: int) -> str:
    low, high = edges[index] + 1, edges[index + 1]
    return str(low) if low == high else f"{low}-{high}"
