"""Log-probabilities in torch: those of torch's log-softmax, ranks and the likeliest tokens in one order, for the rows
that ask and no other."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphgen.ipc.step_schema import LOGPROB_WORDS
from graphgen.ipc.worker_messages import MAX_LOGPROBS
from graphgen.models.sampling import NO_TOKEN
from graphgen.models.sampling.logprobs import write_logprobs
from tests.models.sampling_cases import troubled_logits

UNTOUCHED = -77


def written(logits: Tensor, token_ids: Tensor, asked: Tensor) -> Tensor:
    """[N, LOGPROB_WORDS]: what a row of a ring holds afterwards."""
    rings = torch.full((3, len(logits) * LOGPROB_WORDS), UNTOUCHED, dtype=torch.int32)
    places = torch.arange(len(logits)).flip(0)
    write_logprobs(logits, token_ids, asked.flip(0), places, rings, torch.tensor([1], dtype=torch.int32))
    assert (rings[[0, 2]] == UNTOUCHED).all()
    return rings[1].view(len(logits), LOGPROB_WORDS)


def floats(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.float32)


@settings(max_examples=30)
@given(st.integers(21, 300), st.integers(0, 2**31))
def test_rows_that_ask_get_their_log_softmax_and_others_are_left_alone(vocab_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(8, vocab_size, generator=generator) * 6).bfloat16()  # with many equal ones
    token_ids = torch.randint(vocab_size, (8,), generator=generator)
    asked = torch.randint(MAX_LOGPROBS + 2, (8,), generator=generator)
    asked[3] = 0
    words = written(logits, token_ids, asked)
    expected = logits.float().log_softmax(1)
    for row, (token_id, num_top) in enumerate(zip(token_ids.tolist(), (asked - 1).tolist(), strict=True)):
        if num_top < 0:
            assert (words[row] == UNTOUCHED).all()
            continue
        order = sorted(range(vocab_size), key=lambda one: (-float(logits[row, one]), one))
        assert abs(float(floats(words[row, :1])) - float(expected[row, token_id])) < 1e-5
        assert int(words[row, 1]) == 1 + order.index(token_id)
        assert words[row, 2 : 2 + num_top].tolist() == order[:num_top]
        first = 2 + MAX_LOGPROBS
        assert torch.allclose(floats(words[row, first : first + num_top]), expected[row, order[:num_top]], atol=1e-5)


def test_a_token_among_the_likeliest_has_the_very_number_that_it_has_there() -> None:
    """Programs compare the two to find out whether a token was the greedy one."""
    logits = torch.randn(20, 1000, generator=torch.Generator().manual_seed(0)) * 5
    words = written(logits, logits.argmax(1), torch.full((20,), 3))
    assert torch.equal(words[:, 0], words[:, 2 + MAX_LOGPROBS])
    assert (words[:, 1] == 1).all()


def test_logits_that_are_no_numbers_give_no_nan() -> None:
    logits = troubled_logits(12, 50, seed=1)
    words = written(logits, torch.full((12,), NO_TOKEN), torch.full((12,), 1 + MAX_LOGPROBS))
    values = floats(words[:, 2 + MAX_LOGPROBS :])
    assert (values <= 0).all(), "as NaN is not"
    assert (values[3:5] == float("-inf")).all(), "rows of nothing but NaN, or -inf, have no probabilities"
    assert float(values[6, 0]) == 0.0, "+inf is certain"
