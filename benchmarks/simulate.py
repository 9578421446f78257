"""What would another load, budget or policy do? The real scheduling policy in virtual time, before a device of a table.

    python -m benchmarks.simulate --load 2600/60:16 --load bursts@20 --load mix@8 --json figures.json --plot figures.png
    python -m benchmarks.simulate --load 256/64@60x100000 --policy fcfs
    python -m benchmarks.simulate --against serving.json --step-log steps.jsonl
    python -m benchmarks.simulate --replicas 16 256 --load conversations --load uncached

A load is one of `benchmarks.serving` (2600/60:16, 2600/60@12.5), bursts@RATE, or mix@RATE: `benchmarks.scenarios` says
what is in them. Every load is served by every --policy with the same requests. --against repeats the rows of a real run
(the JSON of `benchmarks.serving`) with the same lengths and shows how far the simulation is off; --step-log of that run
shows, bucket by bucket, how far the table is, which is nearly all of it.

--replicas puts so many engines behind the router, with loads of their own: see `benchmarks.replica_rows` and
`benchmarks.simulated_replicas`.

Step times come from --step-times, a table that `graphgen tune` stored; by default that of an H200 with the shape of
Llama-3.1-8B. What the virtual engine leaves out is in `benchmarks.virtual_engine`. CPU times are those of this machine.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

from msgspec import Struct

from benchmarks.metrics import Figures, ServedRequest, ServiceLevel, summarize
from benchmarks.options import above_zero, count, make_parser, run_script
from benchmarks.policy_costs import cost_rows
from benchmarks.replica_rows import MOST_SCHEDULED, replica_rows, shown
from benchmarks.report import machine, percentile, read_serving, show, write_json
from benchmarks.routings import ROUTINGS
from benchmarks.scenarios import Load, parse_load, requests_of
from benchmarks.serving import table_row
from benchmarks.simulated_machine import H200_STEP_TIMES, MAX_MODEL_LEN, NUM_PAGES, Machine, Policy
from benchmarks.simulated_replicas import CLIENTS, LOADS
from benchmarks.step_log import Step, StepLogReader, attended
from benchmarks.virtual_engine import HOST_DELAY_S, STEP_NOISE, StepSeries, VirtualEngine
from benchmarks.workload import Workload
from graphgen.base.version import how_to_install
from graphgen.ipc.worker_messages import Bucket
from graphgen.launch.step_times_store import StepTimesFile
from graphgen.scheduler.cost_model import CostModel

DEFAULT_LOADS = ("2600/60:16", "bursts@20", "mix@8")
COMPARED = ("request_throughput", "median_ttft_ms", "p95_ttft_ms", "median_itl_ms", "p95_itl_ms", "p99_itl_ms")
"""Figures of a real run that --against repeats."""

COUNTED = ("preemptions", "ttft_targets_met", "ttft_targets_missed", "tpot_targets_met", "tpot_targets_missed")

MOST_REPLICAS = 1000

ITL_TARGET_MS = 18.0
"""Under the service level's 20 ms on average, since half of all gaps are longer than the median."""

POLICIES = {
    "fcfs": Policy(does="in order of arrival, steps up to the saturation point"),
    "dynamic": Policy(itl_target_ms=ITL_TARGET_MS, does=f"each request asks for {ITL_TARGET_MS:g} ms between tokens"),
    "classes": Policy(
        itl_target_ms=ITL_TARGET_MS,
        priorities={"chat": 1, "steady": 1},
        does="the same, and chats go before documents and bursts",
    ),
    # What `benchmarks.serving --itl-target-ms 20` asks.
    "level": Policy(itl_target_ms=20.0, ttft_prompt_rate=512.0, does="20 ms between tokens, a first one when due"),
}
DRAWN_POLICIES = ("fcfs", "dynamic", "classes")
"""Those of a run that names none."""


class Run(Struct, frozen=True):
    """One load under one policy."""

    policy: str
    rows: list[Figures]  # of all requests, then of each kind if there are several
    steps: StepSeries


def simulate(
    on: Machine,
    policy_name: str,
    load: Load,
    seed: int,
    levels: Sequence[ServiceLevel],
    policy: Policy | None = None,
    clock_ns: Callable[[], int] = time.thread_time_ns,
) -> Run:
    """policy: its settings, by default those of POLICIES. clock_ns: see VirtualEngine."""
    settings = policy or POLICIES[policy_name]
    requests = [settings.asks(request) for request in requests_of(load, seed, on.max_model_len)]
    scheduler = on.scheduler(settings)
    engine = VirtualEngine(
        scheduler,
        CostModel(on.table.table),
        requests,
        load.clients,
        on.host_delay_s,
        on.step_noise,
        on.device_pace,
        clock_ns,
    )
    gc.disable()  # a collection would be timed with whatever step it interrupts
    try:
        served = engine.run()
    finally:
        gc.enable()
    common = {
        "policy": policy_name,
        "seed": seed,
        "token_budget": settings.token_budget or on.token_budget,
        **_parts_of(load),
        **engine.steps.figures(),
        "requests_cut": sum(one.shape.prompt_len + one.shape.output_len == on.max_model_len for one in requests),
        "objective": settings.objective,
        **{name: getattr(scheduler.counters, name) for name in COUNTED},
    }
    kinds = list(dict.fromkeys(request.kind for request in requests))
    groups: dict[str, list[ServedRequest]] = {"all": served}
    if len(kinds) > 1:
        for kind in kinds:
            groups[kind] = [one for one, request in zip(served, requests, strict=True) if request.kind == kind]
    rows = [
        {"workload": load.label, "kind": kind, "num_requests": len(group), **common, **summarize(group, levels)}
        for kind, group in groups.items()
    ]
    return Run(policy_name, rows, engine.steps)


