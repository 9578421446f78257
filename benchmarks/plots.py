"""The pictures of serving: what every workload got, what simulated policies promise and cost, a timeline of steps.

Only draws: the figures are made by `benchmarks.metrics`, `benchmarks.step_log` and `benchmarks.simulate`. Needs
matplotlib (the extra `bench`), so scripts import it when a picture is asked for. A title says what its panel shows;
the title of a picture says what came out.
"""

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter

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
MARKS = {
    "median": ("o", "half are shorter (median)"),
    "p95": ("|", "95 of 100 are shorter"),
    "p99": (">", "99 of 100 are shorter"),
}
"""Of a line: statistic -> marker and what it says."""

MAX_MARK = ("x", "the longest of all")
LEAST_COSTS = 30
DOTS_PER_INCH = 100


# --- serving ---------------------------------------------------------------------------------------------------


def plot_serving(rows: Sequence[Row], device: str, path: Path) -> None:
    draw_serving(rows, device).savefig(path)


def draw_serving(rows: Sequence[Row], device: str) -> Figure:
    """A line for each row: the gaps between its tokens, its first tokens, its rate and what of that was in time."""
    asked = list(dict.fromkeys(what_is_asked(row) for row in rows))
    budgets = len({row["token_budget"] for row in rows}) > 1
    figure = Figure(figsize=(16, 2.6 + 0.36 * len(rows)), dpi=DOTS_PER_INCH, layout="constrained")
    gaps, first_tokens, rates = figure.subplots(1, 3, sharey=True)
    colours = [COLOURS[asked.index(what_is_asked(row)) % len(COLOURS)] for row in rows]
    places = [(-number, colour, row) for number, (colour, row) in enumerate(zip(colours, rows, strict=True))]
    draw_latencies(gaps, places, "itl", "max_itl_ms")
    gaps.set_title("How long until the next token?", fontsize=11)
    gaps.set_xlabel("gap between two tokens of a request, ms (axis does not begin at 0)")
    gaps.set_ylabel("tokens of prompt / output : clients")
    draw_latencies(first_tokens, places, "ttft")
    first_tokens.set_title("How long until the first token?", fontsize=11)
    log_axis(first_tokens)
    first_tokens.set_xlabel("from the request to its first token, ms (log scale)")
    _draw_rates(rates, places)
    gaps.set_yticks([place for place, _, _ in places], [_label(row, budgets) for row in rows], fontsize=9)
    gaps.set_ylim(-len(rows) + 0.4, 0.6)
    figure.legend(handles=mark_handles(longest=True), fontsize=9, loc="outside lower center", ncols=4)
    figure.suptitle(f"graphgen on {device}: {_gap_message(rows)}", fontsize=13)
    return figure


def _label(row: Row, budgets: bool) -> str:
    """What a row served, and under which token budget where rows differ by it."""
    return f"{row['workload']}{what_is_asked(row)}" + (f", budget {row['token_budget']}" if budgets else "")


def _gap_message(rows: Sequence[Row]) -> str:
    worst = [max((row[f"{name}_itl_ms"] or 0.0 for row in rows), default=0.0) for name in ("p95", "p99")]
    return f"in every workload 95 of 100 tokens follow within {worst[0]:.1f} ms, 99 of 100 within {worst[1]:.1f} ms"


def draw_latencies(axes: Axes, places: Sequence[tuple[float, str, Row]], name: str, longest: str | None = None) -> None:
    """A line from the median to the 99th percentile of `name`, and a cross at `longest`. places: (height, colour,
    row); a row without values is left out."""
    for height, colour, row in places:
        points = [(row[key], marker) for key, (marker, _) in _marks(name).items() if row.get(key) is not None]
        if longest is not None and row.get(longest) is not None:
            points.append((row[longest], MAX_MARK[0]))
        if points:
            values = [value for value, _ in points]
            axes.plot([min(values), max(values)], [height] * 2, color=colour, linewidth=1.5, alpha=0.7)
        for value, marker in points:
            axes.plot([value], [height], marker, color=colour, markersize=9 if marker == "|" else 6, mew=1.8)
    axes.grid(axis="x", alpha=0.3)
    axes.margins(x=0.06)


def _marks(name: str) -> dict[str, tuple[str, str]]:
    return {f"{statistic}_{name}_ms": mark for statistic, mark in MARKS.items()}


def mark_handles(longest: bool) -> list[Line2D]:
    marks = [*MARKS.values(), *([MAX_MARK] if longest else [])]
    return [Line2D([], [], color=LEGEND_COLOUR, marker=mark, linestyle="", mew=1.8, label=said) for mark, said in marks]


