"""The log-probability kernels on CUDA: they write what the torch version does, and how long that takes."""

from collections.abc import Callable

import pytest
import torch

from graphgen.ipc.step_schema import LOGPROB_WORDS
from graphgen.models.sampling import logprobs
from tests.models.logprob_cases import assert_equal_words, case, run

CUDA = torch.device("cuda")


@pytest.mark.parametrize("vocab_size", [1031, 32_000, 128_256, 262_144])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_write_what_the_reference_does(vocab_size: int, dtype: torch.dtype) -> None:
    from graphgen.models.sampling import logprob_kernels

    given = case(70, vocab_size, dtype, CUDA)
    assert_equal_words(run(logprob_kernels.write_logprobs, given), run(logprobs.write_logprobs, given), given)


def milliseconds_of(call: Callable[[], None], times: int = 50) -> float:
    """Of one replay of a graph of it."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begun.record()
    for _ in range(times):
        graph.replay()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / times


@pytest.mark.parametrize("num_rows", [12, 288])
def test_rows_that_ask_for_nothing_cost_next_to_nothing(num_rows: int) -> None:
    from graphgen.models.sampling import logprob_kernels

    logits, entries = case(num_rows, 128_256, torch.bfloat16, CUDA)
    rings = torch.zeros(2, num_rows * LOGPROB_WORDS, dtype=torch.int32, device=CUDA)
    places, ring_row = torch.arange(num_rows, device=CUDA), torch.ones(1, dtype=torch.int32, device=CUDA)
    found = {}
    for asked in (0, 1, 21):
        entries[:, 2] = asked
        found[asked] = milliseconds_of(
            lambda: logprob_kernels.write_logprobs(logits, entries[:, 1], entries[:, 2], places, rings, ring_row)
        )
    print(f"{num_rows} rows, ms: none ask {found[0]:.4f}, all ask 0 {found[1]:.4f}, all ask 20 {found[21]:.4f}")
    assert found[0] < 0.02
