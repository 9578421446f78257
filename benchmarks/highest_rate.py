"""How many requests a second may come before one in a hundred misses a service level? By the simulator.

    python -m benchmarks.highest_rate --workload 2600/60 --level interactive

The levels are MLPerf's for Llama-3.1-8B, see `benchmarks.levels`. Requests come in an open loop, with Poisson arrivals,
for --seconds of each rate that is tried. They state the level as their targets (asked) or nothing, and every objective
is tried with both. `benchmarks.serving --highest-rate` does the same with an engine.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from benchmarks.levels import MLPERF_LEVELS, find_highest_rate
from benchmarks.metrics import Figures
from benchmarks.objectives import LEVEL, TOKEN_BUDGETS
from benchmarks.options import above_zero, make_parser, run_script
from benchmarks.report import machine, show, write_json
from benchmarks.simulate import simulate
from benchmarks.simulated_machine import H200_STEP_TIMES, MAX_MODEL_LEN, NUM_PAGES, Machine, Policy
from benchmarks.virtual_engine import HOST_DELAY_S
from benchmarks.workload import Workload
from graphgen.ipc.engine_messages import ObjectiveName
from graphgen.launch.step_times_store import StepTimesFile


def search(on: Machine, means: tuple[int, int], policy: Policy, level: str, seconds: float, seed: int) -> Figures:
    """One row: the highest rate, and what was served at it."""
    served: dict[float, Figures] = {}

    def share_at(rate: float) -> float:
        load = Workload.of(*means, None, rate, max(128, round(seconds * rate)))
        served[rate] = simulate(on, policy.objective, load, seed, [LEVEL], policy).rows[0]
        return float(str(served[rate][f"mlperf_{level}_share"]))

    highest, probes = find_highest_rate(share_at, 8.0)
    names = ("p99_ttft_ms", "p99_tpot_ms", "p99_itl_ms")
    found = {name: served[highest][name] if highest else None for name in names}
    return {"highest_rate": highest, **found, "probes": len(probes)}


def parse_means(text: str) -> tuple[int, int]:
    """Raises ValueError."""
    prompt, _, output = text.partition("/")
    if not (prompt.isdecimal() and output.isdecimal() and int(prompt) and int(output)):
        raise ValueError(f"--workload {text}: write MEAN_PROMPT/MEAN_OUTPUT, as 2600/60; the rate is looked for")
    return int(prompt), int(output)


def main(arguments: Sequence[str] | None = None) -> list[Figures]:
    """The rows, also shown and written as asked. arguments: those of the command line by default."""
    parser = make_parser(__doc__)
    parser.add_argument("--workload", action="append", help="MEAN_PROMPT/MEAN_OUTPUT, default 2600/60; may be repeated")
    parser.add_argument("--level", choices=MLPERF_LEVELS, action="append", help="default: all of them; may be repeated")
    parser.add_argument("--seconds", type=above_zero, default=120.0, help="that requests come, of each rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step-times", type=Path, default=H200_STEP_TIMES, help="a table stored by graphgen tune")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args(arguments)
    try:
        table = StepTimesFile.read(options.step_times)
        loads = [parse_means(text) for text in options.workload or ["2600/60"]]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    on = Machine(table, max(TOKEN_BUDGETS.values()), NUM_PAGES, 256, MAX_MODEL_LEN, HOST_DELAY_S)
    about = machine(f"virtual {table.key.device}") | {"step_times": f"{table.source}, {table.date}"}
    rows: list[Figures] = []
    for means in loads:
        for level in options.level or MLPERF_LEVELS:
            limits = MLPERF_LEVELS[level]
            for objective in get_args(ObjectiveName):
                for is_asked in (False, True):
                    policy = Policy(
                        token_budget=TOKEN_BUDGETS[objective],
                        objective=objective,
                        ttft_target_ms=1000.0 * limits.ttft_s if is_asked else None,
                        tpot_target_ms=1000.0 * limits.tpot_s if is_asked else None,
                    )
                    row = search(on, means, policy, level, options.seconds, options.seed)
                    told = {"workload": f"{means[0]}/{means[1]}", "level": level, "objective": objective}
                    rows.append({**told, "asked": is_asked, **row})
    show("Simulated: the highest rate at which 99 of 100 requests meet the level", rows, about)
    write_json(options.json, rows, about)
    return rows


if __name__ == "__main__":
    run_script(main)