def _parts_of(load: Load) -> Figures:
    lengths = (load.prompt_mean, load.output_mean) if isinstance(load, Workload) else (None, None)
    return {
        "prompt_mean": lengths[0],
        "output_mean": lengths[1],
        "clients": load.clients,
        "request_rate": load.rate,
    }


def _named(row: Figures) -> Figures:
    return row if row["kind"] == "all" else row | {"workload": f"{row['workload']} {row['kind']}"}


# --- against a real run ----------------------------------------------------------------------------------------


def compare(on: Machine, path: Path, levels: Sequence[ServiceLevel]) -> Iterator[Figures]:
    """A row for each figure of each workload in a file of `benchmarks.serving`; off = simulated / real - 1."""
    needed = ("prompt_mean", "output_mean", "clients", "num_requests", "token_budget", "seed")
    for real in read_serving(path, needed)["rows"]:
        load = Workload.of(
            real["prompt_mean"], real["output_mean"], real["clients"], real.get("request_rate"), real["num_requests"]
        )
        target_ms = real.get("itl_target_ms")
        rate = levels[0].prompt_tokens_per_s if target_ms is not None else None  # a real run asks for both or neither
        policy = Policy(
            token_budget=real["token_budget"],
            objective=real.get("objective", "latency"),  # which is what engines did before there were objectives
            itl_target_ms=target_ms,
            ttft_prompt_rate=rate,
        )
        (simulated,) = simulate(on, "fcfs", load, real["seed"], levels, policy).rows
        for name in COMPARED:
            if real.get(name) is not None:
                ours = float(str(simulated[name]))
                yield {
                    "workload": load.label,
                    "budget": real["token_budget"],
                    "figure": name,
                    "real": float(real[name]),
                    "simulated": ours,
                    "off": f"{ours / float(real[name]) - 1.0:+.1%}",
                }


def compare_steps(table: StepTimesFile, path: Path) -> list[Figures]:
    """Real steps against what the table says of them, by bucket: medians; off = predicted / real - 1."""
    device = CostModel(table.table)
    steps = StepLogReader(path).read_new()
    by_bucket: dict[Bucket, list[tuple[Step, float]]] = {}
    for step, of_step in zip(steps, attended(steps), strict=True):
        bucket = Bucket(*step.bucket)
        predicted = device.predict_ms(bucket, of_step)
        if predicted is not None:
            by_bucket.setdefault(bucket, []).append((step, predicted))
    rows: list[Figures] = []
    for bucket, found in sorted(by_bucket.items(), key=lambda item: (item[0].num_rows, item[0].decode_rows)):
        real = percentile([(step.finished_s - step.started_s) * 1000.0 for step, _ in found], 50)
        ours = percentile([predicted for _, predicted in found], 50)
        rows.append(
            {
                "bucket": str(bucket),
                "steps": len(found),
                "decodes a step": fmean(len(step.decodes) for step, _ in found),
                "chunks a step": fmean(len(step.chunks) for step, _ in found),
                "real ms": real,
                "predicted ms": ours,
                "off": f"{ours / real - 1.0:+.1%}",
            }
        )
    return rows


# --- command line ----------------------------------------------------------------------------------------------


def simulation_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--load", action="append", help="as above; may be repeated")
    parser.add_argument("--policy", choices=POLICIES, action="append", help="default: all but level; may be repeated")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with a real run instead")
    parser.add_argument("--num-requests", type=count, help="of each load that does not say")
    parser.add_argument("--seed", type=int, default=0, help="of the first load; the next one has the next")
    parser.add_argument("--step-log", type=Path, metavar="FILE", help="compare the steps of a real run as well")
    replicas = parser.add_argument_group("replicas")
    replicas.add_argument("--replicas", type=int, nargs="+", metavar="N", help="engines behind a router: 1 to 1000")
    replicas.add_argument("--routing", choices=ROUTINGS, action="append", help="default: all; may be repeated")
    replicas.add_argument(
        "--most-scheduled", type=int, default=MOST_SCHEDULED, help="engines up to which they are real schedulers"
    )
    replicas.add_argument("--routers", type=count, default=1, help="that share the clients, each on its own counts")
    replicas.add_argument("--clients", type=count, default=CLIENTS, help="of each engine, in a closed loop")
    replicas.add_argument("--seconds", type=above_zero, default=40.0, help="of virtual time; the last half is counted")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--step-times", type=Path, default=H200_STEP_TIMES, help="a table stored by graphgen tune")
    engine.add_argument("--token-budget", type=count, default=1024, help="the engine's default on CUDA")
    engine.add_argument("--num-pages", type=count, default=NUM_PAGES, help="what 8B weights leave on an H200")
    engine.add_argument("--max-num-seqs", type=count, default=256)
    engine.add_argument("--max-model-len", type=count, default=MAX_MODEL_LEN)
    engine.add_argument("--host-delay-ms", type=float, default=HOST_DELAY_S * 1000.0, help="result to planned step")
    engine.add_argument(
        "--step-noise", type=float, default=STEP_NOISE, help="spread of a step's time, as a share of it"
    )
    engine.add_argument(
        "--device-pace",
        type=above_zero,
        default=1.0,
        help="steps take so many times what the table says, which the policy does not know",
    )
    results = parser.add_argument_group("results")
    results.add_argument("--sla-itl-ms", type=float, nargs="+", default=[20.0])
    results.add_argument("--sla-prompt-rate", type=float, default=512.0)
    results.add_argument("--json", help="write the figures here")
    results.add_argument("--plot", help="draw them into this PNG; needs matplotlib")
    return parser


