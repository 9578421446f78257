"""How long until it serves? Starts of an engine in fresh processes: the phases, the total, and the first requests.

    python -m benchmarks.startup --model benchmarks/shapes/llama-3.1-8b --load-format dummy --runs 3
    python -m benchmarks.startup --model benchmarks/shapes/llama-3.1-8b --load-format dummy --runs 3 --cold

Every run is a program of its own that imports graphgen, makes an Engine, asks for two requests, and waits until the
rare buckets are captured. "ready" counts from the start of that program. With --cold each run gets an empty folder for
the compile caches of torch and Triton; without it they are where they always are, so that the first run may still fill
them and the later ones tell. The attention kernels, step times and the operating system's file cache stay as they are
in both cases.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from benchmarks.options import add_engine_options, engine_settings, make_parser, run_script
from benchmarks.report import Row, machine, percentile, show, write_json
from graphgen import Engine, EngineConfig, SamplingParams
from graphgen.ipc.engine_messages import EngineStats
from graphgen.ipc.errors import GraphgenError
from graphgen.ipc.worker_messages import Phase
from graphgen.launch.processes import process_age_s

ROOT = Path(__file__).resolve().parent.parent
COMPILE_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
GIVEN_UP_S = 10.0
FIRST_PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]


class Start(Struct, frozen=True):
    """One start, as the program that made it saw it."""

    device: str
    attention: str
    compiled: bool
    phases: tuple[Phase, ...]  # of the worker, one after another, their seconds add up
    engine_s: float  # the constructor of Engine
    ready_s: float  # from the start of the program: the interpreter and its imports too
    request_ms: tuple[float, float]  # time to the first token of the first and of the second request
    close_s: float
    buckets_at_ready: int = 0  # captured ones
    buckets: int = 0  # that are captured in the end
    buckets_total: int = 0
    all_captured_s: float = 0.0  # from ready, with the quiet that captures wait for
    capture_ms_max: float = 0.0  # what a request may wait for a capture, and the timing of its bucket


def start_once(config: EngineConfig) -> Start:
    """Starts an engine in this process, which should be fresh."""
    with Engine(config) as engine:
        ready_s = process_age_s()
        sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        first, second = (engine.generate(FIRST_PROMPT, sampling)[0].timing.first_token_s * 1000.0 for _ in range(2))
        worker, engine_s = engine.info.worker, engine.start_s
        stats = _when_captured(engine)
        all_captured_s = process_age_s() - ready_s
        closing_s = process_age_s()
    return Start(
        device=worker.device,
        attention=worker.attention,
        compiled=worker.compiled,
        phases=worker.phases,
        engine_s=engine_s,
        ready_s=ready_s,
        request_ms=(first, second),
        close_s=process_age_s() - closing_s,
        buckets_at_ready=len(worker.captured),
        buckets=stats.buckets_captured,
        buckets_total=stats.buckets_total,
        all_captured_s=all_captured_s,
        capture_ms_max=stats.capture_ms_max,
    )


def _when_captured(engine: Engine) -> EngineStats:
    """Once no bucket has been added for a while: all are there, or the others were given up."""
    stats = engine.stats()
    changed_s = time.monotonic()
    while stats.buckets_captured < stats.buckets_total and time.monotonic() < changed_s + GIVEN_UP_S:
        time.sleep(0.05)
        before, stats = stats, engine.stats()
        if stats.buckets_captured != before.buckets_captured:
            changed_s = time.monotonic()
    return stats


def start_in_new_process(config: EngineConfig, caches: Mapping[str, str], timeout_s: float) -> Start:
    """Runs `start_once` in a program of its own, with these variables added to its environment."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup", "--once"],
        input=msgspec.json.encode(config),
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, **caches},
        timeout=timeout_s,
    )
    if done.returncode:
        raise SystemExit(f"the start ended with exit code {done.returncode}: what it printed is above")
    return msgspec.json.decode(done.stdout, type=Start)


