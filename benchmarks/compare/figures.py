"""The file of a comparison, and its tables. Every engine has its rows, those where graphgen loses among them.

Owns the format of the file; pure. Called by `benchmarks.compare`, which writes one, and by picture.py, which draws one.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

H200 = Path(__file__).parent / "h200-2026-11-28.json"


class About(Struct, frozen=True):
    """What was measured, on what and how."""

    device: str
    date: str
    host: str
    model: str
    load: str
    engines: dict[str, str]  # by their names in the rows: version and settings
    in_time: str


class ServedRow(Struct, frozen=True):
    """One engine under one workload, in the keys of `benchmarks.metrics`."""

    workload: str
    engine: str
    request_throughput: float
    output_throughput: float
    median_ttft_ms: float
    p95_ttft_ms: float
    median_itl_ms: float
    p95_itl_ms: float
    p99_itl_ms: float
    max_itl_ms: float
    p95_tpot_ms: float
    goodput_itl_20ms: float
    failed: int = 0


Cells = dict[str, int | float | str | None]
"""By engine, behind one column that says what the row is about."""


class Comparison(Struct, frozen=True):
    """The whole file."""

    about: About
    rows: list[ServedRow]
    decodes_about: str = ""
    decodes: list[Cells] = []
    """Milliseconds between two tokens of so many requests that decode together, by engine."""
    start_s: list[Cells] = []
    """Seconds until an engine is ready, by engine."""
    absent: dict[str, str] = {}
    """Engines without rows: how to install them, or what they said when they were started."""

    @property
    def workloads(self) -> list[str]:
        return list(dict.fromkeys(row.workload for row in self.rows))


def read(path: Path) -> Comparison:
    return msgspec.json.decode(path.read_bytes(), type=Comparison)


def markdown(found: Comparison) -> str:
    """Tables for a README; the best rate and the shortest p95 of the gaps of each workload are bold."""
    tables = [_served(found)] if found.rows else []
    tables += [_cells(rows) for rows in (found.decodes, found.start_s) if rows]
    absent = [f"- {engine}: {why.splitlines()[0]}" for engine, why in found.absent.items()]
    return "\n\n".join([*tables, *(["\n".join(absent)] if absent else [])])


def _served(found: Comparison) -> str:
    lines = [
        "| prompt/output : clients | engine | req/s | TTFT p50, p95 ms | ITL p50, p95, p99, max ms | req/s in time |",
        "|---" * 6 + "|",
    ]
    for workload in found.workloads:
        rows = [row for row in found.rows if row.workload == workload]
        best_rate, best_gap = max(row.request_throughput for row in rows), min(row.p95_itl_ms for row in rows)
        for number, row in enumerate(rows):
            rate = _bold(f"{row.request_throughput:.2f}", row.request_throughput == best_rate)
            gap = _bold(f"{row.p95_itl_ms:.1f}", row.p95_itl_ms == best_gap)
            failed = f" ({row.failed} failed)" if row.failed else ""
            lines.append(
                f"| {workload if number == 0 else ''} | {row.engine} | {rate}{failed}"
                f" | {row.median_ttft_ms:.0f} / {row.p95_ttft_ms:.0f}"
                f" | {row.median_itl_ms:.1f} / {gap} / {row.p99_itl_ms:.1f} / {row.max_itl_ms:.0f}"
                f" | {row.goodput_itl_20ms:.2f} |"
            )
    return "\n".join(lines)


def _cells(rows: Sequence[Cells]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        values = (row.get(column) for column in columns)
        lines.append(f"| {' | '.join('' if value is None else _number(value) for value in values)} |")
    return "\n".join(lines)


def _number(value: float | str) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _bold(text: str, is_best: bool) -> str:
    return f"**{text}**" if is_best else text
