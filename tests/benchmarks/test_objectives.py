"""The comparison of objectives: the same requests for each, means of all seeds, and a picture of them."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import objectives, simulate, simulated_machine
from benchmarks.scenarios import parse_load
from tests.benchmarks.test_simulate import make_machine


def test_a_row_is_the_mean_of_its_seeds() -> None:
    on, load = make_machine(2048), parse_load("600/8:4x12", None)
    row = objectives.measure(on, load, "balanced", range(2))
    policy = simulated_machine.Policy(token_budget=1024, objective="balanced")
    both = [simulate.simulate(on, "balanced", load, seed, [objectives.LEVEL], policy).rows[0] for seed in range(2)]
    for name in objectives.MEANS:
        assert row[name] == pytest.approx(sum(float(str(one[name])) for one in both) / 2)


def test_every_objective_serves_every_load_and_all_are_drawn(tmp_path: Path) -> None:
    plots = pytest.importorskip("benchmarks.plots", exc_type=ModuleNotFoundError)
    from tests.benchmarks.test_plots import assert_all_is_seen  # needs matplotlib too

    loads = ("600/8:4x12", "600/8:8x24")
    told = [word for load in loads for word in ("--load", load)]
    rows = objectives.main([*told, "--seeds", "1", "--json", str(tmp_path / "rows.json")])
    assert [(row["workload"], row["objective"]) for row in rows] == list(
        itertools.product(("600/8:4", "600/8:8"), ("latency", "balanced", "throughput"))
    )
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 6
    figure = plots.draw_objectives(rows, "Simulated")
    units = {"How long until the next": "ms", "How long until the first": "ms", "How many requests": "per second"}
    assert_all_is_seen(figure, units)
    first = [line for line in figure.axes[1].lines if len(set(line.get_ydata())) == 1 and len(line.get_xdata()) == 2]
    assert len([line for line in first if line.get_transform() == figure.axes[1].transData]) == 6


def measured(path: Path, objective: str, workloads: Sequence[str]) -> Path:
    """A file as `benchmarks.serving` writes it."""
    names = ("token_budget", "clients", "prompt_mean", "output_mean", "num_requests", *objectives.MEANS)
    told = {name: 1.0 for name in names} | {"objective": objective, "other": 3}
    rows = [{**told, "workload": workload, "itl_target_ms": target} for workload in workloads for target in (None, 20)]
    path.write_text(json.dumps({"about": {"device": "NVIDIA X"}, "rows": rows}))
    return path


def test_what_an_engine_was_measured_with_is_shown_by_workload(tmp_path: Path) -> None:
    both = [measured(tmp_path / name, name, ("a", "b")) for name in ("latency", "balanced")]
    rows = objectives.main(["--measured", *map(str, both)])
    told = [("a", "latency"), ("a", "balanced"), ("b", "latency"), ("b", "balanced")]
    assert [(row["workload"], row["policy"]) for row in rows] == told
    assert all("other" not in row for row in rows)
    plots = pytest.importorskip("benchmarks.plots", exc_type=ModuleNotFoundError)
    figure = plots.draw_objectives(rows, "Measured on an X")
    assert figure.get_suptitle().startswith("Measured on an X: ")


def test_a_workload_that_one_objective_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = [measured(tmp_path / "one", "latency", ("a", "b")), measured(tmp_path / "other", "balanced", ("a",))]
    with pytest.raises(SystemExit):
        objectives.main(["--measured", *map(str, both)])
    assert "b with balanced" in capsys.readouterr().err
