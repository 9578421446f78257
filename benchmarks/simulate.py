"""What would another load, budget or policy do? The real scheduling policy in virtual time, before a device of a table.

    python -m benchmarks.simulate --load 2600/60:16 --load bursts@20 --load mix@8 --json figures.json --plot figures.png
    python -m benchmarks.simulate --load 256/64@60x100000 --policy fcfs
    python -m benchmarks.simulate --against serving.json --step-log steps.jsonl

A load is one of `benchmarks.serving` (2600/60:16, 2600/60@12.5), bursts@RATE, or mix@RATE: `benchmarks.scenarios` says
what is in them. Every load is served by every --policy with the same requests. --against repeats the rows of a real run
(the JSON of `benchmarks.serving`) with the same lengths and shows how far the simulation is off; --step-log of that run
shows, bucket by bucket, how far the table is, which is nearly all of it.

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
from typing import Any

import msgspec
from msgspec import Struct

from benchmarks.metrics import Figures, ServedRequest, ServiceLevel, summarize
from benchmarks.report import machine, percentile, show, write_json
from benchmarks.scenarios import Load, parse_load, requests_of
from benchmarks.serving import table_row
from benchmarks.step_log import Step, StepLogReader, attended
from benchmarks.virtual_engine import HOST_DELAY_S, STEP_NOISE, StepSeries, VirtualEngine, VirtualRequest
from benchmarks.workload import Workload
from graphgen.base.version import how_to_install
from graphgen.capture.buckets import slots_for
from graphgen.ipc.messages import Bucket, ObjectiveName
from graphgen.launch.step_times_store import StepTimesFile
from graphgen.scheduler.buckets import BucketTable
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.policy import Scheduler

H200_STEP_TIMES = Path(__file__).parent / "shapes" / "llama-3.1-8b" / "h200-step-times.json"
DEFAULT_LOADS = ("2600/60:16", "bursts@20", "mix@8")
COMPARED = ("request_throughput", "median_ttft_ms", "p95_ttft_ms", "median_itl_ms", "p95_itl_ms", "p99_itl_ms")
"""Figures of a real run that --against repeats."""

COUNTED = ("preemptions", "ttft_targets_met", "ttft_targets_missed", "tpot_targets_met", "tpot_targets_missed")

NUM_PAGES = 12_800
"""What 8B weights leave on an H200."""
MAX_MODEL_LEN = 40_960

MAX_CHUNKS = 32
"""Of a step, as the worker has it; its module would import torch."""

RUNNING_EDGES = (0, 1, 8, 32, 64, 128, 256)
WAITING_EDGES = (-1, 0, 100, 1000, 10_000, 100_000)
"""Steps are grouped by counts above one edge and up to the next."""


class Policy(Struct, frozen=True):
    """How a scheduler is set up. A policy of the table below differs from another by these settings alone."""

    token_budget: int | None = None  # None: --token-budget
    objective: ObjectiveName = "balanced"
    itl_target_ms: float | None = None  # of every request
    tpot_target_ms: float | None = None
    ttft_target_ms: float | None = None
    ttft_prompt_rate: float | None = None  # every request wants its first token after prompt tokens / this seconds
    priorities: dict[str, int] = {}  # of each kind; 0 is that of any other
    does: str = ""  # in words, for the picture

    def asks(self, request: VirtualRequest) -> VirtualRequest:
        """The request as its client sends it under this policy."""
        rate = self.ttft_prompt_rate
        return msgspec.structs.replace(
            request,
            priority=self.priorities.get(request.kind, 0),
            itl_target_ms=self.itl_target_ms,
            tpot_target_ms=self.tpot_target_ms,
            ttft_target_ms=self.ttft_target_ms if rate is None else request.shape.prompt_len / rate * 1000.0,
        )


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


class Machine(Struct, frozen=True):
    """The engine's sizes, and the device's times."""

    table: StepTimesFile
    token_budget: int
    num_pages: int
    max_num_seqs: int
    max_model_len: int
    host_delay_s: float
    step_noise: float = STEP_NOISE
    device_pace: float = 1.0

    def scheduler(self, policy: Policy) -> Scheduler:
        """A fresh one. Raises ConfigError for a budget that the table's buckets do not serve."""
        return Scheduler(*self.scheduler_parts(policy))

    def scheduler_parts(self, policy: Policy) -> tuple[SchedulerLimits, CostModel]:
        """What a scheduler is made of."""
        token_budget = policy.token_budget or self.token_budget
        times = self.table.table.times
        buckets = tuple(time.bucket for time in times if time.bucket.num_rows <= token_budget)
        running = min(slots_for(self.max_num_seqs, token_budget), BucketTable(buckets, token_budget).most_slots)
        limits = SchedulerLimits(
            buckets=buckets,
            num_pages=self.num_pages,
            page_size=self.table.key.page_size,
            num_slots=running,
            max_chunks=min(MAX_CHUNKS, max(bucket.prefill_rows for bucket in buckets)),
            token_budget=token_budget,
            objective=policy.objective,
            max_model_len=self.max_model_len,
        )
        return limits, CostModel(self.table.table)


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


