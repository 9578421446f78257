"""The pictures of serving: throughput against latency, token latencies by percentile, a timeline of steps, and what
simulated policies promise and cost.

Only draws: the figures are made by `benchmarks.metrics`, `benchmarks.step_log` and `benchmarks.simulate`. Needs
matplotlib (the extra `bench`), so scripts import it when a picture is asked for.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.metrics import what_is_asked
from benchmarks.step_log import Step

Row = Mapping[str, Any]
"""A row of `benchmarks.serving`; its values are of many types."""

COLOURS = ("#1f6f8b", "#d1495b", "#edae49", "#5b8e7d", "#6d597a", "#8d6b4b", "#4ea5d9", "#e07a5f")
PADDING_COLOUR = "#d9d9d9"
DECODE_COLOUR = "#3d3d3d"
PLAN_COLOUR = "#d1495b"
STEP_COLOURS = ("#7a9e9f", "#b8d8d8")
LEGEND_COLOUR = "#555555"
LEVEL_MARKERS = "s^vD"
LEAST_COSTS = 30
DOTS_PER_INCH = 100


# --- serving ---------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """Rows that differ by one thing only, in its order."""

    name: str  # what they share
    key: str  # what they differ by: "clients" or "token_budget"
    rows: list[Row]

    def label(self, row: Row) -> str:
        value = row[self.key]
        return f"budget {value}" if self.key == "token_budget" else _clients(value)


def plot_serving(rows: Sequence[Row], device: str, path: Path) -> None:
    """Percentiles of token latency; beside them the throughput-latency curves, if rows differ by one thing only."""
    curves = throughput_curves(rows)
    figure = Figure(figsize=(16 if curves else 9, 5.6), dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(1, 3 if curves else 1, squeeze=False)[0]
    _draw_percentiles(panels[0], rows)
    if curves:
        _draw_latency_curves(panels[1], curves)
        _draw_service_levels(panels[2], curves)
    figure.suptitle(f"graphgen on {device}", fontsize=12)
    figure.savefig(path)


def throughput_curves(rows: Sequence[Row]) -> list[Curve]:
    """Curves over the number of clients; if there are none, over the token budget. Those of a single row are left out,
    and so are open loops, which have no clients."""
    closed = [row for row in rows if row["clients"] is not None]
    for key, other in (("clients", "token_budget"), ("token_budget", "clients")):
        groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
        for row in closed:
            groups[f"{row['prompt_mean']}/{row['output_mean']}{what_is_asked(row)}", row[other]].append(row)
        curves = [
            Curve(
                f"{lengths}, {f'budget {value}' if other == 'token_budget' else _clients(value)}",
                key,
                sorted(group, key=lambda row: int(row[key])),
            )
            for (lengths, value), group in groups.items()
            if len({row[key] for row in group}) > 1
        ]
        if curves:
            return curves
    return []


def _clients(count: int) -> str:
    return f"{count} client{'s' if count != 1 else ''}"


def _tail_place(percent: float) -> float:
    """Each further nine gets the same width."""
    return -math.log10(1.0 - percent / 100.0)


def _draw_percentiles(axes: Axes, rows: Sequence[Row]) -> None:
    budgets = len({row["token_budget"] for row in rows}) > 1
    last = 50.0
    for index, row in enumerate(rows):
        points = [(percent, value) for percent, value in row["itl_curve_ms"] if percent >= 50]
        last = max([last, *(percent for percent, _ in points)])
        axes.plot(
            [_tail_place(percent) for percent, _ in points],
            [value for _, value in points],
            color=COLOURS[index % len(COLOURS)],
            linestyle=("-", "--", ":")[index // len(COLOURS) % 3],
            marker=".",
            label=row["workload"] + what_is_asked(row) + (f", budget {row['token_budget']}" if budgets else ""),
        )
    ticks = [tick for tick in (50, 75, 90, 95, 99, 99.9, 99.99) if tick <= last]
    axes.set_xticks([_tail_place(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("percentile of all gaps")
    axes.set_ylabel("gap between two tokens of a request, ms")
    axes.set_title("How long until the next token?", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(title="prompt / output tokens : clients", title_fontsize=8, fontsize=8, loc="lower right")


def _draw_latency_curves(axes: Axes, curves: Sequence[Curve]) -> None:
    # Curves may lie on each other: the labels of every other one stand below its points.
    for curve, colour, lift in zip(curves, itertools.cycle(COLOURS), itertools.cycle((2, -10)), strict=False):
        throughputs = [row["request_throughput"] for row in curve.rows]
        latencies = [(row["mean_e2el_ms"] or 0.0) / 1000.0 for row in curve.rows]
        axes.plot(throughputs, latencies, marker="o", color=colour, label=curve.name)
        for row, point in zip(curve.rows, zip(throughputs, latencies, strict=True), strict=True):
            axes.annotate(
                curve.label(row),
                point,
                xytext=(-7, lift),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color=colour,
            )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests per second")
    axes.set_ylabel("mean time from request to last token, s")
    axes.set_title("Throughput against latency: right and low is good", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")


def _draw_service_levels(axes: Axes, curves: Sequence[Curve]) -> None:
    """All requests a second, and those that met each service level."""
    key = curves[0].key
    levels = [name for name in curves[0].rows[0] if name.startswith("goodput_itl_")]
    for curve, colour in zip(curves, itertools.cycle(COLOURS), strict=False):
        places = [row[key] for row in curve.rows]
        axes.plot(places, [row["request_throughput"] for row in curve.rows], "o--", color=colour, alpha=0.5)
        for level, marker in zip(levels, itertools.cycle(LEVEL_MARKERS), strict=False):
            axes.plot(places, [row[level] for row in curve.rows], f"{marker}-", color=colour)
    handles = [Line2D([], [], color=LEGEND_COLOUR, marker="o", linestyle="--", alpha=0.5, label="all requests")]
    for level, marker in zip(levels, itertools.cycle(LEVEL_MARKERS), strict=False):
        limit = level.removeprefix("goodput_itl_").removesuffix("ms")
        handles.append(
            Line2D([], [], color=LEGEND_COLOUR, marker=marker, label=f"in time, average gap {limit} ms at most")
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row[key] for curve in curves for row in curve.rows}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("clients" if key == "clients" else "token budget")
    axes.set_ylabel("requests per second")
    axes.set_title("Served in time: first token and every later one", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(handles=handles, fontsize=8, loc="lower right")


# --- simulation ------------------------------------------------------------------------------------------------


def plot_simulation(rows: Sequence[Row], costs: Sequence[Row], device: str, path: Path) -> None:
    """Above what every policy gives its requests, below what it costs: one panel a policy.

    rows, costs: those of `benchmarks.simulate`.
    """
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    figure = Figure(figsize=(16, 9), dpi=0.85 * DOTS_PER_INCH, layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.25, 1))[:, 0]
    gaps, served, first_tokens = above.subplots(1, 3)
    _draw_latencies(gaps, rows, policies, "itl")
    gaps.set_xlim(left=0)
    gaps.set_title("How long until the next token?", fontsize=11)
    _draw_served(served, rows, policies)
    _draw_latencies(first_tokens, rows, policies, "ttft")
    first_tokens.set_xscale("log")
    first_tokens.xaxis.set_major_formatter("{x:g}")
    first_tokens.set_title("How long until the first token?", fontsize=11)
    panels = below.subplots(1, len(policies), sharey=True, squeeze=False)[0]
    panels[0].set_ylim(0, 1.3 * max(row["p99 us"] for row in costs))  # room for the legends
    for panel, policy in zip(panels, policies, strict=True):
        _draw_costs(panel, [row for row in costs if row["policy"] == policy], policy)
    figure.suptitle(f"Simulated: the scheduling policy before a virtual {device}", fontsize=12)
    figure.savefig(path)


def _groups(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(workload, kind) pairs; a workload of several kinds is shown by these, not by all of its requests."""
    found = list(dict.fromkeys((row["workload"], row["kind"]) for row in rows))
    mixed = {workload for workload, kind in found if kind != "all"}
    return [(workload, kind) for workload, kind in found if kind != "all" or workload not in mixed]


