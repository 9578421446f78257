"""What measured step times say to a person: rates, padding and the saturation point of every bucket, the slopes.

Owns the figures of `graphgen tune`; measures nothing (the worker does) and prints nothing (`commands.cli` does).
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from graphgen.ipc.engine_messages import ObjectiveName
from graphgen.ipc.worker_messages import Bucket, StepTimeTable
from graphgen.scheduler.buckets import BucketTable
from graphgen.scheduler.cost_model import SATURATION_SHARE, CostModel
from graphgen.scheduler.objectives import OBJECTIVES, judged


class Padding(Struct, frozen=True):
    """Shares of a bucket's rows that hold no token, over the steps whose smallest bucket it is."""

    mean: float
    worst: float


class BucketFigures(Struct, frozen=True):
    """One line of the table."""

    bucket: str
    rows: int
    milliseconds: float
    rows_per_s: float
    padding: Padding | None  # None: no step has it as its smallest bucket
    saturated: bool  # a mixed bucket of as many rows as the saturation point


class TuneFigures(Struct, frozen=True):
    """All of it, as --json writes it."""

    device: str
    attention: str
    decode_context: int
    prompt_start: int
    buckets: tuple[BucketFigures, ...]
    saturation_rows: int
    judged_rows: int  # of the largest steps among which it was found
    us_per_1000_decode_positions: float  # of one decode row
    us_per_1000_chunk_positions: float  # of a chunk of `chunk_rows`, for each 1000 positions that it starts later
    chunk_rows: int
    stored_at: str | None


def tune_figures(
    table: StepTimeTable, device: str, attention: str, objective: ObjectiveName, stored: Path | None
) -> TuneFigures:
    """The figures of a table that has every bucket of an engine. stored: the file that holds it, if one does."""
    buckets = [time.bucket for time in table.times]
    candidates = judged(buckets, OBJECTIVES[objective])
    saturation_rows = CostModel(table).saturation_rows(candidates)
    assert saturation_rows is not None, "an engine has mixed buckets, and its table has them all"
    paddings = padding_by_bucket(buckets)
    chunk_rows = max(bucket.prefill_rows for bucket in buckets)
    return TuneFigures(
        device=device,
        attention=attention,
        decode_context=table.decode_context,
        prompt_start=table.prompt_start,
        buckets=tuple(
            BucketFigures(
                bucket=str(time.bucket),
                rows=time.bucket.num_rows,
                milliseconds=time.milliseconds,
                rows_per_s=time.bucket.num_rows / time.milliseconds * 1000.0,
                padding=paddings.get(time.bucket),
                saturated=time.bucket.prefill_rows > 0 and time.bucket.num_rows == saturation_rows,
            )
            for time in table.times
        ),
        saturation_rows=saturation_rows,
        judged_rows=max(bucket.num_rows for bucket in candidates),
        us_per_1000_decode_positions=table.ms_per_decode_position * 1e6,
        us_per_1000_chunk_positions=(table.ms_per_prompt_pair * chunk_rows + table.ms_per_chunk_position) * 1e6,
        chunk_rows=chunk_rows,
        stored_at=None if stored is None else str(stored),
    )


def padding_by_bucket(buckets: Sequence[Bucket]) -> dict[Bucket, Padding]:
    """Over all pairs (prompt tokens, decodes) that a step may hold, each pair counted once.

    A step runs in the smallest bucket that holds it. For one number of decodes, all numbers of prompt tokens between
    two rungs of prefill rows share a bucket, so a run of them is counted at once.
    """
    table = BucketTable(buckets, max(bucket.num_rows for bucket in buckets))
    rungs = sorted({bucket.prefill_rows for bucket in buckets} | {0})
    steps: dict[Bucket, int] = defaultdict(int)
    live_rows: dict[Bucket, int] = defaultdict(int)
    fewest: dict[Bucket, int] = {}
    for num_decodes in range(table.max_decode_rows + 1):
        room = table.chunk_room(num_decodes)
        first = 0 if num_decodes else 1  # a step holds something
        for rung in rungs:
            last = min(rung, room)
            if last < first:
                continue
            bucket = table.smallest(last, num_decodes)
            count = last - first + 1
            steps[bucket] += count
            live_rows[bucket] += count * num_decodes + (first + last) * count // 2
            fewest[bucket] = min(fewest.get(bucket, bucket.num_rows), first + num_decodes)
            first = last + 1
    return {
        bucket: Padding(
            mean=1.0 - live_rows[bucket] / (steps[bucket] * bucket.num_rows),
            worst=1.0 - fewest[bucket] / bucket.num_rows,
        )
        for bucket in steps
    }


def describe_figures(figures: TuneFigures) -> list[str]:
    """The rest of the table in sentences."""
    stored = (
        f"Stored in {figures.stored_at}: the next start of an engine with the same buckets uses it."
        if figures.stored_at is not None
        else "Not stored: the caches folder cannot be written. Set GRAPHGEN_CACHE to one that can."
    )
    largest = max(line.rows for line in figures.buckets)
    if figures.saturation_rows < figures.judged_rows:
        advice = "Larger steps make gaps between tokens longer and gain no more than the rest."
    elif figures.saturation_rows < largest:
        advice = "Larger steps are left to queues: --objective latency would take them always, if they gain enough."
    else:
        advice = "It is the largest there is: a larger --token-budget may compute more."
    return [
        f"Saturation point: {figures.saturation_rows} rows, the smallest step with prompts that computes at least"
        f" {SATURATION_SHARE:.0%} of the best prompt rows/s. {advice}",
        f"Each 1000 positions more of context cost a decode row {figures.us_per_1000_decode_positions:.2f} us, and a"
        f" chunk of {figures.chunk_rows} rows {figures.us_per_1000_chunk_positions:.1f} us.",
        stored,
    ]
