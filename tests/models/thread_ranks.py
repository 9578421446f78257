"""Ranks that are threads of a test: what they give is added up in float64, so that the order of ranks plays no part."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from graphgen.models.spec import Shard

Result = TypeVar("Result")


class _Meeting:
    """Where all bring something and all get what all brought."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._brought: list[Tensor] = [torch.empty(0)] * size

    def exchange(self, rank: int, own: Tensor) -> Sequence[Tensor]:
        self._brought[rank] = own
        self._barrier.wait()
        found = list(self._brought)
        self._barrier.wait()
        return found

    def leave(self) -> None:
        self._barrier.abort()


class ThreadRank:
    """One of them, see `Ranks`."""

    def __init__(self, shard: Shard, meeting: _Meeting) -> None:
        self.shard = shard
        self._meeting = meeting
        self.num_reductions = 0

    def all_reduce(self, part: Tensor) -> Tensor:
        self.num_reductions += 1
        return sum(one.double() for one in self._meeting.exchange(self.shard.rank, part)).to(part.dtype)  # type: ignore[union-attr]

    def open_exchange(self, most_rows: int, width: int) -> None:
        """No kernels add up on the CPU."""

    def all_gather(self, columns: Tensor) -> Tensor:
        return torch.cat(list(self._meeting.exchange(self.shard.rank, columns)), dim=1)


def on_ranks(size: int, work: Callable[[ThreadRank], Result]) -> list[Result]:
    """What each rank's thread returns; the first failure where one fails."""
    meeting = _Meeting(size)

    def run(rank: int) -> Result:
        try:
            return work(ThreadRank(Shard(rank, size), meeting))
        except BaseException:
            meeting.leave()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        failures = [one.exception() for one in futures]
    if found := [one for one in failures if one is not None]:
        raise next((one for one in found if not isinstance(one, threading.BrokenBarrierError)), found[0])
    return [one.result() for one in futures]
