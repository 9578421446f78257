"""How fast are requests served, and how steadily do their tokens come? Many clients against one engine.

    python -m benchmarks.serving --model benchmarks/shapes/llama-3.1-8b --load-format dummy --max-model-len 16384 \\
        --workload 2600/60:16 --workload 1200/128:64 --workload 256/256:256x768 --json serving.json --plot serving.png

A workload is MEAN_PROMPT/MEAN_OUTPUT:CLIENTS (closed loop: each client sends its next request when its last one has
ended) or MEAN_PROMPT/MEAN_OUTPUT@RATE (open loop: Poisson arrivals, so many a second on average); xN behind it sets the
number of requests, by default 4 a client and 32 more. All workloads run in one engine, each with a seed of its own,
once the process that stands by has imported what it needs.
--sweep-budget repeats them in a new engine for every token budget. Decoding is greedy and ignores end of sequence.

--highest-rate LEVEL searches for the highest rate of an open loop at which 99 of 100 requests meet one of MLPerf's
levels, for each workload, from its rate on; requests ask for the level, and come for --probe-seconds at each rate.

Token times are taken on the thread that receives them from the scheduler. --stream reads every token in a task of an
event loop instead, as a program with an AsyncEngine does, and takes the time there.
"""

import argparse
import asyncio
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from msgspec import Struct

from benchmarks.levels import MLPERF_LEVELS, find_highest_rate
from benchmarks.metrics import Figures, ServedRequest, ServiceLevel, summarize, what_is_asked
from benchmarks.options import above_zero, add_engine_options, count, engine_settings, make_parser, run_script
from benchmarks.report import machine, show, write_json
from benchmarks.sending import Targets, closed_loop, open_loop, stream_reader, whole_reader
from benchmarks.settling import wait_for_standby
from benchmarks.step_log import StepLogReader, summarize_steps
from benchmarks.workload import Load, PlannedRequest, Trace, Workload
from graphgen import EngineConfig
from graphgen.api.core import EngineCore
from graphgen.base.garbage import leave_imports_alone
from graphgen.base.version import how_to_install
from graphgen.ipc.engine_messages import EngineStats
from graphgen.ipc.worker_messages import WorkerReady

FIRST_RATE = 1.0
"""Of a search for a workload that states none."""

LEAST_PROBE = 128
"""Requests of each rate of a search: with fewer, one is more than a hundredth."""

SEEDS_EACH = 100
"""Of a search: no rate may find the prompts of another one cached."""


# --- running ---------------------------------------------------------------------------------------------------


class Run(Struct, frozen=True):
    """One row of the table."""

    load: Load
    targets: Targets
    seed: int
    stream: bool


def run_load(core: EngineCore, run: Run, requests: Sequence[PlannedRequest]) -> list[ServedRequest]:
    load = run.load

    async def serve_all() -> list[ServedRequest]:
        reader = stream_reader if run.stream else whole_reader
        read = reader(core, run.targets)
        return await (open_loop(requests, read) if load.clients is None else closed_loop(requests, load.clients, read))

    return asyncio.run(serve_all())


def measure(core: EngineCore, run: Run, levels: Sequence[ServiceLevel], steps: StepLogReader) -> Figures:
    """One row: its requests from the first to the last, and what the engine did meanwhile."""
    load = run.load
    max_model_len = core.launch.max_model_len
    requests = load.requests(run.seed, core.launch.spec.vocab_size, max_model_len)
    at_limit = sum(len(request.prompt_token_ids) + request.output_len == max_model_len for request in requests)
    before = core.stats()  # also flushes the step log
    steps.read_new()
    served = run_load(core, run, requests)
    after = core.stats()
    if refused := [request.error for request in served if request.error is not None]:
        print(f"{load.label}: {len(refused)} requests were refused, the first: {refused[0]}")
    if at_limit:
        print(f"{load.label}: {at_limit} of {len(requests)} prompts are cut to max_model_len {max_model_len}")
    # A step that was in flight when the last run ended is logged after it.
    begun_s = min(request.sent_s for request in served)
    own_steps = [step for step in steps.read_new() if step.planned_s >= begun_s]
    return {
        "workload": load.label,
        **_parts_of(load),
        "num_requests": len(requests),
        "seed": run.seed,
        "itl_target_ms": run.targets.itl_ms,
        "token_budget": core.ready.token_budget,
        "objective": core.launch.objective,
        "requests_cut": at_limit,
        **summarize(served, levels),
        **summarize_steps(own_steps),
        **_counted(before, after),
    }


def _parts_of(load: Load) -> Figures:
    """What rows of a plot are told apart by. A trace has no means."""
    match load:
        case Workload(prompt_mean, output_mean, _, clients, rate):
            return {"prompt_mean": prompt_mean, "output_mean": output_mean, "clients": clients, "request_rate": rate}
        case Trace():
            return {"prompt_mean": None, "output_mean": None, "clients": None, "request_rate": None}


