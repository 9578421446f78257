"""How long a step will take: the measured step-time table, corrected by the steps that ran.

Owns numbers only, and never reads a clock: `graphgen.scheduler.policy` asks it before a step, the process tells it
afterwards what the step took.

    milliseconds = factor[bucket] * (time[bucket] + a * (decode positions - those measured)
                                                  + b * (prompt pairs - those measured))

A decode row reads the K and V of every position it attends to, so its time is linear in them; a prompt row computes
with each, so a chunk's time is linear in (row, position) pairs. Everything else depends on the bucket alone.
"""

from collections.abc import Iterable

from graphgen.ipc.messages import Bucket, StepTimeTable

_CORRECTION_WEIGHT = 1.0 / 16
"""Weight of the newest step in a factor, once a bucket has run so often: a slower clock shows within a few dozen
steps. Until then a factor is the mean of what ran."""

_TABLE_STEPS = 3
"""Measured steps that the table counts like in that mean."""

_MOST_SURPRISE = 1.25
"""Further from its prediction than by this factor no step is believed to be. When the host stalls, a step seems many
times as long; taken at its word, it would keep a bucket from being used, and so from being corrected, for seconds."""

_LEAST_SHARE = 0.2
"""Of a bucket's measured time: no extrapolation to shorter contexts goes below it."""

_FACTOR_RANGE = (0.25, 8.0)

_FIRST_ERROR = 0.03
"""Steps while serving took 0 to 6 % longer than a table measured minutes before said, on an H200."""

_MOST_MARGIN = 0.25
"""A device whose steps vary more than this keeps no target by caution; it only loses throughput."""

SATURATION_SHARE = 0.93
"""A bucket is saturated when it computes at least this share of the best rows per second. With an 8B model on an H200
and steps of at most 1024 rows, 256, 384 and 512 rows compute 0.77, 0.88 to 0.91 and 0.98 of the best: the share lies
between two, so that noise seldom decides."""


def prompt_pairs(start: int, length: int) -> int:
    """(row, position) pairs of a chunk: row i attends to start + i + 1 positions."""
    return length * start + length * (length + 1) // 2


class CostModel:
    """Predicts milliseconds of a step. Without a table it knows only the buckets that have run, context ignored."""

    def __init__(self, table: StepTimeTable | None = None) -> None:
        self._table = table
        self._times: dict[Bucket, float] = {}
        if table is not None:
            self._times = {time.bucket: time.milliseconds for time in table.times}
        self._factors = dict.fromkeys(self._times, 1.0)
        self._num_corrections = dict.fromkeys(self._times, 0)
        self._error = _FIRST_ERROR  # mean of |measured / predicted - 1|

    def predict_ms(self, bucket: Bucket, decode_positions: int, prompt_pairs: int) -> float | None:
        """Of a step in `bucket` whose decode rows attend to so many positions together; None for an unknown bucket."""
        time = self._uncorrected_ms(bucket, decode_positions, prompt_pairs)
        return None if time is None else time * self._factors[bucket]

    @property
    def margin(self) -> float:
        """Share of a prediction that 95 % of steps stay within, above it.

        Of a normal error 95 % lie below 1.64 standard deviations, which are 2.06 times the mean of its absolute value.
        """
        return min(2.06 * self._error, _MOST_MARGIN)

    def correct(self, bucket: Bucket, decode_positions: int, prompt_pairs: int, measured_ms: float) -> None:
        """Takes a step that ran into account. Times that cannot be (<= 0) are ignored."""
        if measured_ms <= 0.0:
            return
        time = self._uncorrected_ms(bucket, decode_positions, prompt_pairs)
        if time is None:
            self._times[bucket], self._factors[bucket], self._num_corrections[bucket] = measured_ms, 1.0, 0
            return
        surprise = measured_ms / (time * self._factors[bucket])
        surprise = min(max(surprise, 1.0 / _MOST_SURPRISE), _MOST_SURPRISE) - 1.0
        self._error += _CORRECTION_WEIGHT * (abs(surprise) - self._error)
        self._num_corrections[bucket] += 1
        weight = max(_CORRECTION_WEIGHT, 1.0 / (_TABLE_STEPS + self._num_corrections[bucket]))
        least, most = _FACTOR_RANGE
        self._factors[bucket] = min(max(self._factors[bucket] * (1.0 + weight * surprise), least), most)

    def saturation_rows(self, buckets: Iterable[Bucket]) -> int | None:
        """Rows of the smallest mixed bucket that computes SATURATION_SHARE of the best rows per second.

        None while a bucket with prefill rows has no time: a choice among some of them would not be one.
        """
        rates = {}
        for bucket in buckets:
            if bucket.prefill_rows:
                if bucket not in self._times:
                    return None
                rates[bucket] = bucket.num_rows / (self._times[bucket] * self._factors[bucket])
        if not rates:
            return None
        enough = SATURATION_SHARE * max(rates.values())
        return min(bucket.num_rows for bucket, rate in rates.items() if rate >= enough)

    def _uncorrected_ms(self, bucket: Bucket, decode_positions: int, pairs: int) -> float | None:
        time = self._times.get(bucket)
        if time is None or self._table is None:
            return time
        table = self._table
        measured_positions = bucket.decode_rows * table.decode_context
        measured_pairs = prompt_pairs(table.prompt_start, bucket.prefill_rows)
        grown = (
            time
            + table.ms_per_decode_position * (decode_positions - measured_positions)
            + table.ms_per_prompt_pair * (pairs - measured_pairs)
        )
        return max(grown, _LEAST_SHARE * time)
