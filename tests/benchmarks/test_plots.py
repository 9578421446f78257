"""The pictures: every figure is within its axes and has a unit, and they stay small. Needs matplotlib."""

import itertools
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.compare.figures import H200, markdown, read
from benchmarks.step_log import Step
from tests import ROOT

plots = pytest.importorskip("benchmarks.plots", exc_type=ModuleNotFoundError)
Patch = pytest.importorskip("matplotlib.patches").Patch


def make_row(mean: int, clients: int | None, budget: int = 64, throughput: float = 10.0) -> dict[str, Any]:
    figures = {
        f"{statistic}_{name}_ms": value * scale
        for name, scale in (("itl", 1.0), ("ttft", 90.0))
        for statistic, value in (("median", 14.5), ("p95", 15.7), ("p99", 16.3))
    }
    return {
        "workload": f"{mean}/8:{clients}",
        "token_budget": budget,
        "request_throughput": throughput,
        "goodput_itl_20ms": throughput / 2,
        "max_itl_ms": 21.5,
        **figures,
    }


def assert_all_is_seen(figure: Any, units: dict[str, str]) -> None:
    """Every line lies within its axes, and the first axes have these words in their labels."""
    figure.draw_without_rendering()
    titles = sorted((axes.title.get_window_extent() for axes in figure.axes), key=lambda box: (box.y0, box.x0))
    for box in titles:
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width, "a title is cut off at the right"
    for left_one, right_one in itertools.pairwise(titles):
        assert left_one.y0 != right_one.y0 or left_one.x1 < right_one.x0, "two titles run into each other"
    for axes in figure.axes:
        (left, right), (bottom, top) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
        for line in axes.lines:
            if line.get_transform() != axes.transData:  # the rule between two groups, as wide as the panel
                continue
            for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
                assert left <= x <= right, (axes.get_title(), x)
                assert bottom <= y <= top, (axes.get_title(), y)
        for text in axes.texts:
            assert left <= text.get_position()[0] <= right
        assert axes.get_title()
        assert axes.get_xlabel()
    found = {axes.get_title(): axes.get_xlabel() for axes in figure.axes}
    for title, unit in units.items():
        (label,) = [label for name, label in found.items() if name.startswith(title)]
        assert unit in label


UNITS = {"How long until the next token?": "ms", "How long until the first token?": "ms", "How many": "in time"}


def test_no_point_of_a_serving_run_is_cut_off_and_every_axis_has_a_unit() -> None:
    rows = [make_row(mean, clients) for mean in (40, 80) for clients in (1, 16)]
    assert_all_is_seen(plots.draw_serving(rows, "cpu"), UNITS)


def test_the_axis_of_the_gaps_is_as_wide_as_the_gaps() -> None:
    gaps = plots.draw_serving([make_row(40, 4), make_row(80, 4)], "cpu").axes[0]
    left, right = gaps.get_xlim()
    assert (right - left) < 1.5 * (21.5 - 14.5)


def test_requests_that_ask_for_something_have_a_colour_of_their_own() -> None:
    rows = [make_row(40, 4), make_row(40, 4) | {"itl_target_ms": 20.0}, make_row(80, 4)]
    colours = [line.get_color() for line in plots.draw_serving(rows, "cpu").axes[0].lines[::5]]
    assert colours[0] == colours[2] != colours[1]


def test_rows_that_differ_by_their_budget_say_so() -> None:
    rows = [make_row(40, 4, 64), make_row(40, 4, 128)]
    labels = [label.get_text() for label in plots.draw_serving(rows, "cpu").axes[0].get_yticklabels()]
    assert labels == ["40/8:4, budget 64", "40/8:4, budget 128"]


def test_the_title_says_what_came_out() -> None:
    rows = [make_row(40, 4), make_row(80, 4) | {"p95_itl_ms": 16.6}]
    assert "95 of 100 tokens follow within 16.6 ms" in plots.draw_serving(rows, "cpu").get_suptitle()


def test_a_full_set_of_rows_makes_a_small_picture(tmp_path: Path) -> None:
    rows = [make_row(mean, clients) for mean in (40, 80, 120) for clients in (1, 2, 4, 8)]
    plots.plot_serving(rows, "cpu", tmp_path / "serving.png")
    assert 10_000 < (tmp_path / "serving.png").stat().st_size < 200_000


def test_a_row_that_served_nothing_is_drawn_as_nothing(tmp_path: Path) -> None:
    empty = dict.fromkeys((key for key in make_row(40, 1) if key.endswith("_ms")), None)
    nothing = make_row(40, 1, throughput=0.0) | empty
    plots.plot_serving([nothing, make_row(40, 2)], "cpu", tmp_path / "serving.png")
    assert (tmp_path / "serving.png").stat().st_size > 10_000


def test_the_committed_rows_can_be_drawn_again() -> None:
    written = msgspec.json.decode((ROOT / "benchmarks" / "h200-serving.json").read_bytes())
    assert_all_is_seen(plots.draw_serving(written["rows"], written["about"]["device"]), UNITS)