def _counted(before: EngineStats, after: EngineStats) -> Figures:
    names = ("preemptions", "graph_replays", "eager_steps", "recompilations")
    return {name: getattr(after, name) - getattr(before, name) for name in names}


def search(core: EngineCore, run: Run, levels: Sequence[ServiceLevel], steps: StepLogReader, probe_s: float) -> Figures:
    """The row of the highest rate at which the requests met the level that they ask for; of the lowest one that was
    tried, if they met it at none."""
    load, level = run.load, run.targets.level
    assert isinstance(load, Workload), "a trace has the rate that it has"
    (name,) = [name for name, known in MLPERF_LEVELS.items() if known == level]
    rows: dict[float, Figures] = {}

    def share_at(rate: float) -> float:
        count = max(LEAST_PROBE, round(probe_s * rate))
        probe = Workload.of(load.prompt_mean, load.output_mean, None, rate, count)
        rows[rate] = measure(core, Run(probe, run.targets, run.seed + len(rows), run.stream), levels, steps)
        return float(str(rows[rate][f"mlperf_{name}_share"]))

    highest, probes = find_highest_rate(share_at, load.rate or FIRST_RATE)
    tried = [{"rate": probe.rate, "share": probe.share} for probe in probes]
    return {**rows[highest or min(rows)], "level": name, "highest_rate": highest, "probes": tried}


def run_engine(
    config: EngineConfig, runs: Sequence[Run], levels: Sequence[ServiceLevel], probe_s: float
) -> tuple[list[Figures], WorkerReady]:
    """All rows, one after another, in one engine. config: with a step log. probe_s: of each rate of a search."""
    assert config.step_log is not None, "the figures of steps come from the log"
    core = EngineCore(config)
    try:
        # The first request of a process pays for imports of the client's side.
        asyncio.run(_warm_up(core))
        if core.launch.standby:
            wait_for_standby(core)
        leave_imports_alone()  # a pause of this process is none of the engine's
        steps = StepLogReader(Path(config.step_log))
        rows = [
            measure(core, run, levels, steps)
            if run.targets.level is None
            else search(core, run, levels, steps, probe_s)
            for run in runs
        ]
        return rows, core.ready.worker
    finally:
        core.close()


async def _warm_up(core: EngineCore) -> None:
    await whole_reader(core, Targets())(PlannedRequest(0.0, [1, 2, 3], 4))


# --- showing ---------------------------------------------------------------------------------------------------


def table_row(row: Figures, levels: Sequence[ServiceLevel]) -> dict[str, str]:
    """The figures that fit on a screen. Latencies in ms; under SLA the requests a second that met it, under MLPerf the
    shares that met its two levels, server and interactive."""
    return {
        "workload": f"{row['workload']}{what_is_asked(row)}",
        "budget": str(row["token_budget"]),
        "req/s": _number(row["request_throughput"], 2),
        "out tok/s": _number(row["output_throughput"], 0),
        "TTFT p50/p95": _numbers(row, ("median_ttft_ms", "p95_ttft_ms"), 0),
        "ITL p50/p95/p99/max": _numbers(row, ("median_itl_ms", "p95_itl_ms", "p99_itl_ms", "max_itl_ms"), 2),
        **{f"SLA {level.itl_s * 1000:g} ms": _number(row[f"goodput_{level.name}"], 2) for level in levels},
        "MLPerf": "/".join(_percent(row[f"mlperf_{name}_share"]) for name in MLPERF_LEVELS),
        "padding": _percent(row["padding_share"]),
        "idle": _percent(row["device_idle_share"]),
        "preempt": str(row["preemptions"]),
    }


