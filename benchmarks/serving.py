"""How fast are requests served, and how steadily do their tokens come? Many clients against one engine.

    python -m benchmarks.serving --model benchmarks/shapes/llama-3.1-8b --load-format dummy --max-model-len 16384 \\
        --workload 2600/60:16 --workload 1200/128:64 --workload 256/256:256x768 --json serving.json --plot serving.png

A workload is MEAN_PROMPT/MEAN_OUTPUT:CLIENTS (closed loop: each client sends its next request when its last one has
ended) or MEAN_PROMPT/MEAN_OUTPUT@RATE (open loop: Poisson arrivals, so many a second on average); xN behind it sets the
number of requests, by default 4 a client and 32 more. All workloads run in one engine, each with a seed of its own.
--sweep-budget repeats them in a new engine for every token budget. Decoding is greedy and ignores end of sequence.

Token times are taken on the thread that receives them from the scheduler. --stream reads every token in a task of an
event loop instead, as a program with an AsyncEngine does, and takes the time there.
"""

import argparse
import asyncio
import itertools
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from msgspec import Struct

from benchmarks.metrics import Figures, ServedRequest, ServiceLevel, summarize, what_is_asked
from benchmarks.options import add_engine_options, engine_settings, make_parser
from benchmarks.report import machine, show, write_json
from benchmarks.step_log import StepLogReader, summarize_steps
from benchmarks.workload import Load, PlannedRequest, Trace, Workload
from graphgen import EngineConfig, InvalidRequestError, SamplingParams
from graphgen.base.version import how_to_install
from graphgen.calls.outputs import Delivery, RequestOutput
from graphgen.calls.streams import AsyncStream, Mailbox
from graphgen.ipc.messages import EngineStats, WorkerReady
from graphgen.requests.core import EngineCore

Reader = Callable[[PlannedRequest], Awaitable[tuple[float, ...]]]
"""Sends a request and waits for its last token: the time of each token since it was sent."""


# --- sending ---------------------------------------------------------------------------------------------------


class Targets(Struct, frozen=True):
    """What requests ask for; without an ITL target they ask for nothing."""

    itl_ms: float | None = None
    prompt_rate: float = 512.0  # the first token is due after prompt tokens / rate seconds

    def sampling_of(self, request: PlannedRequest) -> SamplingParams:
        ttft_ms = len(request.prompt_token_ids) / self.prompt_rate * 1000.0
        return SamplingParams(
            temperature=0.0,
            max_tokens=request.output_len,
            ignore_eos=True,
            itl_target_ms=self.itl_ms,
            ttft_target_ms=None if self.itl_ms is None else ttft_ms,
        )


def whole_reader(core: EngineCore, targets: Targets) -> Reader:
    """The engine keeps the times; this process wakes once a request, so measuring costs nothing per token."""
    loop = asyncio.get_running_loop()

    async def read(request: PlannedRequest) -> tuple[float, ...]:
        done: asyncio.Future[Delivery] = loop.create_future()

        def sink(delivery: Delivery) -> None:
            loop.call_soon_threadsafe(done.set_result, delivery)

        core.open([request.prompt_token_ids], targets.sampling_of(request), streams=False, sinks=[sink])
        output = await done
        if isinstance(output, Exception):
            raise output
        assert isinstance(output, RequestOutput), "a request that does not stream gets its output"
        return output.timing.token_times_s

    return read


def stream_reader(core: EngineCore, targets: Targets) -> Reader:
    """Takes the time where a user's task gets the token: what AsyncEngine.generate gives, with the loop's delays."""
    mailbox = Mailbox(asyncio.get_running_loop())

    async def read(request: PlannedRequest) -> tuple[float, ...]:
        sent_s = time.monotonic()
        times: list[float] = []
        sampling = targets.sampling_of(request)
        async for piece in AsyncStream(core, mailbox, request.prompt_token_ids, sampling):
            times += [time.monotonic() - sent_s] * len(piece.token_ids)
        return tuple(times)

    return read


async def serve(request: PlannedRequest, read: Reader) -> ServedRequest:
    """A refused request is a failed one; an engine that dies ends the benchmark."""
    sent_s = time.monotonic()
    prompt_len = len(request.prompt_token_ids)
    try:
        return ServedRequest(prompt_len, sent_s, await read(request))
    except InvalidRequestError as error:
        return ServedRequest(prompt_len, sent_s, (), str(error))


