"""Which rare bucket the worker captures next, and when: one at a time, only while the engine is idle.

Owns the list of those that are left, and what is said of the others. Pure: told the time, never reads it. Which bucket
a step uses is the policy's. Called by `graphgen.scheduler.loop`.

A bucket whose capture fails for want of memory, or ends its worker, is given up for as long as the engine lives: the
steps that would use it use a larger one.
"""

import logging
from collections.abc import Sequence

from graphgen.ipc.worker_messages import Bucket, Captured

QUIET_S = 1.0
"""For so long nothing has run or waited when a capture begins: who sends one request after another never meets one."""

logger = logging.getLogger("graphgen.scheduler")


class Captures:
    """Of an engine's worker groups, one after another."""

    def __init__(self, rare: Sequence[Bucket], num_buckets: int, now_s: float) -> None:
        """rare: what a group has not captured when it is ready. num_buckets: theirs and the others'."""
        self._rare = tuple(rare)
        self._given_up: set[Bucket] = set()
        self.num_buckets = num_buckets
        self.longest_ms = 0.0
        """Of all captures."""
        self.restart(now_s)

    def restart(self, now_s: float) -> None:
        """A new group serves: it has everything but the rare ones."""
        # Large ones first, whose blocks of memory the others find again.
        self._left = [bucket for bucket in reversed(self._rare) if bucket not in self._given_up]
        self._asked: Bucket | None = None
        self._quiet_since_s = now_s
        self._took_s = 0.0

    @property
    def num_captured(self) -> int:
        """Buckets that steps may use."""
        num_open = len(self._left) + (self._asked is not None)
        return self.num_buckets - len(self._given_up) - num_open

    def next(self, is_idle: bool, now_s: float) -> Bucket | None:
        """The bucket to ask for now. To be called whenever something may have changed, and at `due_s`."""
        if not is_idle:
            self._quiet_since_s = now_s
        if self._asked is not None or not self._left or now_s < self._quiet_since_s + QUIET_S:
            return None
        self._asked = self._left.pop(0)
        return self._asked

    @property
    def due_s(self) -> float | None:
        """When the next one may be asked for if the engine stays idle; None: nothing is left, or one is on its way."""
        return self._quiet_since_s + QUIET_S if self._left and self._asked is None else None

    def answered(self, captured: Captured) -> None:
        """Raises ValueError for a bucket that was not asked for."""
        if captured.bucket != self._asked:
            raise ValueError(f"{captured.bucket} was captured, {self._asked} was asked for")
        self._asked = None
        self._took_s += captured.seconds
        self.longest_ms = max(self.longest_ms, 1000.0 * captured.seconds)
        if captured.problem:
            self._give_up(captured.bucket, captured.problem)
        if not self._left:
            logger.info(
                "%d of %d buckets are captured: %d of them after ready, in %.1f s of idle time, the longest in %.0f ms",
                self.num_captured,
                self.num_buckets,
                len(self._rare) - len(self._given_up),
                self._took_s,
                self.longest_ms,
            )

    def worker_lost(self) -> None:
        """The group has ended, perhaps of a capture."""
        if self._asked is not None:
            self._give_up(self._asked, "the worker ended while it captured it")
            self._asked = None

    def _give_up(self, bucket: Bucket, problem: str) -> None:
        self._given_up.add(bucket)
        logger.warning("bucket %s is given up, its steps use a larger one: %s", bucket, problem)
