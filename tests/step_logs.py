"""Reads a step log for the tests of the engine, on the CPU and on a GPU."""

import itertools
import json
from pathlib import Path
from typing import Any

Step = dict[str, Any]
"""One line of the log, see graphgen.scheduler.step_log."""


def read(path: Path) -> list[Step]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def share_received_in_time(steps: list[Step]) -> float:
    """Of the steps whose predecessor ran while work was left: the share whose plan came before that one finished."""
    pairs = list(itertools.pairwise(steps))
    in_time: int = sum(after["received_s"] < before["finished_s"] for before, after in pairs)
    return in_time / len(pairs)


def idle_share(steps: list[Step]) -> float:
    """Time between the end of a step and the start of the next, of the whole."""
    idle_s = sum(max(0.0, b["started_s"] - a["finished_s"]) for a, b in itertools.pairwise(steps))
    whole_s: float = steps[-1]["finished_s"] - steps[0]["started_s"]
    return float(idle_s / whole_s)