async def closed_loop(requests: Iterable[PlannedRequest], clients: int, read: Reader) -> list[ServedRequest]:
    """The next request goes to the client that is free first."""
    waiting = iter(requests)
    served: list[ServedRequest] = []

    async def client() -> None:
        for request in waiting:
            served.append(await serve(request, read))

    await asyncio.gather(*(client() for _ in range(clients)))
    return served


async def open_loop(requests: Iterable[PlannedRequest], read: Reader) -> list[ServedRequest]:
    """Every request at its time, whatever has become of those before it."""
    begun_s = time.monotonic()

    async def arrive(request: PlannedRequest) -> ServedRequest:
        await asyncio.sleep(begun_s + request.arrival_s - time.monotonic())
        return await serve(request, read)

    return await asyncio.gather(*map(arrive, requests))


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


def run_engine(
    config: EngineConfig, runs: Sequence[Run], levels: Sequence[ServiceLevel]
) -> tuple[list[Figures], WorkerReady]:
    """All rows, one after another, in one engine. config: with a step log."""
    assert config.step_log is not None, "the figures of steps come from the log"
    core = EngineCore(config)
    try:
        # The first request of a process pays for imports of the client's side.
        asyncio.run(_warm_up(core))
        steps = StepLogReader(Path(config.step_log))
        rows = [measure(core, run, levels, steps) for run in runs]
        return rows, core.ready.worker
    finally:
        core.close()


async def _warm_up(core: EngineCore) -> None:
    await whole_reader(core, Targets())(PlannedRequest(0.0, [1, 2, 3], 4))


# --- showing ---------------------------------------------------------------------------------------------------


def table_row(row: Figures, levels: Sequence[ServiceLevel]) -> dict[str, str]:
    """The figures that fit on a screen. Latencies in ms; under SLA the requests a second that met it."""
    return {
        "workload": f"{row['workload']}{what_is_asked(row)}",
        "budget": str(row["token_budget"]),
        "req/s": _number(row["request_throughput"], 2),
        "out tok/s": _number(row["output_throughput"], 0),
        "TTFT p50/p95": _numbers(row, ("median_ttft_ms", "p95_ttft_ms"), 0),
        "ITL p50/p95/p99/max": _numbers(row, ("median_itl_ms", "p95_itl_ms", "p99_itl_ms", "max_itl_ms"), 2),
        **{
            f"SLA {level.itl_s * 1000:g} ms": _number(row[f"goodput_itl_{level.itl_s * 1000:g}ms"], 2)
            for level in levels
        },
        "padding": _percent(row["padding_share"]),
        "idle": _percent(row["device_idle_share"]),
        "preempt": str(row["preemptions"]),
    }


def _number(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else "-"


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
    load.add_argument("--num-requests", type=int, help="of each row; default 4 a client and 32 more, 256 with a rate")
    load.add_argument("--seed", type=int, default=0, help="of the first row; the next one has the next")
    load.add_argument(
        "--itl-target-ms",
        type=float,
        nargs="+",
        default=[0.0],
        help="what every request asks of its gaps, 0 for nothing, and with it a first token after prompt tokens /"
        " --sla-prompt-rate seconds; all rows are repeated for each",
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
    loads = itertools.product(options.itl_target_ms, loads_of(options))
    return [
        Run(load, Targets(target_ms or None, options.sla_prompt_rate), options.seed + index, options.stream)
        for index, (target_ms, load) in enumerate(loads)
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
            new_rows, worker = run_engine(config, runs, levels)
            rows += new_rows
    about = machine(worker.device) | {"attention": worker.attention, "compiled": str(worker.compiled)}
    show(
        "Serving: latencies in ms; SLA N ms: requests a second that met it",
        [table_row(row, levels) for row in rows],
        about,
    )
    for name in ("eager_steps", "recompilations"):
        if slow := [row["workload"] for row in rows if row[name]]:
            print(f"{name} are not 0 with {', '.join(map(str, slow))}: these figures are not those of a healthy engine")
    write_json(options.json, rows, about)
    if options.plot is not None:
        from benchmarks import plots  # matplotlib is an extra

        plots.plot_serving(rows, about["device"], Path(options.plot))
    return rows


if __name__ == "__main__":
    main()
