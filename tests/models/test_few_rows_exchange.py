"""The kernels that add up over ranks, in Triton's interpreter: one rank runs, the parts of the others have arrived.

Where a CUDA device is, the interpreter is not had; tests/gpu/test_tensor_parallel_gpu.py runs real ranks.
"""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphgen.models.collectives.exchange import NUMBERS_OF_A_STEP, WORD_BYTES, Exchange, Meeting, room_bytes
from graphgen.models.norms import RMSNorm
from graphgen.models.spec import Norm

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed; comes with torch for CUDA", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("tests/gpu/test_tensor_parallel_gpu.py runs real ranks", allow_module_level=True)

from graphgen.models import few_rows  # Triton exists where it is installed

SIZE, WIDTH, DEPTH, MOST_ROWS = 3, 64, 256, 20
EPS = 1e-5


def make_norm() -> RMSNorm:
    norm = RMSNorm(WIDTH, Norm(eps=EPS), torch.float32)
    assert norm.weight is not None
    norm.weight.data.normal_(1.0, 0.3)
    return norm


class Rooms:
    """Those of all ranks, as one of them sees them."""

    def __init__(self, rank: int) -> None:
        num_words = room_bytes(SIZE, MOST_ROWS, WIDTH) // WORD_BYTES
        self.all = [torch.zeros(num_words, dtype=torch.int64) for _ in range(SIZE)]
        addresses = torch.tensor([room.data_ptr() for room in self.all])
        self.exchange = Exchange(addresses, torch.zeros(1, dtype=torch.int32), rank, SIZE, MOST_ROWS, self.all[rank])

    def slot(self, room: int, behind: int, rank: int) -> Tensor:
        """[MOST_ROWS, WIDTH] of a rank in the room of another."""
        return self.all[room].view(2, SIZE, MOST_ROWS, WIDTH)[behind, rank]


def words(part: Tensor, number: int) -> Tensor:
    return (part.view(torch.int32).long() & 0xFFFFFFFF) | (number << 32)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("num_rows", [1, 18])
def test_a_rank_adds_what_arrived_and_sends_its_own(num_rows: int, rank: int) -> None:
    torch.manual_seed(0)
    rooms, norm = Rooms(rank), make_norm()
    table, token_ids = torch.randn(50, WIDTH), torch.randint(50, (num_rows,))
    layer, behind = 3, 1
    for step in (1, 2):
        number = step * NUMBERS_OF_A_STEP + layer
        sums, _ = few_rows.embed(token_ids, table, norm, rooms.exchange)
        weight, bias = torch.randn(WIDTH, DEPTH) * 0.1, torch.randn(WIDTH)
        x = torch.randn(num_rows, DEPTH)
        own = F.linear(x, weight, bias)
        theirs = {other: torch.randn(num_rows, WIDTH) for other in range(SIZE) if other != rank}
        for other, part in theirs.items():
            rooms.slot(rank, behind, other)[:num_rows] = words(part, number)
        before = rooms.slot(rank, 1 - behind, 0).clone()
        meeting = Meeting(rooms.exchange, layer, behind)
        got, normed = few_rows.adding_linear(x, weight, bias, sums, norm, chained=False, meeting=meeting)
        want = sums + own + sum(theirs.values())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(normed.squares.sum(1), got.pow(2).sum(1))
        for other in theirs:
            sent = rooms.slot(other, behind, rank)
            assert ((sent[:num_rows] >> 32) == number).all()
            torch.testing.assert_close(
                (sent[:num_rows] & 0xFFFFFFFF).int().view(torch.float32), own, rtol=1e-4, atol=1e-4
            )
            assert not sent[num_rows:].any(), "rows that the step has not"
        assert torch.equal(rooms.slot(rank, 1 - behind, 0), before)


def test_sums_are_the_same_bits_on_every_rank() -> None:
    """Each adds up in the order of the ranks, its own part in its place."""
    torch.manual_seed(1)
    x, weight, norm = torch.randn(SIZE, 1, DEPTH), torch.randn(WIDTH, DEPTH) * 0.1, make_norm()
    stream, found = torch.randn(1, WIDTH), []
    parts: dict[int, Tensor] = {}
    for known in (False, True):
        for rank in range(SIZE):
            rooms = Rooms(rank)
            for other in set(range(SIZE)) - {rank}:
                part = parts[other] if known else torch.zeros(1, WIDTH)
                rooms.slot(rank, 0, other)[:1] = words(part, 0)
            meeting = Meeting(rooms.exchange, 0, 0)
            sums, _ = few_rows.adding_linear(x[rank], weight, None, stream, norm, chained=False, meeting=meeting)
            sent = rooms.slot((rank + 1) % SIZE, 0, rank)[:1]
            parts[rank] = (sent & 0xFFFFFFFF).int().view(torch.float32).clone()
            if known:
                found.append(sums)
    assert all(torch.equal(one, found[0]) for one in found)
