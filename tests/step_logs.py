"""What the tests ask of a step log, on the CPU and on a GPU, beyond what the benchmarks read from it."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from benchmarks.step_log import Step, StepLogReader


def read(path: Path) -> list[Step]:
    return StepLogReader(path).read_new()


def share_received_in_time(steps: Sequence[Step]) -> float:
    """Of the steps that follow another: the share whose plan reached the worker before that one finished."""
    pairs = list(itertools.pairwise(steps))
    return sum(after.received_s < before.finished_s for before, after in pairs) / len(pairs)