# --- the policy's own time -------------------------------------------------------------------------------------


def cost_rows(runs: Sequence[Run]) -> list[Figures]:
    """CPU time of the policy for one step, by policy and by how many requests ran and waited."""
    groups: dict[tuple[str, int, int], list[float]] = {}
    for run in runs:
        for running, waiting, cpu_us in zip(run.steps.running, run.steps.waiting, run.steps.cpu_us, strict=True):
            place = run.policy, _group_of(running, RUNNING_EDGES), _group_of(waiting, WAITING_EDGES)
            groups.setdefault(place, []).append(cpu_us)
    return [
        {
            "policy": policy,
            "running": _range(RUNNING_EDGES, running),
            "waiting": _range(WAITING_EDGES, waiting),
            "steps": len(costs),
            "p50 us": percentile(costs, 50),
            "p99 us": percentile(costs, 99),
        }
        for (policy, running, waiting), costs in sorted(groups.items())
    ]


def _group_of(count: int, edges: Sequence[int]) -> int:
    """Number of the group of a count: that of the edge below it; a count above all is in the last."""
    return next((index for index, edge in enumerate(edges[1:]) if count <= edge), len(edges) - 2)


def _range(edges: Sequence[int], index: int) -> str:
    low, high = edges[index] + 1, edges[index + 1]
    return str(low) if low == high else f"{low}-{high}"


# --- against a real run ----------------------------------------------------------------------------------------


def compare(on: Machine, path: Path, levels: Sequence[ServiceLevel]) -> Iterator[Figures]:
    """A row for each figure of each workload in a file of `benchmarks.serving`; off = simulated / real - 1."""
    document: dict[str, Any] = msgspec.json.decode(path.read_bytes())  # Any: figures of many types
    for real in document["rows"]:
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
    for step, (decode_positions, pairs) in zip(steps, attended(steps), strict=True):
        bucket = Bucket(*step.bucket)
        predicted = device.predict_ms(bucket, decode_positions, pairs)
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


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", action="append", help="as above; may be repeated")
    parser.add_argument("--policy", choices=POLICIES, action="append", help="default: all but level; may be repeated")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with a real run instead")
    parser.add_argument("--num-requests", type=int, help="of each load that does not say")
    parser.add_argument("--seed", type=int, default=0, help="of the first load; the next one has the next")
    parser.add_argument("--step-log", type=Path, metavar="FILE", help="compare the steps of a real run as well")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--step-times", type=Path, default=H200_STEP_TIMES, help="a table stored by graphgen tune")
    engine.add_argument("--token-budget", type=int, default=1024, help="the engine's default on CUDA")
    engine.add_argument("--num-pages", type=int, default=NUM_PAGES, help="what 8B weights leave on an H200")
    engine.add_argument("--max-num-seqs", type=int, default=256)
    engine.add_argument("--max-model-len", type=int, default=MAX_MODEL_LEN)
    engine.add_argument("--host-delay-ms", type=float, default=HOST_DELAY_S * 1000.0, help="result to planned step")
    engine.add_argument(
        "--step-noise", type=float, default=STEP_NOISE, help="spread of a step's time, as a share of it"
    )
    engine.add_argument(
        "--device-pace",
        type=float,
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
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.plot is not None and find_spec("matplotlib") is None:
        parser.error(f"--plot needs matplotlib: {how_to_install('bench')}")
    levels = [ServiceLevel(limit_ms / 1000.0, options.sla_prompt_rate) for limit_ms in options.sla_itl_ms]
    try:
        table = StepTimesFile.read(options.step_times)
        loads = [parse_load(text, options.num_requests) for text in options.load or DEFAULT_LOADS]
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
        compared = list(compare(on, options.against, levels)) if options.against is not None else []
        compared_steps = compare_steps(table, options.step_log) if options.step_log is not None else []
        show("The simulation against a real run", compared, about)
        show("The table against the steps of a real run", compared_steps, about)
        write_json(options.json, [*compared, *compared_steps], about)
        return [*compared, *compared_steps]
    runs = [
        simulate(on, policy, load, options.seed + index, levels)
        for index, load in enumerate(loads)
        for policy in options.policy or DRAWN_POLICIES
    ]
    rows, costs = [row for run in runs for row in run.rows], cost_rows(runs)
    shown = [{"policy": row["policy"], **table_row(_named(row), levels)} for row in rows]
    show("Simulated: latencies in ms; SLA N ms: requests a second that met it", shown, about)
    show("CPU of update() and schedule() for one step", costs, about)
    write_json(options.json, [*rows, *costs], about)
    if options.plot is not None:
        from benchmarks import plots  # matplotlib is an extra

        does = {name: policy.does for name, policy in POLICIES.items()}
        plots.plot_simulation(rows, costs, table.key.device, does, Path(options.plot))
    return rows


if __name__ == "__main__":
    main()
