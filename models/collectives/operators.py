"""Sums and gathering over ranks as operators: torch.compile leaves them whole, and a graph holds what they launch.

A worker process is in one process group, torch's default one, whose name is how symmetric memory calls it. Which way
adds up is decided by the number of bytes when an operator is called, on CUDA while a graph is captured. Called by
group.py.

    sum_over_ranks     [..] of each rank -> their sum
    gather_over_ranks  [N, C] of each rank -> [N, size * C]

The operators of symmetric memory take float32 and bfloat16, and add up in the order of the ranks where these are 2, 4
or 8, so that every rank has the same bits.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from graphgen.models.collectives.ways import Ways

SYMMETRIC_DTYPES = (torch.float32, torch.bfloat16)


def _sum(part: Tensor, room: Tensor | None, group: str, one_shot: int, two_shot: int) -> Tensor:
    """room: bytes of symmetric memory; None: there are none. group: its name. one_shot, two_shot: see Ways."""
    part = part.contiguous()
    if room is not None and part.dtype in SYMMETRIC_DTYPES and 0 < part.nbytes <= max(one_shot, two_shot):
        shared = room[: part.nbytes].view(part.dtype).view(part.shape)
        if part.nbytes <= one_shot:
            total: Tensor = _one_shot(shared, part, "sum", group)
            return total
        total = torch.empty_like(part)
        _two_shot(shared.copy_(part), "sum", group, total)
        return total
    total = part.clone()
    dist.all_reduce(total)
    return total


def _gather(columns: Tensor, size: int) -> Tensor:
    num_rows, num_columns = columns.shape
    gathered = columns.new_empty(size * num_rows, num_columns)
    _all_gather(gathered, columns.contiguous())
    return gathered.view(size, num_rows, num_columns).transpose(0, 1).reshape(num_rows, size * num_columns)


# Its name before torch 2.13, which warns of it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_one_shot = torch.ops.symm_mem.one_shot_all_reduce_copy.default
_two_shot = torch.ops.symm_mem.two_shot_all_reduce_out.default

# The room is written, and nobody relies on what it holds: to say so would make compilers copy it.
_library = torch.library.Library("graphgen", "FRAGMENT")
_library.define("sum_over_ranks(Tensor part, Tensor? room, str group, int one_shot, int two_shot) -> Tensor")
_library.define("gather_over_ranks(Tensor columns, int size) -> Tensor")
_library.impl("sum_over_ranks", _sum, "CompositeExplicitAutograd")
_library.impl("gather_over_ranks", _gather, "CompositeExplicitAutograd")
torch.library.register_fake(
    "graphgen::sum_over_ranks", lambda part, room, group, one_shot, two_shot: torch.empty_like(part), lib=_library
)
torch.library.register_fake(
    "graphgen::gather_over_ranks",
    lambda columns, size: columns.new_empty(columns.shape[0], size * columns.shape[1]),
    lib=_library,
)


def sum_over_ranks(part: Tensor, room: Tensor | None, group: str, ways: Ways) -> Tensor:
    total: Tensor = torch.ops.graphgen.sum_over_ranks.default(part, room, group, ways.one_shot, ways.two_shot)
    return total


def gather_over_ranks(columns: Tensor, size: int) -> Tensor:
    gathered: Tensor = torch.ops.graphgen.gather_over_ranks.default(columns, size)
    return gathered
