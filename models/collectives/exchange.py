"""What the fused kernels of few rows need to add up over ranks within a product: rooms that all ranks reach.

Every rank's room has a slot for each rank and for each of the two sums of a layer: a program writes its part into its
own rank's slot in the rooms of the others, and reads theirs in its own. The layers' kernels alternate between the two
sums, so that nobody writes a slot again before it was read: who is at the next sum has read all parts of the one ahead,
and those parts were written by ranks that had read the one before. A part is written together with the number of its
sum, in one word, so its arrival is seen in itself; a step counts its sums on the device, as graphs are replayed.

Called by group.py, which has the memory; few_rows_exchange.py has the device code.
"""

from typing import NamedTuple

from torch import Tensor

WORD_BYTES = 8
"""A float32 and the number of its sum."""
NUMBERS_OF_A_STEP = 1024
"""More than any model has layers, and the same where a step leaves some out: else the numbers of such a step would come
back in the next, which could take an old part for the one that it waits for."""


class Exchange(NamedTuple):
    """How one rank meets the others."""

    rooms: Tensor
    """[ranks] int64: where each one's room begins, of [2, ranks, most rows, width] words."""
    numbers: Tensor
    """[1] int32: of the last step's first sum. Each step adds NUMBERS_OF_A_STEP."""
    rank: int
    size: int
    most_rows: int
    room: Tensor
    """The own one, which lives as long as this."""


class Meeting(NamedTuple):
    """A sum of a step."""

    exchange: Exchange
    layer: int
    behind: int
    """0: what the mixer adds; 1: what the feed-forward adds."""


def room_bytes(size: int, most_rows: int, width: int) -> int:
    """Of each of `size` ranks."""
    return 2 * size * most_rows * width * WORD_BYTES


def meeting_tensors(meeting: Meeting | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    """(rooms, numbers, layer, rank) as kernels take them."""
    if meeting is None:
        return None, None, 0, 0
    return meeting.exchange.rooms, meeting.exchange.numbers, meeting.layer, meeting.exchange.rank


def meeting_sizes(meeting: Meeting | None) -> tuple[int, int, int]:
    """(ranks, most rows of a slot, which sum of a layer), known when a kernel is compiled."""
    if meeting is None:
        return 1, 0, 0
    return meeting.exchange.size, meeting.exchange.most_rows, meeting.behind
