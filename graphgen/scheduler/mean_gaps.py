"""How long the next step may take for the sake of those whose mean gap between tokens has a target.

Owns the count of steps that went without prompts. `graphgen.scheduler.decodes` knows when each token is due. Called by
`graphgen.scheduler.prompts` for every plan while anybody who decodes has such a target.

A target for the mean of a request's gaps gives each of its tokens a time by which it is due:

    time of the first token + number of gaps so far * target

What a request is ahead of that time is its slack, and a step may take as much longer than the target. A request that is
behind needs shorter steps until it has caught up. Where even the smallest step with prompts is too long, steps without
prompts come between, at most MOST_SKIPPED in a row: prompts advance however slow they are. Whoever could not catch up
any more, even if all further steps held nothing but its row, asks for nothing. Among n tenants such targets leave the
prompts their n-th part of the time, as ITL targets do (`step_bounds`).
"""

from graphgen.scheduler.budget import StepBudget
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.in_flight import StepsInFlight
from graphgen.scheduler.running import RunningSet
from graphgen.scheduler.tenants import Tenants

MOST_SKIPPED = 16
"""Plans in a row that have no prompts for the sake of mean gaps."""


class MeanGaps:
    """Of one engine's decodes."""

    def __init__(
        self, budget: StepBudget, model: CostModel, running: RunningSet, tenants: Tenants, in_flight: StepsInFlight
    ) -> None:
        self._budget = budget
        self._model = model
        self._running = running
        self._tenants = tenants
        self._in_flight = in_flight
        self._num_skipped = 0

    def most_ms(self, now_s: float) -> float | None:
        """What the next step may take; 0 or less where somebody is late anyway. None: nobody has such a target."""
        decodes = self._running.decodes
        if not decodes.num_with_tpot_target:
            return None
        begins_s = now_s + self._ahead_s()
        fastest_ms = self._budget.decode_ms(1, 0) or 0.0
        due_s = decodes.first_due_s(begins_s, fastest_ms / 1000.0)
        if due_s is None:
            return None
        most_ms, num_tenants = (due_s - begins_s) * 1000.0, len(self._tenants)
        if num_tenants == 1:
            return most_ms
        decode_ms = self._budget.decode_ms(len(decodes), decodes.num_positions) or 0.0
        return max(most_ms, decode_ms * num_tenants / (num_tenants - 1))

    def skips_prompts(self, most_ms: float, step_ms: float | None) -> bool:
        """Whether the step goes without prompts, with which it would take step_ms."""
        is_short = step_ms is None or step_ms <= most_ms
        if is_short or self._num_skipped == MOST_SKIPPED or len(self._tenants) > 1:
            self._num_skipped = 0
            return False
        self._num_skipped += 1
        return True

    def _ahead_s(self) -> float:
        """Until the steps in flight have ended, of which the first has just begun."""
        milliseconds = 0.0
        for record in self._in_flight:
            bound_ms = self._model.bound_ms(record.bucket, record.attended)
            milliseconds += bound_ms or 0.0
        return milliseconds / 1000.0
