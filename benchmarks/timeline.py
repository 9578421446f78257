"""What happened when? From a step log to a trace for Perfetto and a picture of a second of serving.

    python -m benchmarks.serving --workload 2600/60:16 --step-log steps.jsonl ...
    python -m benchmarks.timeline steps.jsonl --out trace.json --png timeline.png

Open the trace at https://ui.perfetto.dev or chrome://tracing. It has one track for each place a step passes: the
scheduler makes its plan, the worker hands it to the device, the device runs it; arrows lead from one to the next.
Without --start-s and --seconds the trace holds the whole log and the picture the second in its middle.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.options import make_parser, run_script
from benchmarks.step_log import Step, StepLogReader, idle_share
from graphgen.base.version import how_to_install

Event = dict[str, object]
"""One event of the Chrome trace format. Its times are in microseconds."""

PROCESS_ID = 1
SCHEDULER, WORKER, DEVICE = 1, 2, 3
"""Track numbers: `tid` in the format."""
TRACK_NAMES = {
    SCHEDULER: "scheduler: plan made and sent",
    WORKER: "worker: inputs packed and launched",
    DEVICE: "device",
}


def window(steps: Sequence[Step], start_s: float | None, seconds: float) -> list[Step]:
    """Steps that ran in [start_s, start_s + seconds) after the first step's start; None centres it in the log."""
    if not steps:
        raise ValueError("the step log is empty: was the engine closed before a request came?")
    origin_s, end_s = steps[0].started_s, steps[-1].finished_s
    begin_s = origin_s + start_s if start_s is not None else max(origin_s, (origin_s + end_s - seconds) / 2)
    chosen = [step for step in steps if step.finished_s > begin_s and step.started_s < begin_s + seconds]
    if not chosen:
        raise ValueError(
            f"no step ran from {begin_s - origin_s:.3f} s to {begin_s - origin_s + seconds:.3f} s, the log goes from 0"
            f" to {end_s - origin_s:.3f} s: choose another --start-s"
        )
    return chosen


def chrome_trace(steps: Sequence[Step]) -> dict[str, object]:
    """The trace of these steps; time 0 is the first plan."""
    origin_s = min(step.planned_s for step in steps)
    events = [*_track_names(), *_slices(steps, origin_s), *_counters(steps, origin_s)]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _track_names() -> Iterator[Event]:
    yield {"ph": "M", "pid": PROCESS_ID, "name": "process_name", "args": {"name": "graphgen"}}
    for track, name in TRACK_NAMES.items():
        yield {"ph": "M", "pid": PROCESS_ID, "tid": track, "name": "thread_name", "args": {"name": name}}
        yield {"ph": "M", "pid": PROCESS_ID, "tid": track, "name": "thread_sort_index", "args": {"sort_index": track}}


def _slices(steps: Sequence[Step], origin_s: float) -> Iterator[Event]:
    """Three slices a step and the arrows between them. On one track slices must not overlap, so each ends at the latest
    where the next one begins: two plans may be on their way at once."""
    ends = {SCHEDULER: 0.0, WORKER: 0.0, DEVICE: 0.0}
    for step, following in itertools.zip_longest(steps, steps[1:]):
        received_s = step.received_s if following is None else min(step.received_s, following.planned_s)
        places = (
            (SCHEDULER, f"plan {step.step}", step.planned_s, received_s),
            (WORKER, f"launch {step.step}", step.received_s, step.launched_s),
            (DEVICE, _title(step), step.started_s, step.finished_s),
        )
        for (track, name, begin_s, end_s), arrow in zip(places, "stf", strict=True):
            begin_us = max(ends[track], (begin_s - origin_s) * 1e6)
            ends[track] = max(begin_us, (end_s - origin_s) * 1e6)
            place = {"pid": PROCESS_ID, "tid": track, "ts": begin_us}
            yield {
                "ph": "X",
                "name": name,
                "cat": "step",
                "dur": ends[track] - begin_us,
                "args": _details(step),
                **place,
            }
            yield {"ph": arrow, "name": "step", "cat": "flow", "id": step.step, "bp": "e", **place}


def _counters(steps: Sequence[Step], origin_s: float) -> Iterator[Event]:
    for step in steps:
        place = {"ph": "C", "pid": PROCESS_ID, "ts": (step.started_s - origin_s) * 1e6}
        yield {"name": "prompt tokens in the step", "args": {"tokens": step.chunk_tokens}, **place}
        yield {"name": "decodes in the step", "args": {"rows": len(step.decodes)}, **place}


def _title(step: Step) -> str:
    return f"step {step.step}: {step.chunk_tokens} prompt tokens + {len(step.decodes)} decodes"


def _details(step: Step) -> dict[str, object]:
    return {
        "step": step.step,
        "bucket": "{}+{}".format(*step.bucket),
        "chunks": [f"request {request}: {start}..{start + length}" for request, start, length in step.chunks],
        "decodes": list(step.decodes),
        "padding rows": step.padding,
        "ms from plan to start": (step.started_s - step.planned_s) * 1000.0,
        "ms on the device": (step.finished_s - step.started_s) * 1000.0,
    }


def describe(steps: Sequence[Step]) -> str:
    """One line on what the steps did."""
    idle = idle_share(steps)
    assert idle is not None, "a window has steps"
    return (
        f"{len(steps)} steps in {steps[-1].finished_s - steps[0].started_s:.2f} s:"
        f" {sum(step.chunk_tokens for step in steps)} prompt tokens and"
        f" {sum(len(step.decodes) for step in steps)} decode tokens, device busy {1.0 - idle:.1%}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("step_log", type=Path)
    parser.add_argument("--start-s", type=float, help="seconds after the first step's start")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--out", type=Path, help="write the trace here")
    parser.add_argument("--png", type=Path, help="draw the picture here; needs matplotlib")
    options = parser.parse_args(arguments)
    if options.png is not None and find_spec("matplotlib") is None:
        parser.error(f"--png needs matplotlib: {how_to_install('bench')}")
    try:
        steps = StepLogReader(options.step_log).read_new()
        shown = window(steps, options.start_s, options.seconds or 1.0)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(describe(shown))
    if options.out is not None:
        whole = options.start_s is None and options.seconds is None
        options.out.write_text(json.dumps(chrome_trace(steps if whole else shown)))
    if options.png is not None:
        from benchmarks import plots  # matplotlib is an extra

        plots.plot_timeline(shown, describe(shown), options.png)


if __name__ == "__main__":
    run_script(main)
