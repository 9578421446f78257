"""How many rows a step gets: the dynamic token budget.

Owns the choice of a mixed bucket, never of the prompts that fill it. `graphgen.scheduler.prompts` asks it for every
plan while prompts are to be computed; other parts of the policy ask it how long steps would take.

The gap between two tokens of a request is the duration of the step that draws the second one. So a step may be as long
as the tightest ITL target among the requests that decode in it, and the largest bucket that the cost model says is that
fast computes prompts at the best rate the target allows:

    bound ms <= target,    bound = CostModel.bound_ms, which 95 % of steps of the bucket stay within

- The first gap of a request is judged by a bound of 99.9 %: what a user feels is a mean over the last gaps, which has
  no other gap yet. Where no step keeps that bound, the other one counts.
- Where every bucket breaks the target, the smallest of LEAST_ROWS is chosen: a prompt advances in every plan, and
  not by the crumbs that the buckets for short prompts hold.
- Where no target binds, no more rows than the saturation point, from where on a larger step is longer and hardly
  computes more rows a second; unless a TTFT target would be missed at that rate, or the objective grows the step
  because many prompts wait (`objectives`, `large_steps`).
- Where mean gaps have targets, no longer than the slack of those who are least ahead (`mean_gaps`).
- No more rows than hold all prompt tokens that wait.
- Without decodes a target binds nothing: nobody waits for a next token.
"""

from bisect import bisect_right
from collections.abc import Sequence
from operator import attrgetter

from msgspec import Struct

from graphgen.ipc.attended import Attended
from graphgen.ipc.worker_messages import Bucket
from graphgen.scheduler.buckets import BucketTable
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.large_steps import LargeSteps
from graphgen.scheduler.objectives import Objective, judged

LEAST_ROWS = 128
"""Of a step with prompts that breaks its target anyway; or half of the token budget, if that is less."""

_num_rows = attrgetter("num_rows")  # of a bucket

_Prompt = tuple[int, int]
"""Tokens of a prompt that are computed, and those that are missing."""


class StepLoad(Struct, frozen=True):
    """What the next step may hold."""

    num_decodes: int
    decode_positions: int  # that the decode rows attend to, together
    itl_target_ms: float | None  # the tightest one of the decodes
    first_gap_ms: float | None  # the tightest one of those whose second token the step draws
    slack_ms: float | None  # what the step may take for the sake of mean gaps; None: nobody has a target for them
    most_ms: float | None  # what the step should not exceed besides; None: whatever is efficient
    prompts: Sequence[_Prompt]  # those that have begun, in order of service
    pending_tokens: int  # prompt tokens to compute, of begun and of waiting requests
    is_late: bool  # a TTFT target would be missed at the saturation point's rate


