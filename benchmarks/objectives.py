"""What does each objective make of the same requests? The simulator's figures, the mean of a few seeds.

    python -m benchmarks.objectives --json objectives.json --plot objectives.png
    python -m benchmarks.objectives --measured latency.json balanced.json throughput.json --plot measured.png

Loads are those of `benchmarks.simulate`; nobody asks for anything. Every objective has the token budget that an engine
gives it on CUDA. Step times are those of --step-times, by default of an H200 with the shape of Llama-3.1-8B. With some
hundred requests the lengths that a seed draws move a rate by 5 %, so figures are means of --seeds runs, and every
objective serves the same requests.

--measured shows what `benchmarks.serving --objective ... --json ...` has measured of the same workloads with an engine.
"""

import itertools
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import get_args

from benchmarks.metrics import Figures, ServiceLevel
from benchmarks.options import count, make_parser, run_script
from benchmarks.report import machine, read_serving, show, write_json
from benchmarks.scenarios import Load, parse_load
from benchmarks.simulate import simulate
from benchmarks.simulated_machine import H200_STEP_TIMES, MAX_MODEL_LEN, NUM_PAGES, Machine, Policy
from benchmarks.virtual_engine import HOST_DELAY_S
from graphgen.base.version import how_to_install
from graphgen.ipc.engine_messages import ObjectiveName
from graphgen.launch.resolve import default_token_budget
from graphgen.launch.step_times_store import StepTimesFile

DEFAULT_LOADS = ("2600/60:16", "2600/60:32", "2600/60:64", "1200/128:64")
TOKEN_BUDGETS: dict[ObjectiveName, int] = {
    objective: default_token_budget(objective, on_cuda=True) for objective in get_args(ObjectiveName)
}
"""Those of `EngineConfig` on CUDA."""
LEVEL = ServiceLevel(itl_s=0.020)
MEANS = (
    "request_throughput",
    "output_throughput",
    *(f"{statistic}_{name}_ms" for name in ("ttft", "itl", "tpot") for statistic in ("median", "p95", "p99")),
)


def measure(on: Machine, load: Load, objective: ObjectiveName, seeds: Sequence[int]) -> Figures:
    """One row: the means of all seeds."""
    policy = Policy(token_budget=TOKEN_BUDGETS[objective], objective=objective)
    rows = [simulate(on, objective, load, seed, [LEVEL], policy).rows[0] for seed in seeds]
    parts = ("workload", "kind", "policy", "objective", "token_budget", "clients", "prompt_mean", "output_mean")
    return {
        **{name: rows[0][name] for name in parts},
        "num_requests": rows[0]["num_requests"],
        "seeds": len(rows),
        **{name: fmean(float(str(row[name])) for row in rows) for name in MEANS},
    }


def read_measured(paths: Sequence[Path]) -> tuple[list[Figures], dict[str, str]]:
    """The rows of these files of `benchmarks.serving` in which nobody asks for anything, workload by workload, and what
    they were measured on. Raises ValueError where a workload was not measured with every objective."""
    texts = [read_serving(path, ("itl_target_ms", "objective")) for path in paths]
    rows = [row for text in texts for row in text["rows"] if not row["itl_target_ms"]]
    by_place = {(row["workload"], row["objective"]): row for row in rows}
    workloads, objectives = (list(dict.fromkeys(names)) for names in zip(*by_place, strict=True))
    if missing := [place for place in itertools.product(workloads, objectives) if place not in by_place]:
        raise ValueError("not measured: " + ", ".join(f"{workload} with {name}" for workload, name in missing))
    names = ("workload", "objective", "token_budget", "clients", "prompt_mean", "output_mean", "num_requests", *MEANS)
    places = itertools.product(workloads, objectives)
    found = [{"kind": "all", "policy": place[1], **{name: by_place[place][name] for name in names}} for place in places]
    return found, texts[0]["about"]


def table_row(row: Figures) -> dict[str, str]:
    """Latencies in ms."""

    def number(name: str, digits: int) -> str:
        return f"{float(str(row[name])):.{digits}f}"

    return {
        "workload": str(row["workload"]),
        "objective": str(row["objective"]),
        "req/s": number("request_throughput", 2),
        "TTFT p50/p95": f"{number('median_ttft_ms', 0)}/{number('p95_ttft_ms', 0)}",
        "ITL p50/p95/p99": "/".join(number(f"{name}_itl_ms", 1) for name in ("median", "p95", "p99")),
        "TPOT p95": number("p95_tpot_ms", 1),
    }


def main(arguments: Sequence[str] | None = None) -> list[Figures]:
    """The rows, also shown and written as asked. arguments: those of the command line by default."""
    parser = make_parser(__doc__)
    parser.add_argument("--load", action="append", help="as above; may be repeated")
    parser.add_argument("--seeds", type=count, default=5, help="runs of each row")
    parser.add_argument("--step-times", type=Path, default=H200_STEP_TIMES, help="a table stored by graphgen tune")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--plot", help="draw them into this PNG; needs matplotlib")
    parser.add_argument("--measured", type=Path, nargs="+", metavar="FILE", help="see above; nothing is simulated")
    options = parser.parse_args(arguments)
    if options.plot is not None and find_spec("matplotlib") is None:
        parser.error(f"--plot needs matplotlib: {how_to_install('bench')}")
    try:
        if options.measured:
            rows, about = read_measured(options.measured)
            source, about = f"Measured on an {about['device']}", about | {"command": machine("")["command"]}
        else:
            table = StepTimesFile.read(options.step_times)
            loads = [parse_load(text, None) for text in options.load or DEFAULT_LOADS]
            on = Machine(table, max(TOKEN_BUDGETS.values()), NUM_PAGES, 256, MAX_MODEL_LEN, HOST_DELAY_S)
            source = f"Simulated on the step times of an {table.key.device}"
            about = machine(f"virtual {table.key.device}") | {"step_times": f"{table.source}, {table.date}"}
            rows = [measure(on, load, name, range(options.seeds)) for load in loads for name in get_args(ObjectiveName)]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    title = f"{source}: what each objective makes of the same requests; latencies in ms"
    show(title, list(map(table_row, rows)), about)
    write_json(options.json, rows, about)
    if options.plot is not None:
        from benchmarks import plots  # matplotlib is an extra

        plots.plot_objectives(rows, source, Path(options.plot))
    return rows


if __name__ == "__main__":
    run_script(main)
