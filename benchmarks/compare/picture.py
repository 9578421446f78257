"""The picture of a comparison: gaps between tokens, rates and first tokens of each engine under each workload."""

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.compare.figures import Comparison, ServedRow
from benchmarks.plots import COLOURS, DOTS_PER_INCH, PADDING_COLOUR, draw_latencies, log_axis, mark_handles

Place = Callable[[ServedRow], float]
OURS = "graphgen"


def plot_comparison(found: Comparison, path: Path) -> None:
    draw_comparison(found).savefig(path)


def draw_comparison(found: Comparison) -> Figure:
    """A group of lines for each workload, a line for each engine, in the order of the file."""
    engines = list(dict.fromkeys(row.engine for row in found.rows))
    colours = {engine: COLOURS[index % len(COLOURS)] for index, engine in enumerate(engines)}
    figure = Figure(figsize=(16, 9.5), dpi=0.85 * DOTS_PER_INCH, layout="constrained")
    gaps, rates, first_tokens = figure.subplots(1, 3, sharey=True)
    place = _places(found)
    lines = [(place(row), colours[row.engine], msgspec.structs.asdict(row)) for row in found.rows]
    draw_latencies(gaps, lines, "itl")
    log_axis(gaps, (5, 10, 20, 50, 100, 200, 500))
    gaps.set_title("How long until the next token?  (left is better)", fontsize=11)
    gaps.set_xlabel("gap between two tokens of a request, ms (log scale)")
    _draw_rates(rates, found, colours, place)
    draw_latencies(first_tokens, lines, "ttft")
    log_axis(first_tokens, (50, 100, 200, 500, 1000, 2000, 5000))
    first_tokens.set_title("How long until the first token?  (left is better)", fontsize=11)
    first_tokens.set_xlabel("from the request to its first token, ms (log scale)")
    _label_workloads(gaps, found)
    handles = [Patch(color=colour, label=engine) for engine, colour in colours.items()]
    figure.legend(handles=[*handles, *mark_handles(longest=False)], fontsize=9, loc="outside lower center", ncols=4)
    figure.suptitle(f"{message(found)}\n{found.about.device}, {found.about.date}; {found.about.model}", fontsize=12)
    return figure


def message(found: Comparison) -> str:
    """What came out: the range of the gaps, and in how many workloads the rate is the highest."""
    ours = [row for row in found.rows if row.engine == OURS]
    others = [row for row in found.rows if not row.engine.startswith(OURS)]
    first = sum(
        row.request_throughput >= max(other.request_throughput for other in others if other.workload == row.workload)
        for row in ours
    )
    gap = max(row.p95_itl_ms for row in ours)
    low, high = min(row.p95_itl_ms for row in others), max(row.p95_itl_ms for row in others)
    return (
        f"95 of 100 tokens follow within {gap:.0f} ms with graphgen, within {low:.0f} to {high:.0f} ms with the others;"
        f" its rate is the highest in {first} of {len(ours)} workloads"
    )


def _places(found: Comparison) -> Place:
    """The height of a row: workloads from the top down, their engines within."""
    of = {workload: [row.engine for row in found.rows if row.workload == workload] for workload in found.workloads}
    heights = {}
    for number, (workload, engines) in enumerate(of.items()):
        for index, engine in enumerate(engines):
            heights[workload, engine] = -number + 0.38 - (index + 0.5) * 0.76 / len(engines)
    return lambda row: heights[row.workload, row.engine]


def _draw_rates(axes: Axes, found: Comparison, colours: Mapping[str, str], place: Place) -> None:
    """Each rate as a share of its workload's highest, so that workloads of any size share an axis."""
    for workload in found.workloads:
        rows = [row for row in found.rows if row.workload == workload]
        best = max(row.request_throughput for row in rows)
        for row in rows:
            share, height = 100.0 * row.request_throughput / best, 0.7 / len(rows)
            axes.barh(place(row), share, height, color=colours[row.engine], alpha=0.35)
            axes.barh(place(row), 100.0 * row.goodput_itl_20ms / best, height, color=colours[row.engine])
            axes.text(share + 1, place(row), f"{row.request_throughput:.1f} a second", va="center", fontsize=8)
    axes.set_xlim(0, 128)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("% of the workload's highest rate: all requests (pale), in time at 20 ms a token (solid)")
    axes.set_title("How many requests a second?  (right is better)", fontsize=11)
    axes.grid(axis="x", alpha=0.3)


def _label_workloads(axes: Axes, found: Comparison) -> None:
    labels = []
    for workload in found.workloads:
        lengths, _, clients = workload.partition(":")
        prompt, _, output = lengths.partition("/")
        labels.append(f"{clients} clients\n{prompt} tokens in\n{output} out")
    axes.set_yticks([-number for number in range(len(labels))], labels, fontsize=9)
    axes.set_ylim(-len(labels) + 0.5, 0.5)
    for number in range(1, len(labels)):
        for panel in axes.figure.axes:
            panel.axhline(0.5 - number, color=PADDING_COLOUR, linewidth=0.8)
