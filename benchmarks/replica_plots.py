"""The picture of several engines behind a router. Only draws; needs matplotlib (the extra `bench`)."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.plots import COLOURS, DOTS_PER_INCH, LEGEND_COLOUR, Row

TIMELINES = ("death", "slow", "hot", "bursts")
"""Loads in which something happens in the middle."""


def plot_replicas(rows: Sequence[Row], device: str, path: Path) -> None:
    draw_replicas(rows, device).savefig(path)


def draw_replicas(rows: Sequence[Row], device: str) -> Figure:
    """Above what N engines give of N times one, below the requests of each second where something happens.

    rows: those of `benchmarks.replica_rows`.
    """
    routings = list(dict.fromkeys(row["routing"] for row in rows))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(routings)}
    lines = [row for row in rows if row["load"] in TIMELINES]
    happenings = list(dict.fromkeys((row["load"], row["engines"]) for row in lines))
    figure = Figure(figsize=(16, 9 if happenings else 5), dpi=0.85 * DOTS_PER_INCH, layout="constrained")
    parts = figure.subfigures(2 if happenings else 1, 1, squeeze=False)[:, 0]
    shares, first_tokens = parts[0].subplots(1, 2)
    groups = list(dict.fromkeys((row["load"], row["engines"]) for row in rows))
    _draw_bars(shares, rows, groups, colours, "of_n")
    shares.axhline(1.0, color=LEGEND_COLOUR, linewidth=0.8, linestyle="--")
    shares.set_title("How much of N engines do N engines give?", fontsize=11)
    shares.set_ylabel("requests a second, over those of N single engines")
    shares.legend(fontsize=9, loc="lower right")
    _draw_bars(first_tokens, rows, groups, colours, "p95_ttft_ms")
    _log_heights(first_tokens)
    first_tokens.set_title("How long until the first token, of 95 in 100?", fontsize=11)
    first_tokens.set_ylabel("ms (log scale)")
    if happenings:
        for axes, (load, count) in zip(
            parts[1].subplots(1, len(happenings), squeeze=False)[0], happenings, strict=True
        ):
            _draw_seconds(axes, [row for row in lines if (row["load"], row["engines"]) == (load, count)], colours)
            axes.set_title(f"{load}, {count} engines", fontsize=11)
    figure.suptitle(f"Replicas simulated on the step times of an {device}: {_message(rows, routings[0])}", fontsize=13)
    return figure


def _message(rows: Sequence[Row], routing: str) -> str:
    """What the first of the ways to spread a load makes of the engines at worst and at best."""
    shares = [row["of_n"] for row in rows if row["routing"] == routing]
    return f"by the {routing}, N engines give {min(shares):.2f} to {max(shares):.2f} of N times one"


def _log_heights(axes: Axes) -> None:
    """A logarithmic axis with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_bars(
    axes: Axes, rows: Sequence[Row], groups: Sequence[tuple[str, int]], colours: dict[str, str], name: str
) -> None:
    width = 0.8 / len(colours)
    for place, (routing, colour) in enumerate(colours.items()):
        own = [row for row in rows if row["routing"] == routing]
        places = [groups.index((row["load"], row["engines"])) + width * (place - (len(colours) - 1) / 2) for row in own]
        axes.bar(places, [row[name] for row in own], width, color=colour, label=routing)
    axes.set_xticks(range(len(groups)), [f"{load}\n{count}" for load, count in groups], fontsize=9)
    axes.grid(axis="y", alpha=0.3)


def _draw_seconds(axes: Axes, rows: Sequence[Row], colours: dict[str, str]) -> None:
    for row in rows:
        values = row["per_second"]
        axes.plot(range(len(values)), values, color=colours[row["routing"]], linewidth=1.3)
    axes.axvline(len(rows[0]["per_second"]) / 2, color=LEGEND_COLOUR, linewidth=0.8, linestyle="--")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("virtual time, s")
    axes.set_ylabel("requests that ended in a second")
    axes.grid(alpha=0.3)
