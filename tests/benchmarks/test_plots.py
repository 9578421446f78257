"""The pictures: what a curve is made of, and that they are drawn and stay small. Needs matplotlib."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.metrics import CURVE_PERCENTS
from benchmarks.step_log import Step

plots = pytest.importorskip("benchmarks.plots", exc_type=ModuleNotFoundError)


def make_row(mean: int, clients: int | None, budget: int = 64, throughput: float = 10.0) -> dict[str, Any]:
    return {
        "workload": f"{mean}/8:{clients}",
        "prompt_mean": mean,
        "output_mean": 8,
        "clients": clients,
        "token_budget": budget,
        "request_throughput": throughput,
        "mean_e2el_ms": 1000.0 * (clients or 1) / throughput,
        "goodput_itl_20ms": throughput / 2,
        "itl_curve_ms": [(percent, percent / 10) for percent in CURVE_PERCENTS],
    }


def test_curves_go_over_clients_and_skip_what_has_one_point() -> None:
    rows = [make_row(40, 4), make_row(40, 1), make_row(80, 4), make_row(40, None)]
    (curve,) = plots.throughput_curves(rows)
    assert (curve.name, [curve.label(row) for row in curve.rows]) == ("40/8, budget 64", ["1 client", "4 clients"])
    assert plots.throughput_curves(rows[1:]) == []


def test_what_requests_ask_for_makes_another_curve() -> None:
    rows = [make_row(40, clients) for clients in (1, 2)]
    asked = [row | {"itl_target_ms": 20.0} for row in rows]
    assert [(curve.name, curve.rows) for curve in plots.throughput_curves(rows + asked)] == [
        ("40/8, budget 64", rows),
        ("40/8, 20 ms asked, budget 64", asked),
    ]


def test_curves_go_over_budgets_when_these_are_what_differs() -> None:
    (curve,) = plots.throughput_curves([make_row(40, 4, 128), make_row(40, 4, 64), make_row(80, 2, 64)])
    assert (curve.name, [curve.label(row) for row in curve.rows]) == ("40/8, 4 clients", ["budget 64", "budget 128"])


@pytest.mark.parametrize("curves", [True, False])
def test_a_full_set_of_rows_makes_a_small_picture(tmp_path: Path, curves: bool) -> None:
    means = (40, 80, 120) if curves else range(40, 160, 10)
    rows = [make_row(mean, clients) for mean in means for clients in ((1, 2, 4, 8) if curves else (4,))]
    plots.plot_serving(rows, "cpu", tmp_path / "serving.png")
    assert 10_000 < (tmp_path / "serving.png").stat().st_size < 200_000


def test_a_row_that_served_nothing_is_drawn_as_nothing(tmp_path: Path) -> None:
    nothing = make_row(40, 1) | {"mean_e2el_ms": None, "itl_curve_ms": [], "request_throughput": 0.0}
    plots.plot_serving([nothing, make_row(40, 2)], "cpu", tmp_path / "serving.png")
    assert (tmp_path / "serving.png").stat().st_size > 10_000


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
    plots.plot_simulation(rows, costs, "device", tmp_path / "simulation.png")
    assert 10_000 < (tmp_path / "simulation.png").stat().st_size < 200_000
    assert plots._groups(rows) == [("a", "all"), ("mix", "chat"), ("mix", "document"), ("b", "all"), ("c", "all")]
    assert [row["waiting"] for row in plots._by_queue(costs[:3])] == ["0", "1-100", "101-1000"]
    heights = [height for height, *_ in plots._bars(rows, policies)]
    assert heights == sorted(heights, reverse=True)
    assert len(set(heights)) == 5 * num_policies


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