def log_axis(axes: Axes, ticks: Sequence[float] = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)) -> None:
    """A logarithmic axis with those of the ticks that lie on it, as plain numbers."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_rates(axes: Axes, places: Sequence[tuple[float, str, Row]]) -> None:
    """All requests a second, pale, and over them those that met the service level."""
    level = next((name for _, _, row in places for name in row if name.startswith("goodput_itl_")), None)
    for height, colour, row in places:
        rate, in_time = row["request_throughput"], (row[level] if level is not None else None) or 0.0
        axes.barh(height, rate, 0.7, color=colour, alpha=0.3)
        axes.barh(height, in_time, 0.7, color=colour)
        axes.text(rate, height, f"  {in_time:.1f} of {rate:.1f}", va="center", fontsize=9)
    axes.set_xlim(0, 1.25 * max([0.1, *(row["request_throughput"] for _, _, row in places)]))
    axes.set_xlabel("requests per second: all (pale), and in time (solid)")
    limit = "" if level is None else f" ({level.removeprefix('goodput_itl_').removesuffix('ms')} ms a token)"
    axes.set_title(f"How many a second, and in time{limit}?", fontsize=11)
    axes.grid(axis="x", alpha=0.3)


# --- simulation ------------------------------------------------------------------------------------------------


def plot_simulation(
    rows: Sequence[Row], costs: Sequence[Row], device: str, policies: Mapping[str, str], path: Path
) -> None:
    draw_simulation(rows, costs, device, policies).savefig(path)


def draw_simulation(rows: Sequence[Row], costs: Sequence[Row], device: str, policies: Mapping[str, str]) -> Figure:
    """Above what every policy gives its requests, below what its planning costs.

    rows, costs: those of `benchmarks.simulate`. policies: what each does, by its name.
    """
    names = list(dict.fromkeys(row["policy"] for row in rows))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    figure = Figure(figsize=(16, 10), dpi=0.85 * DOTS_PER_INCH, layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.5, 1))[:, 0]
    gaps, first_tokens, served = above.subplots(1, 3, sharey=True)
    places = [(height, colour, row) for height, _, colour, row in _bars(rows, names)]
    draw_latencies(gaps, places, "itl")
    gaps.set_title("How long until the next token?", fontsize=11)
    gaps.set_xlabel("gap between two tokens of a request, ms")
    gaps.set_xlim(left=0)
    draw_latencies(first_tokens, places, "ttft")
    log_axis(first_tokens)
    first_tokens.set_title("How long until the first token?", fontsize=11)
    first_tokens.set_xlabel("from the request to its first token, ms (log scale)")
    _draw_served(served, rows, names)
    _label_groups(gaps, rows)
    handles = [Patch(color=colours[name], label=f"{name}: {policies.get(name, name)}") for name in names]
    above.legend(handles=[*handles, *mark_handles(longest=False)], fontsize=9, loc="outside lower center", ncols=3)
    _draw_costs(below, costs, colours)
    figure.suptitle(f"Simulated on the step times of an {device}: {_share_message(rows, names)}", fontsize=13)
    return figure


def _share_message(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Of all loads' requests a second, the share in time under each policy."""
    shares = []
    for name in names:
        own = [row for row in rows if row["policy"] == name and row["kind"] == "all"]
        rate = sum(row["request_throughput"] for row in own)
        shares.append(f"{sum(row['request_goodput'] or 0.0 for row in own) / rate:.0%} with {name}" if rate else name)
    return "in time are " + ", ".join(shares)


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
    axes.set_yticks([-number for number in range(len(groups))], labels, fontsize=9)
    axes.set_ylim(-len(groups) + 0.45, 0.55)
    for number in range(1, len(groups)):  # groups are told apart
        for panel in axes.figure.axes:
            panel.axhline(0.5 - number, color=PADDING_COLOUR, linewidth=0.8)


def _draw_served(axes: Axes, rows: Sequence[Row], policies: Sequence[str]) -> None:
    """The share of the requests that met the service level, and how many a second that is."""
    for height, thickness, colour, row in _bars(rows, policies):
        rate, in_time = row["request_throughput"], row["request_goodput"] or 0.0
        axes.barh(height, 100.0, 0.9 * thickness, color=colour, alpha=0.2)
        axes.barh(height, 100.0 * in_time / rate if rate else 0.0, 0.9 * thickness, color=colour)
        axes.text(101.5, height, f"{in_time:.1f} of {rate:.1f} a second", va="center", fontsize=8)
    axes.set_xlim(0, 136)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("% of the requests in time: the first token and every later one")
    axes.set_title("How many are served in time?", fontsize=11)
    axes.grid(axis="x", alpha=0.3)


