"""The device code of sums over ranks, within the program that made its rank's part: see collectives/exchange.py.

Every rank starts the same programs in the same order, and waits in one only for the same one of another rank. The
first program that is not done on all of them runs on all of them, so one always goes on.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _value(word: "tl.tensor") -> "tl.tensor":
    return word.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _num_missing(words: "tl.tensor", number: "tl.tensor", inside: "tl.tensor") -> "tl.tensor":
    """Of words, [BM, BN], those that are no parts of the sum with this number."""
    return tl.sum(tl.sum((inside & ((words >> 32) != number)).to(tl.int32), 1), 0)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def sum_over_ranks(
    part: "tl.tensor",
    rows: "tl.tensor",
    columns: "tl.tensor",
    num_rows: int,
    N: int,
    rooms: "tl.tensor",
    numbers: "tl.tensor",
    layer: int,
    rank: int,
    SIZE: tl.constexpr,
    MOST_ROWS: tl.constexpr,
    BEHIND: tl.constexpr,
) -> "tl.tensor":
    """[BM, BN] float32: of all ranks' parts, in the order of the ranks. part: [BM, BN] float32 of rows [BM, 1] below
    num_rows and columns [1, BN] of N."""
    number = (tl.load(numbers) + layer).to(tl.int64)
    words = (part.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | (number << 32)
    inside = (rows < num_rows) & (columns < N)
    slot = MOST_ROWS * N
    places = BEHIND * SIZE * slot + rows * N + columns
    for other in tl.static_range(SIZE):
        if other != rank:
            room = tl.load(rooms + other).to(tl.pointer_type(tl.int64))
            tl.store(room + rank * slot + places, words, inside)
    own_room = tl.load(rooms + rank).to(tl.pointer_type(tl.int64))
    total = tl.zeros_like(part)
    for other in tl.static_range(SIZE):
        if other == rank:
            total += part
        else:
            theirs = own_room + other * slot + places
            arrived = tl.load(theirs, inside, other=0, volatile=True)
            while _num_missing(arrived, number, inside) > 0:
                arrived = tl.load(theirs, inside, other=0, volatile=True)
            total += _value(arrived)
    return total