def test_a_comparison_shows_every_engine_in_a_colour_of_its_own_with_its_losses() -> None:
    from benchmarks.compare.picture import draw_comparison

    found = read(H200)
    figure = draw_comparison(found)
    assert_all_is_seen(figure, UNITS)
    (legend,) = figure.legends
    patches = [handle for handle in legend.legend_handles if isinstance(handle, Patch)]
    assert {patch.get_label() for patch in patches} == set(found.about.engines)
    assert len({patch.get_facecolor() for patch in patches}) == len(found.about.engines)
    assert "the highest in 4 of 6 workloads" in figure.get_suptitle(), "it loses two, and says so"


def test_the_table_of_a_comparison_has_every_row_and_marks_the_best() -> None:
    found = read(H200)
    served, decodes, starts = markdown(found).split("\n\n")
    assert "| 64 | 7.25 | 7.71 | 7.71 | 5.80 |" in decodes
    assert "| second start | 9.4 to 10.3 | 77 |  |" in starts
    lines = served.splitlines()[2:]
    assert len(lines) == len(found.rows)
    for row, line in zip(found.rows, lines, strict=True):
        rivals = [other.request_throughput for other in found.rows if other.workload == row.workload]
        assert (f"**{row.request_throughput:.2f}**" in line) == (row.request_throughput == max(rivals))


def make_simulated(policy: str, workload: str, kind: str) -> dict[str, Any]:
    row = make_row(40, 4) | {"policy": policy, "workload": workload, "kind": kind, "request_goodput": 4.0}
    places = (("median", 30.0), ("p95", 400.0), ("p99", 900.0))
    return row | {f"{name}_{latency}_ms": place for name, place in places for latency in ("ttft", "itl")}


@pytest.mark.parametrize("num_policies", [1, 3])
def test_a_simulation_of_several_policies_makes_a_small_picture(tmp_path: Path, num_policies: int) -> None:
    policies = ("first", "second", "third")[:num_policies]
    groups = [("a", "all"), ("mix", "all"), ("mix", "chat"), ("mix", "document"), ("b", "all"), ("c", "all")]
    rows = [make_simulated(policy, *group) for group in groups for policy in policies]
    costs = [
        {"policy": policy, "running": running, "waiting": waiting, "steps": 99, "p50 us": 5.0, "p99 us": 9.0}
        for policy in policies
        for running in ("1", "2-8", "9-64")
        for waiting in ("0", "101-1000", "1-100")
    ]
    plots.plot_simulation(rows, costs, "device", {"first": "as they come"}, tmp_path / "simulation.png")
    assert 10_000 < (tmp_path / "simulation.png").stat().st_size < 200_000
    assert plots._groups(rows) == [("a", "all"), ("mix", "chat"), ("mix", "document"), ("b", "all"), ("c", "all")]
    assert [row["waiting"] for row in plots._by_queue(costs[:3])] == ["0", "1-100", "101-1000"]
    heights = [height for height, *_ in plots._bars(rows, policies)]
    assert heights == sorted(heights, reverse=True)
    assert len(set(heights)) == 5 * num_policies


def test_what_planning_costs_is_bars_with_no_trend_between_them() -> None:
    costs = [
        {"policy": policy, "running": running, "waiting": waiting, "steps": 99, "p50 us": 5.0, "p99 us": 9.0}
        for policy in ("first", "second")
        for running in ("1", "2-8")
        for waiting in ("0", "1-100")
    ]
    rows = [make_simulated(policy, "a", "all") for policy in ("first", "second")]
    figure = plots.draw_simulation(rows, costs, "device", {})
    panels = [axes for axes in figure.axes if "planning" in axes.get_title()]
    assert [axes.get_title().split("while ")[1] for axes in panels] == ["no requests wait", "1-100 requests wait"]
    for axes in panels:
        assert len(axes.patches) == 4
        assert "us" in axes.get_ylabel()
        assert all(math.isclose(*line.get_xdata()[[0, -1]]) for line in axes.lines if len(line.get_xdata()) > 1)
    assert "in time are 40% with first, 40% with second" in figure.get_suptitle()


def test_a_second_of_short_steps_makes_a_small_picture(tmp_path: Path) -> None:
    first = Step(0, (496, 16), ((1, 0, 300), (2, 0, 150)), tuple(range(12)), 50, 9.99, 9.992, 9.993, 10.0, 10.004)
    steps = [
        msgspec.structs.replace(
            first,
            chunks=((index // 4, 0, 300), (index // 4 + 1, 0, 150)) if index % 3 else (),
            planned_s=9.99 + index * 0.004,
            started_s=10.0 + index * 0.004,
            finished_s=10.0039 + index * 0.004,
        )
        for index in range(250)
    ]
    plots.plot_timeline(steps, "250 steps", tmp_path / "second.png")
    assert 10_000 < (tmp_path / "second.png").stat().st_size < 200_000