def _draw_costs(figure: Any, costs: Sequence[Row], colours: Mapping[str, str]) -> None:
    """A panel for each length of the queue: bars for the median, whiskers up to the 99th percentile. A few steps say
    nothing of a tail. figure: a SubFigure, which matplotlib publishes no types of."""
    costs = _by_queue([row for row in costs if row["steps"] >= LEAST_COSTS])
    queues = list(dict.fromkeys(row["waiting"] for row in costs)) or ["0"]
    running = sorted({row["running"] for row in costs}, key=lambda name: int(name.partition("-")[0]))
    width = 0.8 / max(1, len(colours))
    for panel, queue in zip(figure.subplots(1, len(queues), sharey=True, squeeze=False)[0], queues, strict=True):
        for index, (policy, colour) in enumerate(colours.items()):
            for row in costs:
                if (row["waiting"], row["policy"]) == (queue, policy):
                    place = running.index(row["running"]) - 0.4 + (index + 0.5) * width
                    median, tail = row["p50 us"], row["p99 us"]
                    panel.bar(place, median, 0.9 * width, color=colour)
                    panel.errorbar(place, median, [[0.0], [tail - median]], color=colour, capsize=3, linewidth=1)
        panel.set_xticks(range(len(running)), running)
        panel.set_xlim(-0.6, len(running) - 0.4)
        panel.set_xlabel("requests that run")
        panel.set_title(
            f"What planning a step costs while {'no' if queue == '0' else queue} requests wait", fontsize=11
        )
        panel.grid(axis="y", alpha=0.3)
        panel.set_ylabel("CPU time, us: median, whisker to p99")


def _by_queue(costs: Sequence[Row]) -> list[Row]:
    return sorted(costs, key=lambda row: int(row["waiting"].partition("-")[0]))


# --- objectives ------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "latency": "always short steps",
    "balanced": "steps of up to 30 ms while a long queue waits (the default)",
    "throughput": "long steps from a shorter queue on",
}


def plot_objectives(rows: Sequence[Row], source: str, path: Path) -> None:
    draw_objectives(rows, source).savefig(path)


def draw_objectives(rows: Sequence[Row], source: str) -> Figure:
    """A group for each load: how many requests a second, their gaps and their first tokens under each objective.

    rows: those of `benchmarks.objectives`. source: where they are from, in words.
    """
    names = list(dict.fromkeys(row["policy"] for row in rows))
    figure = Figure(figsize=(16, 2.4 + 1.2 * len(_groups(rows))), dpi=DOTS_PER_INCH, layout="constrained")
    rates, gaps, first_tokens = figure.subplots(1, 3, sharey=True)
    places = [(height, colour, row) for height, _, colour, row in _bars(rows, names)]
    for height, thickness, colour, row in _bars(rows, names):
        rates.barh(height, row["request_throughput"], 0.9 * thickness, color=colour)
        rates.text(row["request_throughput"], height, f"  {row['request_throughput']:.1f}", va="center", fontsize=9)
    rates.set_xlim(0, 1.12 * max(row["request_throughput"] for row in rows))
    rates.set_title("How many requests a second?", fontsize=11)
    rates.set_xlabel("requests served per second (more is better)")
    draw_latencies(gaps, places, "itl")
    gaps.set_xlim(left=0)
    gaps.set_title("How long until the next token?", fontsize=11)
    gaps.set_xlabel("gap between two tokens of a request, ms (less is better)")
    draw_latencies(first_tokens, places, "ttft")
    log_axis(first_tokens)
    first_tokens.set_title("How long until the first token?", fontsize=11)
    first_tokens.set_xlabel("from the request to its first token, ms (log scale; less is better)")
    _label_groups(rates, rows)
    rates.set_yticks(rates.get_yticks(), [_in_words(rows, workload) for workload, _ in _groups(rows)], fontsize=9)
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    handles = [Patch(color=colours[name], label=f"{name}: {OBJECTIVES[name]}") for name in names]
    figure.legend(handles=[*handles, *mark_handles(longest=False)], fontsize=9, loc="outside lower center", ncols=3)
    figure.suptitle(f"{source}: {_gain_message(rows)}", fontsize=13)
    return figure


def _in_words(rows: Sequence[Row], workload: str) -> str:
    row = next(row for row in rows if row["workload"] == workload)
    return f"{row['clients']} clients\nprompts of {row['prompt_mean']} tokens,\nanswers of {row['output_mean']}"


