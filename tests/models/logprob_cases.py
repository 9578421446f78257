"""Shared by the tests of the log-probability kernels: rows that ask for anything, and how answers are compared."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from graphgen.ipc.step_schema import LOGPROB_WORDS, SCORED_ROW_WORDS
from graphgen.ipc.worker_messages import MAX_LOGPROBS
from tests.models.sampling_cases import troubled_logits

UNTOUCHED = -77


class Case(NamedTuple):
    logits: Tensor
    entries: Tensor
    """[N, SCORED_ROW_WORDS] int32: token and what is asked for lie among other words, as in a step's input."""


def case(num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Troubled rows, each third of which asks for nothing."""
    generator = torch.Generator().manual_seed(vocab_size)
    entries = torch.randint(vocab_size, (num_rows, SCORED_ROW_WORDS), generator=generator, dtype=torch.int32)
    entries[:, 2] = torch.randint(1, MAX_LOGPROBS + 2, (num_rows,), generator=generator)
    entries[::3, 2] = 0
    entries[-1] = torch.tensor([0, -1, MAX_LOGPROBS + 1])  # nothing could be drawn
    return Case(troubled_logits(num_rows, vocab_size, seed=5).to(device, dtype), entries.to(device))


def run(write: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None], given: Case) -> Tensor:
    """[N, LOGPROB_WORDS] on the CPU."""
    logits, entries = given
    device = logits.device
    rings = torch.full((2, len(logits) * LOGPROB_WORDS), UNTOUCHED, dtype=torch.int32, device=device)
    places = torch.arange(len(logits), device=device)
    write(logits, entries[:, 1], entries[:, 2], places, rings, torch.ones(1, dtype=torch.int32, device=device))
    assert (rings[0] == UNTOUCHED).all()
    return rings[1].view(-1, LOGPROB_WORDS).cpu()


def assert_equal_words(found: Tensor, expected: Tensor, given: Case) -> None:
    """Ranks and ids exactly, log-probabilities as far as the order of a sum allows."""
    for row, (_, _, asked) in enumerate(given.entries.tolist()):
        if not asked:
            assert (found[row] == UNTOUCHED).all()
            continue
        last_id, last_value = 1 + asked, 1 + MAX_LOGPROBS + asked
        ints, values = slice(1, last_id), [0, *range(2 + MAX_LOGPROBS, last_value)]
        assert found[row, ints].tolist() == expected[row, ints].tolist()
        pair = (words[row, values].view(torch.float32) for words in (found, expected))
        torch.testing.assert_close(*pair, atol=2e-5, rtol=1e-6)
