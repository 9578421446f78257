"""Which steps beyond the saturation point are worth their length, beside the decodes that run.

Owns the judgement of each number of decodes, never the choice of one step. `graphgen.scheduler.budget` asks it for
every plan that no target binds, and lets it judge anew from time to time.

    prompt rate of a bucket = prompt rows / milliseconds of a step that fills it, beside the decodes that run

Decodes cost a large step as much as a small one, so the more of them run, the better larger steps become: with an 8B
model on an H200, steps of 512 rows compute 0.93 of the best prompt rate of steps up to 1024 rows beside 16 decodes that
are 1024 tokens long, and 0.83 beside 64.
"""

from collections.abc import Sequence

from graphgen.ipc.worker_messages import Bucket
from graphgen.scheduler.buckets import BucketTable
from graphgen.scheduler.cost_model import CostModel, smallest_near_best

RATE_SHARE = 0.97
"""The largest step is the smallest that computes this share of the best prompt rate."""


class LargeSteps:
    """Of one worker."""

    def __init__(self, buckets: BucketTable, model: CostModel) -> None:
        self._buckets = buckets
        self._model = model
        # Numbers of decodes for which the same buckets may be chosen are judged together.
        self._most_decodes: list[int] = []  # of each such group
        self._group: list[int] = []  # of each number of decodes
        for num_decodes in range(buckets.max_decode_rows + 1):
            if not num_decodes or buckets.mixed(num_decodes) is not buckets.mixed(num_decodes - 1):
                self._most_decodes.append(num_decodes)
            self._most_decodes[-1] = num_decodes
            self._group.append(len(self._most_decodes) - 1)
        self._worthy: list[tuple[Bucket, ...]] = [() for _ in self._most_decodes]

    def beside(self, num_decodes: int) -> tuple[Bucket, ...]:
        """Buckets with more rows than the saturation point, fewest rows first. Each computes more prompt tokens a
        second than those before it, and the last one computes enough."""
        return self._worthy[self._group[num_decodes]]

    def judge_all(self, most_rows: int | None) -> None:
        """Beside every number of decodes, at the positions of the table. most_rows: of the saturation point; None: not
        known, and nothing is larger."""
        for num_decodes in self._most_decodes:
            self.judge(most_rows, num_decodes, None)

    def judge(self, most_rows: int | None, num_decodes: int, num_positions: int | None) -> None:
        """Beside so many decodes, which attend to so many positions together."""
        group = self._group[num_decodes]
        before, self._worthy[group] = self._worthy[group], ()
        buckets = self._buckets.mixed(num_decodes)
        if most_rows is None or not buckets:
            return
        efficient = [bucket for bucket in buckets if bucket.num_rows <= most_rows] or [buckets[0]]
        larger = buckets[len(efficient) :]
        rates = self._model.prompt_rates((efficient[-1], *larger), num_decodes, num_positions)
        by_rows = dict(zip((0, *(bucket.num_rows for bucket in larger)), rates, strict=True))
        current = before[-1].num_rows if before else 0
        enough = smallest_near_best(by_rows, RATE_SHARE, current)
        self._worthy[group] = _growing(larger, rates, enough)


def _growing(larger: Sequence[Bucket], rates: Sequence[float], most_rows: int) -> tuple[Bucket, ...]:
    """Those of at most so many rows that compute more than any smaller one. rates: the saturation point's, and
    theirs."""
    best, found = rates[0], []
    for bucket, rate in zip(larger, rates[1:], strict=True):
        if bucket.num_rows <= most_rows and rate > best:
            best = rate
            found.append(bucket)
    return tuple(found)