def _gain_message(rows: Sequence[Row]) -> str:
    """Where the rate of the last objective is furthest above that of the first."""
    by_place = {(row["workload"], row["policy"]): row for row in rows}
    policies = list(dict.fromkeys(row["policy"] for row in rows))

    def gain(workload: str, policy: str) -> float:
        rate = by_place[workload, policy]["request_throughput"]
        return float(rate / by_place[workload, policies[0]]["request_throughput"] - 1.0)

    workload = max((row["workload"] for row in rows), key=lambda workload: gain(workload, policies[-1]))
    gaps = "/".join(f"{by_place[workload, policy]['p95_itl_ms']:.0f}" for policy in policies)
    gains = " and ".join(f"{gain(workload, policy):+.0%} with {policy}" for policy in policies[1:])
    clients = by_place[workload, policies[0]]["clients"]
    return f"with {clients} clients {gains}, at gaps (95 %) of {gaps} ms"


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
    lefts, widths = zip(*(_bar(step, origin_s) for step in steps), strict=True)
    planned = [(step.planned_s - origin_s) * 1000.0 for step in steps]
    axes.plot([planned, lefts], [[1.0] * len(steps), [0.25] * len(steps)], color=PLAN_COLOUR, linewidth=0.7, alpha=0.6)
    axes.plot(planned, [1.0] * len(steps), color=PLAN_COLOUR, marker="v", markersize=5, linestyle="")
    colours = [STEP_COLOURS[number % 2] for number in range(len(steps))]
    axes.barh([0.1] * len(steps), widths, left=lefts, height=0.3, color=colours)
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
    rows, padding = _Bars(), _Bars()
    for step in steps:
        place = _bar(step, origin_s)
        bottom = 0
        for request, _, length in step.chunks:
            rows.add(place, bottom, length, colours[request])
            bottom += length
        padding.add(place, bottom, step.bucket[0] - bottom, PADDING_COLOUR)
    padding.draw(axes, linewidth=0.0)
    rows.draw(axes, linewidth=0.4)
    axes.set_ylim(0, 1.15 * max(1, *(step.bucket[0] for step in steps)))
    axes.set_ylabel("prompt tokens")
    axes.set_title("Prompt chunks: a colour for each prompt, so one that was split goes on in its colour", fontsize=10)
    handles = [Patch(color=PADDING_COLOUR, label="padding: rows of the step that hold no token")]
    axes.legend(handles=handles, fontsize=8, loc="upper right")
    axes.grid(axis="y", alpha=0.3)


def _draw_decodes(axes: Axes, steps: Sequence[Step], origin_s: float) -> None:
    rows, padding = _Bars(), _Bars()
    for step in steps:
        place, live = _bar(step, origin_s), len(step.decodes)
        rows.add(place, 0, live, DECODE_COLOUR)
        padding.add(place, live, step.bucket[1] - live, PADDING_COLOUR)
    padding.draw(axes, linewidth=0.0)
    rows.draw(axes, linewidth=0.4)
    axes.set_ylabel("decode rows")
    axes.set_title("Decodes: requests that get their next token in the same step", fontsize=10)
    axes.grid(axis="y", alpha=0.3)


class _Bars:
    """Bars that are drawn in one call, which is many times faster than one by one."""

    def __init__(self) -> None:
        self._lefts: list[float] = []
        self._widths: list[float] = []
        self._bottoms: list[int] = []
        self._heights: list[int] = []
        self._colours: list[str] = []

    def add(self, place: tuple[float, float], bottom: int, height: int, colour: str) -> None:
        """place: left edge and width. Bars of no height are left out."""
        if height:
            self._lefts.append(place[0])
            self._widths.append(place[1])
            self._bottoms.append(bottom)
            self._heights.append(height)
            self._colours.append(colour)

    def draw(self, axes: Axes, linewidth: float) -> None:
        axes.bar(
            self._lefts,
            self._heights,
            self._widths,
            self._bottoms,
            align="edge",
            color=self._colours,
            edgecolor="white",
            linewidth=linewidth,
        )


def _bar(step: Step, origin_s: float) -> tuple[float, float]:
    return (step.started_s - origin_s) * 1000.0, (step.finished_s - step.started_s) * 1000.0


if __name__ == "__main__":
    # python -m benchmarks.plots SERVING.json SERVING.png: draws rows again that `benchmarks.serving --json` wrote.
    written = msgspec.json.decode(Path(sys.argv[1]).read_bytes())
    plot_serving(written["rows"], written["about"]["device"], Path(sys.argv[2]))
