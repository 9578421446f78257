"""What every benchmark prints and writes: the command, the machine, the figures. Used by the scripts beside it."""

import json
import platform
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from graphgen.base.version import __version__

Row = Mapping[str, object]


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks; nan for no values."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    place = (len(ordered) - 1) * percent / 100.0
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on. device: as the engine reports it."""
    packages = {"graphgen": __version__}
    for name in ("torch", "flashinfer-python", "triton"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "device": device,
        "host": platform.machine(),
        "python": platform.python_version(),
        **packages,
        "command": shlex.join(["python", "-m", _module(Path(sys.argv[0])), *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _module(script: Path) -> str:
    """As `python -m` takes it: a file of this folder, of a package below it, or such a package."""
    parts = script.with_suffix("").parts
    own = parts[parts.index("benchmarks") + 1 :] if "benchmarks" in parts else parts[-1:]
    return ".".join(("benchmarks", *(part for part in own if part != "__main__")))


def show(title: str, rows: Sequence[Row], about: Mapping[str, str]) -> None:
    """Prints rows as a table; floats with three significant decimals. A row may lack columns that others have."""
    console = Console(width=140)
    console.print(" ".join(f"{key}={value}" for key, value in about.items() if key != "command"), style="dim")
    console.print(about["command"], style="dim")
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        values = (row.get(column, "") for column in columns)
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values))
    console.print(table)


def write_json(path: str | None, rows: Sequence[Row], about: Mapping[str, str]) -> None:
    if path is not None:
        Path(path).write_text(json.dumps({"about": dict(about), "rows": [dict(row) for row in rows]}, indent=1) + "\n")


def read_serving(path: Path, needed: Collection[str]) -> dict[str, Any]:
    """What `benchmarks.serving` wrote by `write_json`. Raises ValueError where a row lacks what is needed."""
    document: dict[str, Any] = json.loads(path.read_bytes())  # Any: figures of many types
    if not all(row.keys() >= {*needed} for row in document["rows"]):
        raise ValueError(f"{path} has rows that no `benchmarks.serving --json` of this version wrote")
    return document
