"""What the ranks of a worker group compute together: sums of their parts, and the gathering of what each has.

ways.py says which way serves how many bytes, from a measurement; operators.py makes operators of the ways, so that a
compiled layer has them; exchange.py is for kernels that add up themselves; group.py opens the group. `Ranks` is all
that a model knows of it.
"""

from typing import Protocol

from torch import Tensor

from graphgen.models.collectives.exchange import Exchange
from graphgen.models.spec import Shard


class Ranks(Protocol):
    """The ranks that share a model's weights, as one of them sees them. Every rank calls the same in the same order,
    and gets the same bits. A model that one rank holds alone has none, and its step no trace of this."""

    @property
    def shard(self) -> Shard:
        """Which of them this one is."""
        ...

    def all_reduce(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts, of their shape and dtype."""
        ...

    def all_gather(self, columns: Tensor) -> Tensor:
        """The columns of all ranks beside each other, in their order: of [N, C] each, [N, size * C]."""
        ...

    def open_exchange(self, most_rows: int, width: int) -> Exchange | None:
        """Rooms for sums of so many rows, `width` wide, within kernels; None where ranks do not reach each other's
        memory."""
        ...


__all__ = ["Exchange", "Ranks"]