def _bars(rows: Sequence[Row], policies: Sequence[str]) -> Iterator[tuple[float, float, str, Row]]:
    """(height, thickness, colour, row) of a bar for each policy in each group, groups from the top down."""
    thickness = 0.8 / len(policies)
    by_place = {(row["workload"], row["kind"], row["policy"]): row for row in rows}
    for number, group in enumerate(_groups(rows)):
        for index, policy in enumerate(policies):
            if (row := by_place.get((*group, policy))) is not None:
                yield -number + 0.4 - (index + 0.5) * thickness, thickness, COLOURS[index % len(COLOURS)], row


def _label_groups(axes: Axes, rows: Sequence[Row]) -> None:
    groups = _groups(rows)
    labels = [workload if kind == "all" else f"{workload}\n{kind}" for workload, kind in groups]
    axes.set_yticks([-number for number in range(len(groups))], labels, fontsize=8)
    axes.set_ylim(-len(groups) + 0.45, 0.55)
    axes.grid(axis="x", alpha=0.3)


def _draw_served(axes: Axes, rows: Sequence[Row], policies: Sequence[str]) -> None:
    """The share of the requests that met the service level, and how many a second that is."""
    for height, thickness, colour, row in _bars(rows, policies):
        served, in_time = row["request_throughput"], row["request_goodput"] or 0.0
        axes.barh(height, 100.0, 0.9 * thickness, color=colour, alpha=0.2)
        axes.barh(height, 100.0 * in_time / served if served else 0.0, 0.9 * thickness, color=colour)
        axes.text(101.5, height, f"{in_time:.1f} of {served:.1f}", va="center", fontsize=8)
    _label_groups(axes, rows)
    axes.set_ylim(bottom=axes.get_ylim()[0] - 1.0)  # a free row for the legend
    axes.set_xlim(0, 126)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("% of all requests; beside it requests a second")
    axes.set_title("Served in time: first token and every later one", fontsize=11)
    handles = [Patch(color=COLOURS[index % len(COLOURS)], label=name) for index, name in enumerate(policies)]
    axes.legend(handles=handles, title="policy", title_fontsize=8, fontsize=8, loc="lower left", ncols=len(handles))