def _number(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else "-"


def print_misses(rows: Sequence[Figures], levels: Sequence[ServiceLevel]) -> None:
    """Why requests missed a level that they asked for."""
    for row in rows:
        for level in levels:
            if row["itl_target_ms"] is not None and float(str(row["itl_target_ms"])) / 1000.0 == level.itl_s:
                for reason in cast("list[str]", row[f"missed_{level.name}"]):
                    print(f"{row['workload']}, {row['itl_target_ms']:g} ms asked: {reason}")


def _numbers(row: Figures, keys: Sequence[str], digits: int) -> str:
    return "/".join(_number(row[key], digits) for key in keys)


def _percent(value: object) -> str:
    return f"{value:.1%}" if isinstance(value, float) else "-"


# --- command line ----------------------------------------------------------------------------------------------


def serving_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    budgets = add_engine_options(parser, without=("step_log", "itl_target_ms"))
    budgets.add_argument("--sweep-budget", type=int, nargs="+", metavar="ROWS", help="one engine after another")
    load = parser.add_argument_group("load")
    load.add_argument("--workload", action="append", default=[], help="as above; may be given several times")
    load.add_argument(
        "--trace",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="JSON lines with arrival_s, prompt_len, output_len",
    )
    load.add_argument("--prompt-mean", type=int, default=2600, help="without --workload and --trace (default 2600)")
    load.add_argument("--output-mean", type=int, default=60, help="(default 60)")
    pace = load.add_mutually_exclusive_group()
    pace.add_argument("--clients", type=int, nargs="+", default=[16], help="one row for each number (default 16)")
    pace.add_argument("--rate", type=float, nargs="+", help="open loop instead: requests a second, one row for each")
    load.add_argument("--num-requests", type=count, help="of each row; default 4 a client and 32 more, 256 with a rate")
    load.add_argument("--seed", type=int, default=0, help="of the first row; the next one has the next")
    load.add_argument(
        "--itl-target-ms",
        type=float,
        nargs="+",
        default=[0.0],
        help="what every request asks of its gaps, 0 for nothing, and with it a first token after prompt tokens /"
        " --sla-prompt-rate seconds; all rows are repeated for each",
    )
    load.add_argument("--highest-rate", choices=MLPERF_LEVELS, help="search for it, as above; excludes --itl-target-ms")
    load.add_argument(
        "--probe-seconds", type=above_zero, default=60.0, help="that requests come, of each rate of a search"
    )
    load.add_argument("--stream", action="store_true", help="read every token in an event loop")
    results = parser.add_argument_group("results")
    results.add_argument("--sla-itl-ms", type=float, nargs="+", default=[20.0], help="limits of the average gap")
    results.add_argument(
        "--sla-prompt-rate", type=float, default=512.0, help="prompt tokens a second until the first token"
    )
    results.add_argument("--step-log", help="keep the log of all steps here; with --sweep-budget that of the last")
    results.add_argument("--json", help="write the figures here")
    results.add_argument("--plot", help="draw them into this PNG; needs matplotlib")
    return parser


def loads_of(options: argparse.Namespace) -> list[Load]:
    """The workloads asked for. Raises ValueError."""
    count = options.num_requests
    loads: list[Load] = [Workload.parse(text, count) for text in options.workload]
    loads += [Trace.read(path) for path in options.trace]
    if loads:
        return loads
    means = options.prompt_mean, options.output_mean
    if options.rate is not None:
        return [Workload.of(*means, None, rate, count) for rate in options.rate]
    return [Workload.of(*means, clients, None, count) for clients in options.clients]


def runs_of(options: argparse.Namespace) -> list[Run]:
    """The rows asked for, each with a seed of its own. Raises ValueError."""
    loads = loads_of(options)
    if options.highest_rate is not None:
        if any(isinstance(load, Trace) for load in loads) or any(options.itl_target_ms):
            raise ValueError("--highest-rate has its own rates and targets: leave --trace and --itl-target-ms out")
        asked = Targets(level=MLPERF_LEVELS[options.highest_rate])
        return [Run(load, asked, options.seed + SEEDS_EACH * index, options.stream) for index, load in enumerate(loads)]
    products = itertools.product(options.itl_target_ms, loads)
    return [
        Run(load, Targets(target_ms or None, options.sla_prompt_rate), options.seed + index, options.stream)
        for index, (target_ms, load) in enumerate(products)
    ]


def configs_of(options: argparse.Namespace, step_log: str) -> Iterator[EngineConfig]:
    """One engine for each token budget."""
    for token_budget in options.sweep_budget or [options.token_budget]:
        yield EngineConfig(**engine_settings(options, token_budget=token_budget, step_log=step_log))


def main(arguments: Sequence[str] | None = None) -> list[Figures]:
    """The rows, also shown and written as asked. arguments: those of the command line by default."""
    parser = serving_parser()
    options = parser.parse_args(arguments)
    levels = [ServiceLevel(limit_ms / 1000.0, options.sla_prompt_rate) for limit_ms in options.sla_itl_ms]
    try:
        runs = runs_of(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.plot is not None and find_spec("matplotlib") is None:
        parser.error(f"--plot needs matplotlib: {how_to_install('bench')}")
    rows: list[Figures] = []
    with tempfile.TemporaryDirectory() as folder:
        for config in configs_of(options, options.step_log or f"{folder}/steps.jsonl"):
            new_rows, worker = run_engine(config, runs, levels, options.probe_seconds)
            rows += new_rows
    about = machine(worker.device) | {"attention": worker.attention, "compiled": str(worker.compiled)}
    show(
        "Serving: latencies in ms; SLA N ms: requests a second that met it",
        [table_row(row, levels) for row in rows],
        about,
    )
    for row in rows:
        if row.get("level") is not None:
            print(
                f"{row['workload']}: {row['highest_rate']:.2f} a second is the most of which 99 % meet {row['level']}"
            )
    print_misses(rows, levels)
    for name in ("eager_steps", "recompilations"):
        if slow := [row["workload"] for row in rows if row[name]]:
            print(f"{name} are not 0 with {', '.join(map(str, slow))}: these figures are not those of a healthy engine")
    write_json(options.json, rows, about)
    if options.plot is not None:
        from benchmarks import plots  # matplotlib is an extra

        plots.plot_serving(rows, about["device"], Path(options.plot))
    return rows


if __name__ == "__main__":
    run_script(main)
