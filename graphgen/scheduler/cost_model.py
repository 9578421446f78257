"""How long a step will take: the measured step-time table, corrected by the steps that ran.

Owns numbers only, and never reads a clock. `graphgen.scheduler.policy` and its parts ask it how long steps would take;
the policy tells it what each step took.

    milliseconds = pace * factor[bucket] * (time[bucket] + a * (decode positions - those measured)
                                                         + b * (prompt pairs - those measured)
                                                         + c * (chunk positions - those measured))

The three counts are those of `graphgen.ipc.attended`. Everything else depends on the bucket alone.

The pace is that of the device: it changes while a GPU warms up to its power limit, for all buckets alike, but not
alike for steps with prompts, which compute, and those without, which read memory; so there is one for each kind. A
factor makes up for what the table has wrong of one bucket, and is learned in the first steps there.

What the next step stays within is larger by a part of what the newest one took too long: a GPU at its power limit
swings around it within a tenth of a second, so a step takes longer where those just before it did.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from graphgen.ipc.attended import Attended
from graphgen.ipc.worker_messages import Bucket, StepTimeTable

_PACE_WEIGHT = 1.0 / 16
"""Weight of the newest step in a pace, and in the mean error: a slower clock shows within a few dozen steps."""

_MOMENTUM = 0.4
"""How much of what the newest step took too long is expected of the next one that is planned, which is the second after
it. Of 1266 steps of 1024 rows in fp8 and 2479 of 512 in bfloat16 on an H200, errors of neighbours correlate by 0.67 and
0.79, of the second next by 0.48 and 0.59, of the sixth not at all."""

_FADING = 0.5
"""What is left of a swing after a step that says nothing of it."""

_MOST_SWING = 0.15
"""A clock swings no further: what a step took beyond that was its host's doing."""

_FACTOR_WEIGHT = 1.0 / 64
"""Least weight of the newest step in a bucket's factor. In its first steps the factor is their mean."""

_TABLE_STEPS = 3
"""Measured steps that the table counts like in that mean."""

_MOST_SURPRISE = 1.25
"""Larger deviations of a step from its prediction are clipped to this factor. When the host stalls, a step seems many
times as long; taken at its word, it would keep a bucket from being used, and so from being corrected, for seconds."""

_LEAST_SHARE = 0.2
"""Of a bucket's measured time: no extrapolation to shorter contexts goes below it."""

_FACTOR_RANGE = (0.25, 8.0)

_FIRST_ERROR = 0.015
"""What it is in steady serving on an H200."""

_TABLE_ERROR = 0.06
"""How far the table may be off in a bucket that has not run: of the times that an H200 measured in a hurry, one in ten
was 5 to 8 % off. After n steps a (n + 1)**0.5-th of it is left."""

_MOST_MARGIN = 0.25
"""A device whose steps vary more than this keeps no target by caution; it only loses throughput."""

SATURATION_SHARE = 0.91
"""A bucket is saturated when it computes at least this share of the best prompt rows per second. The share lies between
two sizes, so that noise seldom decides. By the times of an 8B model on an H200 these are 384 and 512 rows: they compute
0.84 and 0.94 of the best of steps up to 2048 rows, and 0.89 and 1 of the best of steps up to 512. Rows of decodes do
not count: they take longest, and it depends on the ladder how many of them the fastest bucket of a size has."""

SATURATION_NOISE = 0.02
"""By how much a rate must lie on the other side of that share for the saturation point to move."""


def smallest_near_best(rates: Mapping[int, float], share: float, current: int | None = None) -> int:
    """The fewest rows of which the rate is at least this share of the best. rates: by number of rows.

    It stays the `current` number, that of an earlier call, until another is better by more than noise.
    """
    enough = share * max(rates.values())
    if current is not None and rates.get(current, 0.0) >= enough * (1.0 - SATURATION_NOISE):
        clearly = enough * (1.0 + SATURATION_NOISE)
        return min((rows for rows, rate in rates.items() if rows < current and rate >= clearly), default=current)
    return min(rows for rows, rate in rates.items() if rate >= enough)