def main(arguments: Sequence[str] | None = None) -> list[Figures]:
    """The rows, also shown and written as asked. arguments: those of the command line by default."""
    parser = simulation_parser()
    options = parser.parse_args(arguments)
    if options.plot is not None and find_spec("matplotlib") is None:
        parser.error(f"--plot needs matplotlib: {how_to_install('bench')}")
    levels = [ServiceLevel(limit_ms / 1000.0, options.sla_prompt_rate) for limit_ms in options.sla_itl_ms]
    try:
        table = StepTimesFile.read(options.step_times)
        loads = (
            []
            if options.replicas
            else [parse_load(text, options.num_requests) for text in options.load or DEFAULT_LOADS]
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    on = Machine(
        table=table,
        token_budget=options.token_budget,
        num_pages=options.num_pages,
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.max_model_len,
        host_delay_s=options.host_delay_ms / 1000.0,
        step_noise=options.step_noise,
        device_pace=options.device_pace,
    )
    about = machine(f"virtual {table.key.device}") | {"step_times": f"{table.source}, {table.date}"}
    if options.against is not None or options.step_log is not None:
        try:
            compared = list(compare(on, options.against, levels)) if options.against is not None else []
            compared_steps = compare_steps(table, options.step_log) if options.step_log is not None else []
        except (OSError, ValueError) as error:
            parser.error(str(error))
        show("The simulation against a real run", compared, about)
        show("The table against the steps of a real run", compared_steps, about)
        write_json(options.json, [*compared, *compared_steps], about)
        return [*compared, *compared_steps]
    if options.replicas:
        return _serve_replicas(on, parser, options, about)
    runs = [
        simulate(on, policy, load, options.seed + index, levels)
        for index, load in enumerate(loads)
        for policy in options.policy or DRAWN_POLICIES
    ]
    for label, num_cut in {run.rows[0]["workload"]: run.rows[0]["requests_cut"] for run in runs}.items():
        if num_cut:
            print(f"{label}: {num_cut} prompts are cut to max_model_len {on.max_model_len}")
    rows, costs = [row for run in runs for row in run.rows], cost_rows([(run.policy, run.steps) for run in runs])
    table_rows = [{"policy": row["policy"], **table_row(_named(row), levels)} for row in rows]
    show("Simulated: latencies in ms; SLA N ms: requests a second that met it", table_rows, about)
    show("CPU of update() and schedule() for one step", costs, about)
    write_json(options.json, [*rows, *costs], about)
    if options.plot is not None:
        from benchmarks import plots  # matplotlib is an extra

        does = {name: policy.does for name, policy in POLICIES.items()}
        plots.plot_simulation(rows, costs, table.key.device, does, Path(options.plot))
    return rows


def _serve_replicas(
    on: Machine, parser: argparse.ArgumentParser, options: argparse.Namespace, about: dict[str, str]
) -> list[Figures]:
    names = options.load or LOADS
    if unknown := [name for name in names if name not in LOADS]:
        parser.error(f"--load {unknown[0]} is none of several engines: choose from {', '.join(LOADS)}")
    if not all(1 <= count <= MOST_REPLICAS for count in options.replicas):
        parser.error(f"--replicas {options.replicas}: give numbers from 1 to {MOST_REPLICAS}")
    rows = list(
        replica_rows(
            on,
            options.replicas,
            names,
            options.routing or ROUTINGS,
            most_scheduled=options.most_scheduled,
            num_routers=options.routers,
            clients=options.clients,
            seconds=options.seconds,
            seed=options.seed,
        )
    )
    show("Simulated engines behind a router: times in ms, the CPU of a decision in us", [*map(shown, rows)], about)
    write_json(options.json, rows, about)
    if options.plot is not None:
        from benchmarks.replica_plots import plot_replicas  # matplotlib is an extra

        plot_replicas(rows, on.table.key.device, Path(options.plot))
    return rows


if __name__ == "__main__":
    run_script(main)
