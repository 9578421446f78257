"""The process group of a worker group's ranks: how it comes about, and what it is asked outside of steps.

Owns the group, and the symmetric memory that sums of few bytes pass through. Opened by the worker before anything is
captured, in the same order on every rank. Never closed: a group whose collectives were captured may wait for ever in
its end, so its process ends instead.
"""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from graphgen.models.collectives.exchange import Exchange, room_bytes
from graphgen.models.collectives.operators import gather_over_ranks, sum_over_ranks
from graphgen.models.collectives.ways import NCCL_ALONE, Ways, ways_of
from graphgen.models.spec import Shard

ENVIRONMENT = {
    # All ranks are processes of this host. Gloo would look its name up, which need not be known.
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # No multicast over NVLink: few machines allow it, and a program that ends in the middle may leave it unusable.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
"""What is set for the ranks, unless the user has set it."""

MOST_SHARED = 2**24
"""Whole numbers below it are exact in float32."""


class RankGroup:
    """The ranks, see `Ranks`, and what they agree on beside the steps."""

    def __init__(self, shard: Shard, rendezvous: Path, device: torch.device, timeout_s: float) -> None:
        """rendezvous: a file that no other group has used. device: this rank's, of which it becomes the current one.
        timeout_s: for each of them to arrive there.

        Raises torch's DistError where they do not meet.
        """
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._shard = shard
        on_cuda = device.type == "cuda"
        if on_cuda:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=FileStore(str(rendezvous), shard.size),
            rank=shard.rank,
            world_size=shard.size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if on_cuda else None,  # NCCL connects now, and not within the first step
        )
        group = dist.group.WORLD
        assert group is not None, "it was just made"
        # Of its own, since the thread that asks is not the one that runs steps on the CPU, and both may at once.
        self._talk = dist.new_group(backend="gloo")
        self.process_group = group
        self.name = group.group_name
        self._ways, self._room, self.description = _open_room(shard, device, group)

    @property
    def shard(self) -> Shard:
        return self._shard

    def all_reduce(self, part: Tensor) -> Tensor:
        return sum_over_ranks(part, self._room, self.name, self._ways)

    def all_gather(self, columns: Tensor) -> Tensor:
        return gather_over_ranks(columns, self._shard.size)

    def open_exchange(self, most_rows: int, width: int) -> Exchange | None:
        if self._room is None:
            return None
        num_bytes = room_bytes(self._shard.size, most_rows, width)
        room, addresses = shared_room(num_bytes, self._room.device, self.process_group)
        rooms, numbers = torch.tensor(addresses, device=room.device), torch.zeros_like(room[:4].view(torch.int32))
        torch.cuda.synchronize(room.device)
        self.least(0.0)  # all rooms are empty before anybody writes into one
        return Exchange(rooms, numbers, self._shard.rank, self._shard.size, most_rows, room)

    def of_first(self, numbers: Tensor) -> Tensor:
        """The first rank's numbers, [N], integers of less than MOST_SHARED, in their dtype: what the others give does
        not matter."""
        own = numbers.float() if self._shard.rank == 0 else torch.zeros_like(numbers, dtype=torch.float32)
        return self.all_reduce(own).to(numbers.dtype)

    def least(self, value: float) -> float:
        """Of all ranks' values. On the host, not within a step."""
        return self._agreed(value, dist.ReduceOp.MIN)

    def most(self, value: float) -> float:
        """See least."""
        return self._agreed(value, dist.ReduceOp.MAX)

    def _agreed(self, value: float, operation: "dist.ReduceOp.RedOpType") -> float:
        found = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(found, operation, self._talk)
        return found.item()


def is_loss_of_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank has ended, or did not come."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _open_room(shard: Shard, device: torch.device, group: dist.ProcessGroup) -> tuple[Ways, Tensor | None, str]:
    """The ways that there are, the symmetric memory for them, and both in words."""
    ways = ways_of(shard.size)
    if device.type != "cuda":
        return NCCL_ALONE, None, "Gloo"
    if ways == NCCL_ALONE:
        return ways, None, "NCCL"
    try:
        room, _ = shared_room(max(ways), device, group)
    except RuntimeError as error:  # GPUs that cannot read each other's memory
        return NCCL_ALONE, None, f"NCCL (no symmetric memory: {str(error).splitlines()[0]})"
    return ways, room, f"one-shot to {ways.one_shot >> 10} KiB, two-shot to {ways.two_shot >> 10} KiB, NCCL"


def shared_room(num_bytes: int, device: torch.device, group: dist.ProcessGroup) -> tuple[Tensor, list[int]]:
    """Zeroed bytes of a CUDA device's memory that all ranks reach, which each of them asks for at the same time, and
    the addresses of all ranks' here. Raises RuntimeError where GPUs cannot reach each other's."""
    import torch.distributed._symmetric_memory as symmetric

    room = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
    handle = symmetric.rendezvous(room, group)
    return room.zero_(), list(handle.buffer_ptrs)
