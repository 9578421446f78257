"""The same jobs on the same machine in the same hour: the picture and the table of a file of figures.

    python -m benchmarks.side_by_side --plot benchmarks/side_by_side/h200.png
    python -m benchmarks.side_by_side --table

Measures nothing: the file says what ran where, in which versions and with which settings. Every engine has its rows,
those where graphgen loses among them. The picture needs matplotlib (the extra `bench`).
"""

import argparse
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


class Comparison(Struct, frozen=True):
    """The whole file; what it has besides (decodes alone, starts) is for its readers."""

    about: About
    rows: list[ServedRow]

    @property
    def workloads(self) -> list[str]:
        return list(dict.fromkeys(row.workload for row in self.rows))


def read(path: Path) -> Comparison:
    return msgspec.json.decode(path.read_bytes(), type=Comparison)


def markdown(found: Comparison) -> str:
    """A table for a README; the best rate and the shortest p95 of the gaps of each workload are bold."""
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
            lines.append(
                f"| {workload if number == 0 else ''} | {row.engine} | {rate}"
                f" | {row.median_ttft_ms:.0f} / {row.p95_ttft_ms:.0f}"
                f" | {row.median_itl_ms:.1f} / {gap} / {row.p99_itl_ms:.1f} / {row.max_itl_ms:.0f}"
                f" | {row.goodput_itl_20ms:.2f} |"
            )
    return "\n".join(lines)


def _bold(text: str, is_best: bool) -> str:
    return f"**{text}**" if is_best else text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=H200, help="the file of figures")
    parser.add_argument("--plot", type=Path, help="draw the picture here")
    parser.add_argument("--table", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(arguments)
    found = read(options.figures)
    if options.table:
        print(markdown(found))
    if options.plot is not None:
        from benchmarks.side_by_side.picture import plot_side_by_side  # matplotlib is an extra

        plot_side_by_side(found, options.plot)


if __name__ == "__main__":
    main()