def _draw_latencies(axes: Axes, rows: Sequence[Row], policies: Sequence[str], name: str) -> None:
    """A line from the median to the 99th percentile."""
    for height, _, colour, row in _bars(rows, policies):
        places = [row[f"{statistic}_{name}_ms"] for statistic in ("median", "p95", "p99")]
        if None not in places:
            axes.plot(places, [height] * 3, color=colour, linewidth=1.5)
            for place, marker in zip(places, "o|>", strict=True):
                axes.plot([place], [height], marker, color=colour, markersize=6)
    _label_groups(axes, rows)
    axes.set_xlabel("ms: median (dot), p95 (bar), p99 (arrow)")


def _draw_costs(axes: Axes, costs: Sequence[Row], policy: str) -> None:
    """A line for each number of running requests, over the length of the queue; a few steps say nothing of a tail."""
    costs = [row for row in costs if row["steps"] >= LEAST_COSTS]
    places = {waiting: index for index, waiting in enumerate(dict.fromkeys(row["waiting"] for row in _by_queue(costs)))}
    lines = dict.fromkeys(row["running"] for row in costs)
    for running, colour in zip(lines, itertools.cycle(COLOURS), strict=False):
        own = _by_queue([row for row in costs if row["running"] == running])
        for name, style in (("p50 us", "o-"), ("p99 us", "x:")):
            points = [places[row["waiting"]] for row in own], [row[name] for row in own]
            axes.plot(*points, style, color=colour, label=running if name == "p50 us" else None)
    axes.set_xticks(list(places.values()), list(places))
    axes.set_xlabel("waiting requests")
    axes.set_ylabel("CPU of one step, us (p99 dotted)")
    axes.set_title(f"What planning costs: {policy}", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(title="running requests", title_fontsize=8, fontsize=8, loc="upper left", ncols=3)


def _by_queue(costs: Sequence[Row]) -> list[Row]:
    return sorted(costs, key=lambda row: int(row["waiting"].partition("-")[0]))


# --- timeline --------------------------------------------------------------------------------------------------


def plot_timeline(steps: Sequence[Step], description: str, path: Path) -> None:
    """Planning above execution, then what every step held: prompt tokens by request, and decode rows."""
    figure = Figure(figsize=(16, 8), dpi=DOTS_PER_INCH, layout="constrained")
    planning, prompts, decodes = figure.subplots(3, 1, sharex=True, height_ratios=(1.1, 2.2, 1.3))
    origin_s = steps[0].started_s
    _draw_planning(planning, steps, origin_s)
    _draw_prompts(prompts, steps, origin_s)
    _draw_decodes(decodes, steps, origin_s)
    decodes.set_xlim(0, (steps[-1].finished_s - origin_s) * 1000.0)
    decodes.set_xlabel("time, ms")
    figure.suptitle(f"Every step of the engine, a bar as wide as it took.  {description}", fontsize=12)
    figure.savefig(path)


def _draw_planning(axes: Axes, steps: Sequence[Step], origin_s: float) -> None:
    for number, step in enumerate(steps):
        left, width = _bar(step, origin_s)
        planned = (step.planned_s - origin_s) * 1000.0
        axes.plot([planned, left], [1.0, 0.25], color=PLAN_COLOUR, linewidth=0.7, alpha=0.6)
        axes.plot([planned], [1.0], color=PLAN_COLOUR, marker="v", markersize=5)
        axes.barh(0.1, width, left=left, height=0.3, color=STEP_COLOURS[number % 2])
    axes.set_yticks([0.1, 1.0], ["the device\nruns the step", "the scheduler\nmakes its plan"])
    axes.set_ylim(-0.1, 1.2)
    axes.set_title(
        "Planning above execution: a line from each plan to the start of its step; white below is idle", fontsize=10
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_prompts(axes: Axes, steps: Sequence[Step], origin_s: float) -> None:
    # In order of appearance, so that prompts that follow each other differ.
    order = dict.fromkeys(request for step in steps for request, _, _ in step.chunks)
    colours = dict(zip(order, itertools.cycle(COLOURS), strict=False))
    for step in steps:
        left, width = _bar(step, origin_s)
        bottom = 0
        for request, _, length in step.chunks:
            _draw_rows(axes, left, width, bottom, length, colours[request])
            bottom += length
        axes.bar(left, step.bucket[0] - bottom, width, bottom, align="edge", color=PADDING_COLOUR)
    axes.set_ylim(0, 1.15 * max(1, *(step.bucket[0] for step in steps)))
    axes.set_ylabel("prompt tokens")
    axes.set_title("Prompt chunks: a colour for each prompt, so one that was split goes on in its colour", fontsize=10)
    handles = [Patch(color=PADDING_COLOUR, label="padding: rows of the step that hold no token")]
    axes.legend(handles=handles, fontsize=8, loc="upper right")
    axes.grid(axis="y", alpha=0.3)


def _draw_decodes(axes: Axes, steps: Sequence[Step], origin_s: float) -> None:
    for step in steps:
        left, width = _bar(step, origin_s)
        live = len(step.decodes)
        _draw_rows(axes, left, width, 0, live, DECODE_COLOUR)
        axes.bar(left, step.bucket[1] - live, width, live, align="edge", color=PADDING_COLOUR)
    axes.set_ylabel("decode rows")
    axes.set_title("Decodes: requests that get their next token in the same step", fontsize=10)
    axes.grid(axis="y", alpha=0.3)


def _draw_rows(axes: Axes, left: float, width: float, bottom: int, count: int, colour: str) -> None:
    axes.bar(left, count, width, bottom, align="edge", color=colour, edgecolor="white", linewidth=0.4)


def _bar(step: Step, origin_s: float) -> tuple[float, float]:
    return (step.started_s - origin_s) * 1000.0, (step.finished_s - step.started_s) * 1000.0
