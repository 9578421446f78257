"""The rows of `benchmarks.simulate --replicas`: every load with every way to spread it, against one engine alone.

    python -m benchmarks.simulate --replicas 16 --json replicas.json --plot replicas.png
    python -m benchmarks.simulate --replicas 256 1000 --load conversations --load uncached --seconds 16

Up to --most-scheduled engines are real schedulers; with more each engine is a model of one, and so is the one engine
that is the measure. `of N` is the rate as a multiple of that of one engine, over the number of engines. That one engine
serves the same load from as many clients, without the death, the burst or the slowness.
"""

import gc
from collections.abc import Iterator, Sequence

from benchmarks.metrics import Figures
from benchmarks.modelled_engine import ModelledEngine, StepCosts
from benchmarks.routings import make_routing
from benchmarks.scheduled_engine import ScheduledEngine
from benchmarks.simulated_machine import Machine, Policy
from benchmarks.simulated_replicas import ReplicaRun, Setting, SimulatedEngine, figures_of
from graphgen.router.records import Capacity
from graphgen.scheduler.cost_model import CostModel

MOST_SCHEDULED = 16
FULL_STEP = 512
"""Rows of a modelled engine's step: about where an H200 computes rows at its best rate."""
ALONE_FACTOR = 16.0
"""The one engine is looked at for so many times as long: it ends that much fewer requests a second."""
SAME_ALONE = {"death": "conversations", "slow": "conversations", "bursts": "conversations"}

SHOWN = {
    "load": ("load", ""),
    "engines": ("engines", ""),
    "routing": ("by", ""),
    "request_throughput": ("req/s", ".1f"),
    "of_n": ("of N", ".3f"),
    "hit_rate": ("cached", ".2f"),
    "p50_ttft_ms": ("TTFT p50", ".0f"),
    "p95_ttft_ms": ("p95", ".0f"),
    "p99_ttft_ms": ("p99", ".0f"),
    "max_ttft_ms": ("max", ".0f"),
    "least_throughput": ("worst s", ".0f"),
    "moves": ("moved", ""),
    "p50_decision_us": ("us p50", ".0f"),
    "p99_decision_us": ("p99 us", ".0f"),
}
"""Figures of a row, the columns that they are shown in, and how."""


def replica_rows(
    on: Machine,
    engines: Sequence[int],
    loads: Sequence[str],
    routings: Sequence[str],
    *,
    most_scheduled: int,
    num_routers: int,
    clients: int,
    seconds: float,
    seed: int,
) -> Iterator[Figures]:
    """In the order of the arguments. most_scheduled: engines up to which they are real schedulers. num_routers: that
    each spread what their clients send. clients: of an engine."""
    alone: dict[tuple[str, bool], float] = {}
    for count in engines:
        for load in loads:
            setting = Setting(load, count, _capacity(on), clients, seconds, seed, num_routers)
            key = SAME_ALONE.get(load, load), count <= most_scheduled
            if key not in alone:
                single = Setting(key[0], 1, _capacity(on), clients, ALONE_FACTOR * seconds, seed)
                alone[key] = float(str(run_replicas(on, single, "router", key[1])["request_throughput"]))
            for routing in routings:
                row = run_replicas(on, setting, routing, key[1])
                yield row | {"of_n": float(str(row["request_throughput"])) / count / alone[key]}


def run_replicas(on: Machine, setting: Setting, routing: str, are_scheduled: bool) -> Figures:
    """One run. are_scheduled: the engines have real schedulers."""
    routers = [make_routing(routing, setting.seed + number) for number in range(setting.num_routers)]
    for router in routers:
        for number in range(setting.num_engines):
            router.joined(f"engine {number}", setting.capacity, 0.0)
    engines: list[SimulatedEngine]
    if are_scheduled:
        engines = [
            ScheduledEngine(lambda: on.scheduler(Policy()), CostModel(on.table.table))
            for _ in range(setting.num_engines)
        ]
    else:
        costs = StepCosts.of(on.table.table, FULL_STEP)
        engines = [
            ModelledEngine(costs, on.max_num_seqs, on.num_pages, on.table.key.page_size)
            for _ in range(setting.num_engines)
        ]
    run = ReplicaRun(setting, engines, routers, has_tokens=are_scheduled)
    gc.disable()  # a collection would be timed with whatever decision it interrupts
    try:
        run.run()
    finally:
        gc.enable()
    return figures_of(run, setting) | {"routing": routing, "routers": setting.num_routers}


def shown(row: Figures) -> Figures:
    """What a table has of a row."""
    return {column: format(row[name], form) for name, (column, form) in SHOWN.items()}


def _capacity(on: Machine) -> Capacity:
    return Capacity(on.max_num_seqs, on.num_pages, on.table.key.page_size, on.token_budget)
