"""Which prompts get how many rows of one step.

Owns the division of a step's room, never a request. Called by `graphgen.scheduler.prompts` while a plan is made.

The first in the order of service gets all it can use, and the rest goes to the next. Long prompts are the exception:
while anything else waits or is being computed, they leave it half of the room, and get back what it does not use.
Prompts whose rows are scored share the rows that a step may score, in the same order. So do all prompts the pages that
a step's chunks may see together, where these are bounded: one that would see too many waits for a step in which it is
served earlier, and the first has all of them.
"""

from collections.abc import Sequence

from graphgen.scheduler.budget import StepBudget
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.request import RunningRequest


class PromptShares:
    """The rows of one step, as they are given away."""

    def __init__(self, room: int, limits: SchedulerLimits, num_decodes: int, budget: StepBudget) -> None:
        """room: prompt tokens the step may hold."""
        self.room = room
        self.left = room
        self._limits = limits
        self._num_decodes = num_decodes
        self._budget = budget
        self._left_scored = limits.max_scored_rows
        self._left_pages = limits.max_chunk_pages
        self._lengths: dict[RunningRequest, int] = {}
        self._held_back: list[tuple[RunningRequest, int]] = []  # long prompts, and what they could use besides

    @property
    def is_full(self) -> bool:
        return self.left == 0 or len(self._lengths) == self._limits.max_chunks

    def fit(self, computed: int, missing: int, is_last: bool, is_scored: bool) -> int:
        """What a prompt with so many computed tokens and so many others would get; `is_last`: no other prompt will want
        rows after it. is_scored: see Request."""
        if self.is_full or not self._has_pages(computed, missing):
            return 0
        length = min(missing, self.left)
        if is_last:
            length = self._budget.even_length(self._num_decodes, self.room, self.room - self.left, missing)
        return min(length, self._left_scored) if is_scored else length

    def _has_pages(self, computed: int, missing: int) -> bool:
        """For a prompt that has been given nothing yet."""
        return self._left_pages is None or self._seen_pages(computed, missing) <= self._left_pages

    def _seen_pages(self, computed: int, missing: int) -> int:
        """By the longest chunk that the step has room for."""
        return -(-(computed + min(missing, self.room)) // self._limits.page_size)

    def give(self, running: RunningRequest, length: int) -> None:
        if length:
            if self._left_pages is not None and running not in self._lengths:
                self._left_pages -= self._seen_pages(running.num_prefilled, running.num_missing)
            self._lengths[running] = self._lengths.get(running, 0) + length
            self.left -= length
            if running.request.is_scored:
                self._left_scored -= length

    def give_begun(self, begun: Sequence[RunningRequest], others_wait: bool) -> None:
        """Shares for prompts that have begun, in order of service."""
        restrained = others_wait or not all(running.is_long for running in begun)
        left_to_longs = self.room // 2 if restrained else self.room
        for running in begun:
            is_last = not others_wait and running is begun[-1]
            length = self.fit(running.num_prefilled, running.num_missing, is_last, running.request.is_scored)
            if running.is_long:
                self._held_back.append((running, max(0, length - left_to_longs)))
                length = min(length, left_to_longs)
                left_to_longs -= length
            self.give(running, length)

    def give_rest(self) -> None:
        """Gives long prompts what nobody else took of the rows they had to leave."""
        for running, length in self._held_back:
            is_new = running not in self._lengths
            if is_new and not self._has_pages(running.num_prefilled, running.num_missing):
                continue
            if not (is_new and self.is_full):
                length = min(length, self.left)
                self.give(running, min(length, self._left_scored) if running.request.is_scored else length)

    def items(self) -> list[tuple[RunningRequest, int]]:
        """(request, chunk length) in the order in which they were first given something."""
        return list(self._lengths.items())
