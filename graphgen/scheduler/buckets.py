"""Which bucket a step uses.

Owns lookup tables over the captured shapes, never a request. Called by `graphgen.scheduler.policy` and its parts, and
by tools that have to know which buckets an engine uses.
"""

from bisect import bisect_left
from collections.abc import Sequence

from graphgen.ipc.errors import ConfigError
from graphgen.ipc.worker_messages import Bucket

LONG_PROMPT_STEPS = 8
"""A prompt with more uncomputed tokens than this many steps of the full budget is long."""


class BucketTable:
    """The captured buckets within a token budget. Both questions of a step are answered from tables made here, anew
    whenever another bucket is captured."""

    def __init__(self, buckets: Sequence[Bucket], token_budget: int) -> None:
        """buckets: those that a worker has captured when it begins to serve."""
        self._token_budget = token_budget
        self._first = tuple(buckets)
        self.restart()

    def restart(self) -> None:
        """Another worker serves, with the buckets of the beginning."""
        self._set(self._first)

    def add(self, bucket: Bucket) -> None:
        """A step may use this one too from here on."""
        self._set((*self.captured, bucket))

    def _set(self, buckets: Sequence[Bucket]) -> None:
        token_budget = self._token_budget
        self.captured = tuple(buckets)
        """All of them, those beyond the token budget included."""
        usable = [bucket for bucket in buckets if bucket.num_rows <= token_budget]
        mixed = [bucket for bucket in usable if bucket.prefill_rows > 0]
        if not mixed:
            shapes = ", ".join(str(bucket) for bucket in buckets) or "none"
            raise ConfigError(
                f"no bucket with prefill rows is within token_budget {token_budget} (buckets: {shapes}):"
                " no prompt could ever be computed; raise token_budget"
            )
        self.max_decode_rows = max(bucket.decode_rows for bucket in usable)
        """Decode rows the largest bucket holds."""
        self.most_slots = min(self.max_decode_rows, max(bucket.decode_rows for bucket in mixed) + 1)
        """Requests that may run at once: all of them can decode, and one can compute its prompt while all the
        others decode."""
        self.all_mixed = tuple(mixed)
        """Every bucket with prefill rows."""
        self._mixed = _mixed_by_decodes(mixed, self.max_decode_rows)
        self._prefill_rungs = sorted({bucket.prefill_rows for bucket in usable} | {0})
        self._decode_rungs = sorted({bucket.decode_rows for bucket in usable} | {0})
        by_cost = sorted(usable, key=lambda bucket: (bucket.num_rows, bucket.decode_rows))
        self.decode_rungs = tuple(self._decode_rungs[1:])
        """Numbers of decode rows that fill a bucket, the fewest first."""
        self._smallest = [
            [_first_that_holds(by_cost, prefill_rows, decode_rows) for decode_rows in self._decode_rungs]
            for prefill_rows in self._prefill_rungs
        ]

    @property
    def long_prompt_len(self) -> int:
        """The fewest uncomputed tokens that make a prompt long."""
        return LONG_PROMPT_STEPS * self.chunk_room(0) + 1

    def mixed(self, num_decodes: int) -> tuple[Bucket, ...]:
        """The buckets worth choosing from for prompts beside `num_decodes` decodes, fewest rows first; each has room
        for more prompt tokens than the ones before it. Empty where no bucket holds both kinds."""
        return self._mixed[num_decodes]

    def chunk_room(self, num_decodes: int) -> int:
        """Prompt tokens a step may hold beside `num_decodes` decodes; 0 where no bucket holds both kinds."""
        buckets = self._mixed[num_decodes]
        return buckets[-1].prefill_rows if buckets else 0

    def smallest(self, num_prefills: int, num_decodes: int) -> Bucket:
        """The bucket of fewest rows that holds both counts; at equal rows the one with fewer decode rows.

        A padded decode row costs attention time in every layer, a padded prefill row costs none.
        """
        row = bisect_left(self._prefill_rungs, num_prefills)
        column = bisect_left(self._decode_rungs, num_decodes)
        found = None
        if row < len(self._prefill_rungs) and column < len(self._decode_rungs):
            found = self._smallest[row][column]
        if found is None:
            raise ValueError(
                f"no bucket holds {num_prefills} prompt tokens and {num_decodes} decodes:"
                f" ask chunk_room first; at most {self.max_decode_rows} decodes fit"
            )
        return found


def _mixed_by_decodes(mixed: Sequence[Bucket], max_decode_rows: int) -> list[tuple[Bucket, ...]]:
    """For each number of decodes, see `BucketTable.mixed`."""
    by_cost = sorted(mixed, key=lambda bucket: (bucket.num_rows, bucket.decode_rows))
    by_rung: dict[int, tuple[Bucket, ...]] = {}
    for rung in sorted({bucket.decode_rows for bucket in mixed}):
        chosen: list[Bucket] = []
        for bucket in by_cost:
            room = chosen[-1].prefill_rows if chosen else 0
            if bucket.decode_rows >= rung and bucket.prefill_rows > room:
                chosen.append(bucket)
        by_rung[rung] = tuple(chosen)
    rungs = list(by_rung)
    places = (bisect_left(rungs, num_decodes) for num_decodes in range(max_decode_rows + 1))
    return [by_rung[rungs[place]] if place < len(rungs) else () for place in places]


def _first_that_holds(buckets: Sequence[Bucket], prefill_rows: int, decode_rows: int) -> Bucket | None:
    for bucket in buckets:
        if bucket.prefill_rows >= prefill_rows and bucket.decode_rows >= decode_rows:
            return bucket
    return None
