"""Rare buckets, captured between requests: one for each time that the scheduler asks.

Owns what becomes of a bucket: captured and timed, or given up because the device has no memory for it. When to do so is
the scheduler's (`graphgen.scheduler.captures`), how is the runner's. Called by process.py.

The time of a bucket is measured beside that of one which is known, the one that its steps have used until now: a device
that has idled runs faster than under load, and both alike. It is stored with the others, so that a second start of the
same engine has it.
"""

import os
import time
from collections.abc import Sequence

import msgspec
import torch

from graphgen.capture.graphs import is_out_of_memory
from graphgen.ipc.worker_messages import Bucket, BucketTime, Captured, StepTimeTable, WorkerReady
from graphgen.launch.launch_config import LaunchConfig
from graphgen.launch.step_times_store import QUICK_SOURCE, StepTimesKey, save_step_times
from graphgen.models.collectives.group import RankGroup
from graphgen.worker.runner import ModelRunner
from graphgen.worker.step_timing import Depth, Places, open_late_timer

BESIDE = Depth(settling=1, repeats=1)
"""Of a bucket and of the known one, in turn: two dozen milliseconds each, since a request may wait for them."""
ORDER = (True, False, False, True)
"""Whether the known one is timed: a clock that falls evenly meanwhile changes the quotient of neither."""


class LateCaptures:
    """Of one rank."""

    def __init__(
        self, runner: ModelRunner, config: LaunchConfig, ready: WorkerReady, ranks: RankGroup | None = None
    ) -> None:
        """ready: what the worker said when it was."""
        self._runner = runner
        self._config = config
        self._ranks = ranks
        self._ready = ready
        self._table = ready.step_times

    def capture(self, bucket: Bucket) -> Captured:
        """Of several ranks all are asked, and all say the same. Raises what a fault of the device raises."""
        begun_s = time.monotonic()
        problem = self._capture(bucket)
        milliseconds = None
        if self._table is not None and not problem and self._most(not self._table.has([bucket])):
            milliseconds = self._time(bucket, self._table)
        return Captured(bucket, time.monotonic() - begun_s, milliseconds, problem)

    def _capture(self, bucket: Bucket) -> str:
        """Returns why it is given up, if so."""
        problem = ""
        try:
            self._runner.capture(bucket)
        except MemoryError as error:
            problem = str(error)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            problem = str(error).partition("\n")[0]
            torch.cuda.empty_cache()  # of what its warming-up took
        return problem or ("another rank has no memory for it" if self._most(bool(problem)) else "")

    def _most(self, holds: bool) -> bool:
        """Whether it holds on any rank."""
        return holds if self._ranks is None else self._ranks.most(float(holds)) > 0

    def _time(self, bucket: Bucket, table: StepTimeTable) -> float:
        known = {time.bucket: time.milliseconds for time in table.times}
        first = stand_in(bucket, self._ready.captured)
        places = Places(table.decode_context, table.prompt_start)
        took: dict[bool, float] = {True: 0.0, False: 0.0}
        with open_late_timer(self._runner, self._config, places, self._ranks) as timer:
            for is_known in ORDER:
                took[is_known] += sum(timer.times_ms(first if is_known else bucket, places, BESIDE))
        milliseconds = known[first] * took[False] / took[True]
        self._store(table, bucket, milliseconds)
        return milliseconds

    def _store(self, table: StepTimeTable, bucket: Bucket, milliseconds: float) -> None:
        """Whatever this process does next, what it has measured is there for the next start."""
        times = {time.bucket: time for time in (*table.times, BucketTime(bucket, milliseconds))}
        ordered = tuple(times[one] for one in self._ready.buckets if one in times)
        self._table = msgspec.structs.replace(table, times=ordered)
        if self._ranks is None or self._ranks.shard.rank == 0:
            save_step_times(os.environ, StepTimesKey.of(self._config, self._ready), self._table, QUICK_SOURCE)


def stand_in(bucket: Bucket, captured: Sequence[Bucket]) -> Bucket:
    """Which of these a step that fills `bucket` would use, of the same kind; the largest where it fits into none."""
    same_kind = [one for one in captured if (one.prefill_rows > 0) == (bucket.prefill_rows > 0)]
    holding = [
        one for one in same_kind if one.prefill_rows >= bucket.prefill_rows and one.decode_rows >= bucket.decode_rows
    ]
    by_rows = sorted(holding or same_kind, key=lambda one: one.num_rows)
    return by_rows[0] if holding else by_rows[-1]