class StepBudget:
    """Chooses for one worker; the cost model's corrections reach it from step to step."""

    def __init__(self, buckets: BucketTable, model: CostModel, steps_in_flight: int, objective: Objective) -> None:
        self._objective = objective
        self._buckets = buckets
        self._steps_in_flight = steps_in_flight
        self._model = model
        self._judged = judged(buckets.all_mixed, objective)
        self._is_grown = False  # the last step that no target bound went beyond the saturation point
        self._least_rows = min(LEAST_ROWS, max(bucket.num_rows for bucket in buckets.all_mixed) // 2)
        self.renew()

    def renew(self) -> None:
        """Finds the saturation point of what the model knows and of the buckets that there are now, whatever it was
        before."""
        self._large = LargeSteps(self._buckets, self._model)
        self._most_rows = self._model.saturation_rows(self._judged)  # None: not known
        if self._objective.num_backlog_steps is not None:
            self._large.judge_all(self._most_rows)

    def review(self, num_decodes: int, decode_positions: int) -> None:
        """Finds the saturation point anew, from the times as the steps since have corrected them: what a start measures
        of the largest steps, on a device that is not yet at its power limit, can be a tenth too short. Then judges the
        steps beyond it, beside the decodes that run now."""
        if self._most_rows is not None:
            self._most_rows = self._model.saturation_rows(self._judged, self._most_rows)
            if self._objective.num_backlog_steps is not None:
                self._large.judge(self._most_rows, num_decodes, decode_positions)

    def choose(self, load: StepLoad) -> Bucket | None:
        """The largest bucket the step may use; None where the decodes leave no room for prompts."""
        target_ms = load.itl_target_ms
        if target_ms is not None and load.num_decodes:
            candidates = _that_hold(self._buckets.mixed(load.num_decodes), load.pending_tokens)
            chosen = self._within_target(candidates, load, target_ms, load.first_gap_ms) if candidates else None
        else:
            efficient = self._efficient(load.num_decodes)
            candidates = self._buckets.mixed(load.num_decodes) if load.is_late else efficient
            chosen = _that_hold(candidates, load.pending_tokens)[-1] if candidates else None
            if not load.is_late:
                grown = self._grown(load.num_decodes, load.decode_positions, load.prompts, load.pending_tokens)
                self._is_grown = grown is not None
                if grown is not None:
                    candidates, chosen = (*efficient, *self._large.beside(load.num_decodes)), grown
        if chosen is not None and load.slack_ms is not None:
            chosen = self._within_target(candidates[: candidates.index(chosen) + 1], load, load.slack_ms)
        if chosen is None or load.most_ms is None:
            return chosen
        return self._likely_within(candidates[: candidates.index(chosen) + 1], load, load.most_ms)

    def forget_queue(self) -> None:
        """No prompt is left: the next queue makes steps grow only if it is long enough itself."""
        self._is_grown = False

    def saturated(self, num_decodes: int) -> Bucket | None:
        """The largest bucket up to the saturation point."""
        candidates = self._efficient(num_decodes)
        return candidates[-1] if candidates else None

    def usual(self, num_decodes: int, decode_positions: int, pending_tokens: int) -> Bucket | None:
        """The largest bucket that `choose` gives without any target while so many prompt tokens are left."""
        return self._grown(num_decodes, decode_positions, (), pending_tokens) or self.saturated(num_decodes)

    def prompt_ms(self, num_decodes: int, decode_positions: int, num_tokens: int) -> float | None:
        """Milliseconds until so many prompt tokens are computed at the saturation point, the steps in flight included;
        None where the bucket was never timed."""
        bucket = self.saturated(num_decodes)
        if bucket is None:
            return None
        attended = Attended(decode_positions).with_chunk(0, bucket.prefill_rows)
        step_ms = self._model.predict_ms(bucket, attended)
        return None if step_ms is None else step_ms * (self._steps_in_flight + -(-num_tokens // bucket.prefill_rows))

    def decode_ms(self, num_decodes: int, decode_positions: int) -> float | None:
        """Milliseconds of a step that holds nothing but so many decodes; None where its bucket was never timed."""
        return self._model.predict_ms(self._buckets.smallest(0, num_decodes), Attended(decode_positions))

    def bucket_ms(self, bucket: Bucket, attended: Attended) -> float | None:
        """Milliseconds of a step in this bucket; None where it was never timed."""
        return self._model.predict_ms(bucket, attended)

    @property
    def most_prompt_rows(self) -> int | None:
        """Of a step at the saturation point that holds no decodes."""
        bucket = self.saturated(0)
        return None if bucket is None else bucket.prefill_rows

    def decodes_within(self, most_ms: float, num_decodes: int, positions_each: int) -> int:
        """Of so many decodes, at so many positions each: how many a step without prompts computes in that time.

        All, or as many as fill a bucket. One that was never timed is taken to need as long a row as the next smaller
        one that was.
        """
        found, row_ms = 0, None
        for rung in self._buckets.decode_rungs:
            count = min(rung, num_decodes)
            step_ms = self.decode_ms(count, count * positions_each)
            if step_ms is not None:
                row_ms = step_ms / count
            elif row_ms is not None:
                step_ms = row_ms * count
            if step_ms is None or step_ms > most_ms or found == num_decodes:
                return found
            found = count
        return found

    def decodes_beside(self, num_tokens: int, most_ms: float, num_decodes: int, positions_each: int) -> int:
        """Of so many decodes, at so many positions each: beside how many prompts of so many tokens, that begin, are
        computed in that time for each step that they would need alone.

        All, or as many as fill a bucket; 0 if none, or if no such bucket was ever timed.
        """
        num_rows = self._lone_rows(num_tokens)
        for rung in reversed(self._buckets.decode_rungs):
            count = min(rung, num_decodes)
            buckets = self._efficient(count)
            if not buckets:
                continue
            bucket = next((bucket for bucket in buckets if bucket.prefill_rows >= num_rows), buckets[-1])
            attended = Attended(count * positions_each).with_chunk(0, bucket.prefill_rows)
            step_ms = self._model.predict_ms(bucket, attended)
            if step_ms is not None and step_ms * num_rows <= most_ms * min(num_rows, bucket.prefill_rows):
                return count
        return 0

    def prompt_step_ms(self, num_tokens: int) -> float | None:
        """Milliseconds of a step of so many prompt tokens that begin, at most those of the saturation point, and of no
        decodes.

        Where its bucket was never timed, at least so long: what the rows take in the smallest larger one that was. None
        where none was.
        """
        num_rows = self._lone_rows(num_tokens)
        exact = self._buckets.smallest(num_rows, 0)
        for bucket in self._buckets.mixed(0):
            if bucket.num_rows >= exact.num_rows:
                step_ms = self._model.predict_ms(bucket, Attended().with_chunk(0, bucket.prefill_rows))
                if step_ms is not None:
                    return step_ms * exact.num_rows / bucket.num_rows
        return None

    def _lone_rows(self, num_tokens: int) -> int:
        """Of so many prompt tokens, those that a step without decodes computes."""
        largest = self.saturated(0)
        return num_tokens if largest is None else min(num_tokens, largest.prefill_rows)

    def even_length(self, num_decodes: int, room: int, used: int, missing: int) -> int:
        """How much of the last pending prompt to compute now, beside `used` tokens of others, in a step of `room`
        prompt tokens: it is split evenly over the steps it needs, so that none is longer than it must be."""
        total = used + missing
        if total <= room:
            return missing
        num_steps = -(-total // room)
        smallest = self._buckets.smallest(-(-total // num_steps), num_decodes)
        return max(0, min(missing, min(smallest.prefill_rows, room) - used))

    def step_ms(self, bucket: Bucket, load: StepLoad) -> float | None:
        """Milliseconds of a step that fills this bucket; None where it was never timed."""
        return self._model.predict_ms(bucket, _attended(bucket, load.decode_positions, load.prompts))

    def _grown(
        self, num_decodes: int, decode_positions: int, prompts: Sequence[_Prompt], pending_tokens: int
    ) -> Bucket | None:
        """The bucket beyond the saturation point that the objective takes while so many prompt tokens are left."""
        objective = self._objective
        if objective.num_backlog_steps is None:
            return None
        num_steps = objective.num_kept_steps if self._is_grown else objective.num_backlog_steps
        for bucket in reversed(self._large.beside(num_decodes)):
            if pending_tokens >= num_steps * bucket.prefill_rows:
                step_ms = self._model.predict_ms(bucket, _attended(bucket, decode_positions, prompts))
                if objective.most_ms is None or (step_ms is not None and step_ms <= objective.most_ms):
                    return bucket
        return None

    def _efficient(self, num_decodes: int) -> tuple[Bucket, ...]:
        """The mixed buckets up to the saturation point, at least the first; fewest rows first."""
        candidates = self._buckets.mixed(num_decodes)
        if self._most_rows is None:
            return candidates
        return candidates[: max(1, bisect_right(candidates, self._most_rows, key=_num_rows))]

    def _within_target(
        self, candidates: tuple[Bucket, ...], load: StepLoad, target_ms: float, sure_ms: float | None = None
    ) -> Bucket:
        """The largest candidate that is fast enough, else the smallest one that is worth a step.

        sure_ms: what hardly any step may exceed, as long as some candidate keeps it. A bucket that was never timed is
        taken to need at most as long a row as the next smaller one that was: a larger step never computes fewer rows a
        second than a smaller one that reads the same weights.
        """
        for index in range(len(candidates) - 1, -1, -1):
            if self._keeps(candidates, index, load, target_ms, is_sure=False) and (
                sure_ms is None or self._keeps(candidates, index, load, sure_ms, is_sure=True)
            ):
                return candidates[index]
        if sure_ms is not None:
            return self._within_target(candidates, load, target_ms)
        return next((bucket for bucket in candidates if bucket.num_rows >= self._least_rows), candidates[-1])

    def _likely_within(self, candidates: tuple[Bucket, ...], load: StepLoad, most_ms: float) -> Bucket:
        """The largest candidate that takes so long on average, else the smallest; one that was never timed is none."""
        for bucket in reversed(candidates):
            likely_ms = self._model.predict_ms(bucket, _attended(bucket, load.decode_positions, load.prompts))
            if likely_ms is not None and likely_ms <= most_ms:
                return bucket
        return candidates[0]

    def _keeps(
        self, candidates: tuple[Bucket, ...], index: int, load: StepLoad, target_ms: float, is_sure: bool
    ) -> bool:
        bound_ms = self._bound_ms(candidates, index, load, is_sure)
        return bound_ms is not None and bound_ms <= target_ms

    def _bound_ms(self, candidates: tuple[Bucket, ...], index: int, load: StepLoad, is_sure: bool) -> float | None:
        bucket = candidates[index]
        attended = _attended(bucket, load.decode_positions, load.prompts)
        bound_ms = self._model.bound_ms(bucket, attended, is_sure=is_sure)
        if bound_ms is not None or not index:
            return bound_ms
        smaller_ms = self._bound_ms(candidates, index - 1, load, is_sure)
        return None if smaller_ms is None else smaller_ms * bucket.num_rows / candidates[index - 1].num_rows


def _that_hold(candidates: tuple[Bucket, ...], num_tokens: int) -> tuple[Bucket, ...]:
    """Those up to the first that holds `num_tokens` prompt tokens."""
    for index, bucket in enumerate(candidates):
        if bucket.prefill_rows >= num_tokens:
            return candidates[: index + 1]
    return candidates


def _attended(bucket: Bucket, decode_positions: int, prompts: Sequence[_Prompt]) -> Attended:
    """If the prompts fill the rows in this order, and one that begins takes the rest."""
    attended, num_rows = Attended(decode_positions), bucket.prefill_rows
    for computed, missing in prompts:
        length = min(missing, num_rows)
        attended = attended.with_chunk(computed, length)
        num_rows -= length
        if not num_rows:
            return attended
    return attended.with_chunk(0, num_rows)