def measure(config: EngineConfig, num_runs: int, cold: bool, timeout_s: float) -> list[Start]:
    """Starts one after another; cold ones find empty compile caches, which are removed afterwards."""
    starts = []
    for _ in range(num_runs):
        with tempfile.TemporaryDirectory(prefix="graphgen-caches-") as folder:
            caches = {name: f"{folder}/{name.lower()}" for name in COMPILE_CACHES} if cold else {}
            starts.append(start_in_new_process(config, caches, timeout_s))
    return starts


def phase_rows(starts: Sequence[Start]) -> list[Row]:
    """One row a phase, in the order they happen: median, least and most seconds."""
    measured = {name: [_phase_s(start, name) for start in starts] for name in _phase_names(starts)}
    measured["worker, all phases"] = [sum(phase.seconds for phase in start.phases) for start in starts]
    measured["Engine()"] = [start.engine_s for start in starts]
    measured["ready, from the program's start"] = [start.ready_s for start in starts]
    measured["close()"] = [start.close_s for start in starts]
    return [
        {
            "phase": name,
            "median s": percentile(times, 50),
            "min s": min(times),
            "max s": max(times),
            "beside earlier phases s": percentile([_hidden_s(start, name) for start in starts], 50),
        }
        for name, times in measured.items()
    ]


def request_rows(starts: Sequence[Start]) -> list[Row]:
    """Time to the first token of the first two requests: equal when the start left nothing to do."""
    named = zip(
        ("first request", "second request"), zip(*(start.request_ms for start in starts), strict=True), strict=True
    )
    return [{"request": name, "TTFT median ms": percentile(times, 50), "max ms": max(times)} for name, times in named]


def capture_rows(starts: Sequence[Start]) -> list[Row]:
    """What is captured when, and the longest that a request may have waited for a capture."""
    return [
        {
            "buckets at ready": start.buckets_at_ready,
            "in the end": start.buckets,
            "of": start.buckets_total,
            "all captured after s": start.all_captured_s if start.buckets > start.buckets_at_ready else 0.0,
            "longest capture ms": start.capture_ms_max,
        }
        for start in starts
    ]


def _phase_names(starts: Sequence[Start]) -> list[str]:
    return list(dict.fromkeys(phase.name for start in starts for phase in start.phases))


def _phase_s(start: Start, name: str) -> float:
    """0 for a phase that this start did not have; a name that came twice counts together."""
    return sum(phase.seconds for phase in start.phases if phase.name == name)


def _hidden_s(start: Start, name: str) -> float:
    """Work of a phase that took none of its own time."""
    return sum(phase.hidden_s for phase in start.phases if phase.name == name)


def _run_child() -> None:
    """--once: the config as JSON on standard input, the Start as JSON on standard output."""
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    try:
        start = start_once(config)
    except GraphgenError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    sys.stdout.buffer.write(msgspec.json.encode(start))


def main() -> None:
    parser = make_parser(__doc__)
    add_engine_options(parser, without=("start_timeout_s",))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="empty compile caches for every run")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that one run may take")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        _run_child()
        return
    # The child runs elsewhere: a folder keeps its meaning, a hub id is none.
    if options.model and Path(options.model).is_dir():
        options.model = str(Path(options.model).absolute())
    config = EngineConfig(**engine_settings(options, captures_all=False, start_timeout_s=options.timeout))
    starts = measure(config, options.runs, options.cold, options.timeout)
    caches = "cold" if options.cold else "as found"
    about = machine(starts[-1].device) | {
        "attention": starts[-1].attention,
        "compiled": str(starts[-1].compiled),
        "compile_caches": caches,
    }
    phases, requests, captures = phase_rows(starts), request_rows(starts), capture_rows(starts)
    show(f"{options.runs} starts of {options.model or 'the demo model'}, compile caches {caches}", phases, about)
    show("The first requests after it", requests, about)
    show("Buckets, of each start", captures, about)
    write_json(options.json, [*phases, *requests, *captures], about)


if __name__ == "__main__":
    run_script(main)
