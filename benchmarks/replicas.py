"""Do N engines serve N times what one serves? Real engines, each on a GPU of its own, behind the router of one program.

    python -m benchmarks.replicas --model benchmarks/shapes/llama-3.1-8b --load-format dummy --max-model-len 16384 \\
        --replicas 1 2 --workload 2600/60:64 --workload 256/256:256 --json replicas.json

A workload is one engine's: PROMPT/OUTPUT:CLIENTS, xREQUESTS behind it sets the number of requests. N engines get N
times the clients, and each request N times in its place, with other token ids: N times the same work. No prompt begins
as another does, so nothing is found in a cache; what prefixes are worth, and what a bad draw of lengths does to a
router, `python -m benchmarks.simulate --replicas` shows. `times` is the rate in units of the workload's first row;
`cpu` are the processor seconds of this program a second: the router, all receiving threads and the clients.

--paced needs no GPU: workers wait as long as a device of a table would take (`benchmarks.paced`), all else is real. So
`times` says what the program, its router, the schedulers and ZeroMQ on this machine let so many engines lose.

    python -m benchmarks.replicas --model benchmarks/shapes/llama-3.1-8b \\
        --paced benchmarks/shapes/llama-3.1-8b/h200-step-times.json --replicas 1 4
"""

import argparse
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from benchmarks.metrics import Figures, summarize
from benchmarks.options import add_engine_options, engine_settings, make_parser, run_script
from benchmarks.paced.launch import paced_engines, paced_settings
from benchmarks.report import machine, show, write_json
from benchmarks.sending import Targets
from benchmarks.serving import Run, run_load
from benchmarks.workload import Workload
from graphgen import EngineConfig
from graphgen.api.core import EngineCore
from graphgen.launch.config import EngineSettings
from graphgen.launch.step_times_store import StepTimesFile

WARM_UP = 8
"""Requests of each engine before what is measured."""


def measure(core: EngineCore, workload: Workload, count: int, seed: int) -> Figures:
    """One row: so many engines with their load."""
    load = workload.times(count)
    requests = load.requests(seed, core.launch.spec.vocab_size, core.launch.max_model_len)
    begun_s, cpu_s = time.monotonic(), time.process_time()
    served = run_load(core, Run(load, Targets(), seed, stream=False), requests)
    seconds, cpu_s = time.monotonic() - begun_s, time.process_time() - cpu_s
    finished = [0 if one is None else one.finished for one in core.stats().engines]
    return {
        "workload": workload.label,
        "replicas": count,
        **summarize(served, []),
        "program_cpu": cpu_s / seconds,
        "finished_each": finished,
    }


def warm_up(core: EngineCore, count: int) -> None:
    """What a first request of each engine pays is not the point."""
    load = Workload.of(100, 8, WARM_UP * count, None, WARM_UP * count)
    requests = load.requests(0, core.launch.spec.vocab_size, core.launch.max_model_len)
    run_load(core, Run(load, Targets(), 0, stream=False), requests)


def run(
    options: argparse.Namespace, workloads: Sequence[Workload], counts: Sequence[int]
) -> tuple[list[Figures], dict[str, str]]:
    """All rows, and what they were measured on."""
    rows: list[Figures] = []
    about: dict[str, str] = {}
    with contextlib.nullcontext() if options.paced is None else paced_engines(options.paced):
        for count in counts:
            core = EngineCore(EngineConfig(**settings_of(options, count)))
            try:
                warm_up(core, count)
                # Engines are new for each count. Their warm-up and each workload have seeds of their own, so that no
                # prompt is found that another one left.
                rows += [measure(core, workload, count, place) for place, workload in enumerate(workloads, 1)]
                about = about or machine(core.ready.worker.device)
            finally:
                core.close()
    first = {str(row["workload"]): row for row in reversed(rows)}
    for row in rows:
        row["times"] = _rate(row) / _rate(first[str(row["workload"])])
    return rows, about


def settings_of(options: argparse.Namespace, count: int) -> EngineSettings:
    given = engine_settings(options, replicas=count)
    if options.paced is None:
        return given
    paced = paced_settings(StepTimesFile.read(options.paced), given.get("objective", "balanced"))
    return cast(EngineSettings, {**paced, **given})


def _rate(row: Figures) -> float:
    return float(str(row["request_throughput"]))


def table_row(row: Figures) -> dict[str, object]:
    return {
        "workload": row["workload"],
        "replicas": row["replicas"],
        "req/s": row["request_throughput"],
        "times": row["times"],
        "out tok/s": row["output_throughput"],
        "TTFT p50": row["median_ttft_ms"],
        "ITL p50": row["median_itl_ms"],
        "ITL p95": row["p95_itl_ms"],
        "cpu": row["program_cpu"],
        "failed": row["failed"],
    }


def main(arguments: Sequence[str] | None = None) -> list[Figures]:
    """The rows, also shown and written as asked. arguments: those of the command line by default."""
    parser = make_parser(__doc__)
    add_engine_options(parser)
    load = parser.add_argument_group("load")
    load.add_argument("--replicas", type=int, nargs="+", default=[1, 2], help="engines, one start for each number")
    load.add_argument("--workload", action="append", default=[], help="of one engine; may be given several times")
    load.add_argument("--paced", type=Path, metavar="FILE", help="a table stored by graphgen tune: see above")
    load.add_argument("--json", help="write the figures here")
    options = parser.parse_args(arguments)
    try:
        workloads = [Workload.parse(text, None) for text in options.workload or ["2600/60:64", "256/256:256"]]
        if options.paced is not None:
            StepTimesFile.read(options.paced)
        for count in options.replicas:
            EngineConfig(**settings_of(options, count))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.paced is not None and options.tensor_parallel not in (None, 1):
        parser.error("--paced has workers of one rank: leave --tensor-parallel out")
    rows, about = run(options, workloads, options.replicas)
    show("Engines side by side: latencies in ms", [table_row(row) for row in rows], about)
    write_json(options.json, rows, about)
    return rows


if __name__ == "__main__":
    run_script(main)
