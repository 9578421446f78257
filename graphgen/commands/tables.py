"""The tables that commands print. Owns their columns and units; the figures come from whoever calls."""

from rich.table import Table

from graphgen.api.engine import Engine
from graphgen.commands.demo_run import DemoFigures, percentile
from graphgen.commands.describe import Decision, installed_versions
from graphgen.commands.tune import TuneFigures
from graphgen.ipc.worker_messages import Bucket, Phase


def versions_table() -> Table:
    table = Table("package", "version", title="Versions", title_justify="left")
    for package, version in installed_versions().items():
        table.add_row(package, version or "not installed")
    return table


def decisions_table(rows: list[Decision]) -> Table:
    table = Table("what", "value", "why", title="Decisions", title_justify="left")
    for row in rows:
        table.add_row(row.what, row.value, row.why)
    return table


def buckets_table(buckets: tuple[Bucket, ...]) -> Table:
    """One line for each number of decode rows, with the prefill rows that go with it."""
    table = Table("decode rows", "prefill rows", title=f"{len(buckets)} buckets", title_justify="left")
    for decode_rows in sorted({bucket.decode_rows for bucket in buckets}):
        with_it = sorted(bucket.prefill_rows for bucket in buckets if bucket.decode_rows == decode_rows)
        table.add_row(str(decode_rows), " ".join(str(prefill_rows) for prefill_rows in with_it))
    return table


def phases_table(phases: tuple[Phase, ...], start_s: float) -> Table:
    table = Table("phase of the start", "seconds", "beside earlier phases", title="Start", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for phase in phases:
        table.add_row(phase.name, f"{phase.seconds:.2f}", f"{phase.hidden_s:.2f}" if phase.hidden_s else "")
    table.add_row("all, processes and imports included", f"{start_s:.2f}")
    return table


def tune_table(figures: TuneFigures) -> Table:
    """Padding is of the steps whose smallest bucket it is: the share of their rows that hold no token."""
    title = f"Steps on {figures.device}, decodes at {figures.decode_context} positions, all rows live"
    table = Table("bucket", "rows", "ms", "rows/s", "padding, mean", "worst", "", title=title, title_justify="left")
    for column in table.columns[:6]:
        column.justify = "right"
    for line in figures.buckets:
        padding = ("-", "-") if line.padding is None else (f"{line.padding.mean:.0%}", f"{line.padding.worst:.0%}")
        rate, mark = f"{line.rows_per_s:.0f}", "saturation point" if line.saturated else ""
        table.add_row(line.bucket, str(line.rows), f"{line.milliseconds:.2f}", rate, *padding, mark)
    return table


def figures_table(figures: DemoFigures, engine: Engine) -> Table:
    stats = figures.stats
    table = Table("figure", "value", title=f"Demo on {engine.info.worker.device}", title_justify="left")
    table.columns[1].justify = "right"
    table.add_row("requests at once", str(figures.num_requests))
    table.add_row("prompt tokens / output tokens", f"{figures.prompt_tokens} / {figures.output_tokens}")
    table.add_row("output tokens/s", f"{figures.output_tokens / figures.seconds:.0f}")
    for name, values, percents in (("TTFT", figures.ttft_s, (50, 95)), ("ITL", figures.itl_s, (50, 95, 99))):
        for percent in percents:
            table.add_row(f"{name} p{percent}", f"{percentile(values, percent) * 1000:.1f} ms")
    table.add_row("steps", str(stats.steps))
    table.add_row("padding share of the rows", f"{stats.padding_share:.1%}")
    table.add_row("graph replays / eager steps", f"{stats.graph_replays} / {stats.eager_steps}")
    return table
