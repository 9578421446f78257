"""Reads step logs, and what they say of a stretch of serving: steps, padding, idle time of the device.

Plain data in and out; the format is described in `graphgen.scheduler.step_log`. Called by `benchmarks.serving`,
`benchmarks.timeline` and `benchmarks.simulate`.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from benchmarks.report import percentile
from graphgen.ipc.attended import Attended


class Step(Struct, frozen=True):
    """One line of the log. Times are time.monotonic()."""

    step: int
    bucket: tuple[int, int]  # prefill rows, decode rows
    chunks: tuple[tuple[int, int, int], ...]  # request, start, length
    decodes: tuple[int, ...]  # requests
    padding: int  # rows of the bucket that held no token
    planned_s: float
    received_s: float
    launched_s: float
    started_s: float
    finished_s: float

    @property
    def chunk_tokens(self) -> int:
        return sum(length for _, _, length in self.chunks)


class StepLogReader:
    """A log that may still grow: each call of `read_new` gives the steps written since the last one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._decoder = msgspec.json.Decoder(Step)

    def read_new(self) -> list[Step]:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # a line that is still being written waits for the next call
        self._offset += len(whole)
        return [self._decoder.decode(line) for line in whole.splitlines()]


def summarize_steps(steps: Sequence[Step]) -> dict[str, object]:
    """Figures of consecutive steps. None where there is no step.

    padding_share: rows without a token / all rows. device_idle_share: time between the end of one step and the start
    of the next / time from the first start to the last end; waiting for requests counts as idle.
    """
    rows = sum(sum(step.bucket) for step in steps)
    times_ms = [(step.finished_s - step.started_s) * 1000.0 for step in steps]
    return {
        "steps": len(steps),
        "padding_share": sum(step.padding for step in steps) / rows if rows else None,
        "device_idle_share": idle_share(steps),
        **{f"p{percent}_step_ms": percentile(times_ms, percent) if steps else None for percent in (50, 95, 99)},
    }


def idle_share(steps: Sequence[Step]) -> float | None:
    """Share of the time in which the device had no step."""
    if not steps:
        return None
    whole_s = steps[-1].finished_s - steps[0].started_s
    idle_s = sum(max(0.0, after.started_s - before.finished_s) for before, after in itertools.pairwise(steps))
    return idle_s / whole_s if whole_s > 0.0 else 0.0


def attended(steps: Iterable[Step]) -> Iterator[Attended]:
    """What the rows of each step attend to.

    steps: of a whole log from its beginning, since a decode row is where the steps before it have brought its request.
    """
    num_computed: dict[int, int] = {}
    for step in steps:
        chunks = Attended()
        for request, start, length in step.chunks:
            chunks = chunks.with_chunk(start, length)
            num_computed[request] = start + length
        for request in step.decodes:
            num_computed[request] += 1
        yield chunks._replace(decode_positions=sum(num_computed[request] for request in step.decodes))