class CostModel:
    """Predicts milliseconds of a step. Without a table it knows only the buckets that have run, context ignored."""

    def __init__(self, table: StepTimeTable | None = None) -> None:
        self.renew(table)

    def renew(self, table: StepTimeTable | None) -> None:
        """Forgets all that was learned: another worker runs the steps, and this is its table."""
        self._table = table
        self._times: dict[Bucket, float] = {}
        if table is not None:
            self._times = {time.bucket: time.milliseconds for time in table.times}
        self._factors = dict.fromkeys(self._times, 1.0)
        self._num_corrections = dict.fromkeys(self._times, 0)
        self._paces = {True: 1.0, False: 1.0}  # of steps with prompts, and without
        self._swings = {True: 0.0, False: 0.0}  # of either kind: by which share the last step took longer
        self._error = _FIRST_ERROR  # mean of |measured / predicted - 1|

    def learn(self, bucket: Bucket, milliseconds: float) -> None:
        """The time of a bucket that the table lacks, measured as those of the table."""
        self._times[bucket] = milliseconds
        self._factors[bucket], self._num_corrections[bucket] = 1.0, 0

    def predict_ms(self, bucket: Bucket, attended: Attended) -> float | None:
        """Of a step in `bucket` whose rows attend to that; None for an unknown bucket."""
        time = self._uncorrected_ms(bucket, attended)
        return None if time is None else time * self._correction(bucket)

    def bound_ms(self, bucket: Bucket, attended: Attended, *, is_sure: bool = False) -> float | None:
        """As `predict_ms`, but what 95 % of such steps stay within if they are planned now; with is_sure, 99.9 %.

        Of a normal error 95 % lie below 1.64 standard deviations, which are 2.06 times the mean of its absolute value.
        The rare ones lie further out than a normal error's, since clocks swing for some steps in a row: of 4098 steps
        of an H200, 28 were further off than 4.3 such means and 3 than seven. Neither holds where steps vary so much
        that the margin is bounded.
        """
        milliseconds = self.predict_ms(bucket, attended)
        if milliseconds is None:
            return None
        doubt = _TABLE_ERROR / math.sqrt(1 + self._num_corrections[bucket])
        spread = (7.0 if is_sure else 2.06) * self._error
        swing = _MOMENTUM * max(0.0, self._swings[bucket.prefill_rows > 0])
        return milliseconds * (1.0 + min(swing + spread + doubt, _MOST_MARGIN))

    def correct(self, bucket: Bucket, attended: Attended, measured_ms: float) -> None:
        """Takes a step that ran into account. Times that cannot be (<= 0) are ignored."""
        if measured_ms <= 0.0:
            return
        kind = bucket.prefill_rows > 0
        time = self._uncorrected_ms(bucket, attended)
        if time is None:
            self.learn(bucket, measured_ms / self._paces[kind])
            return
        surprise = measured_ms / (time * self._correction(bucket))
        surprise = min(max(surprise, 1.0 / _MOST_SURPRISE), _MOST_SURPRISE) - 1.0
        self._swings[kind] = min(max(surprise, -_MOST_SWING), _MOST_SWING)
        self._swings[not kind] *= _FADING
        self._error += _PACE_WEIGHT * (abs(surprise) - self._error)
        self._paces[kind] = _scaled(self._paces[kind], _PACE_WEIGHT * surprise)
        self._num_corrections[bucket] += 1
        weight = max(_FACTOR_WEIGHT, 1.0 / (_TABLE_STEPS + self._num_corrections[bucket]))
        self._factors[bucket] = _scaled(self._factors[bucket], weight * surprise)

    def pass_over(self, bucket: Bucket) -> None:
        """A step ran that says nothing of its bucket."""
        self._swings[bucket.prefill_rows > 0] *= _FADING

    def saturation_rows(self, buckets: Iterable[Bucket], current: int | None = None) -> int | None:
        """Rows of the smallest mixed bucket that computes SATURATION_SHARE of the best prompt rows per second.

        It stays the `current` one, that of an earlier call, until another is better by more than noise. None while a
        bucket with prefill rows has no time: a choice among some of them would not be one.
        """
        mixed = [bucket for bucket in buckets if bucket.prefill_rows]
        if not mixed or not all(bucket in self._times for bucket in mixed):
            return None
        rates: dict[int, float] = {}  # the best of each number of rows
        for bucket, factor in zip(mixed, self._likely_factors(mixed), strict=True):
            rate = bucket.prefill_rows / (self._times[bucket] * factor)
            rates[bucket.num_rows] = max(rate, rates.get(bucket.num_rows, 0.0))
        return smallest_near_best(rates, SATURATION_SHARE, current)

    def prompt_rates(self, buckets: Sequence[Bucket], num_decodes: int, num_positions: int | None) -> list[float]:
        """Prompt rows a millisecond of mixed buckets that have a time, beside so many decodes that attend to so many
        positions together, or to those of the table."""
        if num_positions is None:
            num_positions = num_decodes * (0 if self._table is None else self._table.decode_context)
        start = 0 if self._table is None else self._table.prompt_start
        rates = []
        for bucket, factor in zip(buckets, self._likely_factors(buckets), strict=True):
            milliseconds = self._uncorrected_ms(bucket, Attended(num_positions).with_chunk(start, bucket.prefill_rows))
            assert milliseconds is not None, "the saturation point is known only if every bucket has a time"
            rates.append(bucket.prefill_rows / (milliseconds * factor))
        return rates

    def _likely_factors(self, buckets: Sequence[Bucket]) -> list[float]:
        """Of each bucket its factor, or where it has not run, the mean of those of its size that have: at the same
        size, a table is wrong about all alike.

        A size that has not run is taken to be as far from the table as those that have: else on a device that is slower
        than its table, whatever was not tried yet looks better than what was.
        """
        by_size: dict[int, list[Bucket]] = {}
        for bucket in buckets:
            by_size.setdefault(bucket.num_rows, []).append(bucket)
        of_others = self._mean_factor(buckets) or 1.0
        of_size = {rows: self._mean_factor(of_rows) or of_others for rows, of_rows in by_size.items()}
        return [
            self._factors[bucket] if self._num_corrections[bucket] else of_size[bucket.num_rows] for bucket in buckets
        ]

    def _mean_factor(self, buckets: Iterable[Bucket]) -> float | None:
        """Of the steps that ran in these; None if there were none."""
        counted = [(self._num_corrections[bucket], self._factors[bucket]) for bucket in buckets]
        count = sum(number for number, _ in counted)
        return sum(number * factor for number, factor in counted) / count if count else None

    def _correction(self, bucket: Bucket) -> float:
        return self._paces[bucket.prefill_rows > 0] * self._factors[bucket]

    def _uncorrected_ms(self, bucket: Bucket, attended: Attended) -> float | None:
        time = self._times.get(bucket)
        if time is None or self._table is None:
            return time
        table = self._table
        measured = Attended(bucket.decode_rows * table.decode_context)
        measured = measured.with_chunk(table.prompt_start, bucket.prefill_rows)
        grown = (
            time
            + table.ms_per_decode_position * (attended.decode_positions - measured.decode_positions)
            + table.ms_per_prompt_pair * (attended.prompt_pairs - measured.prompt_pairs)
            + table.ms_per_chunk_position * (attended.chunk_positions - measured.chunk_positions)
        )
        return max(grown, _LEAST_SHARE * time)


def _scaled(number: float, by: float) -> float:
    """Larger by a share, within what a factor can be."""
    least, most = _FACTOR_RANGE
    return min(max(number * (1.0 + by), least), most)
