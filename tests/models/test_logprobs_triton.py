"""The log-probability kernels in Triton's interpreter: what the torch version writes, and nothing of other rows.

Where a CUDA device is, tests/gpu/test_logprobs_gpu.py runs the compiled kernels instead, see test_sampling_triton.py.
"""

import importlib.util

import pytest
import torch

from graphgen.models.sampling import logprobs
from tests.models.logprob_cases import assert_equal_words, case, run

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed; comes with torch for CUDA", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("tests/gpu/test_logprobs_gpu.py runs the compiled kernels", allow_module_level=True)

from graphgen.models.sampling import logprob_kernels  # Triton exists where it is installed

# The interpreter computes in numpy, which warns where the kernels mean it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(33, torch.bfloat16), (4096, torch.float32), (9001, torch.bfloat16)],
    ids=["part of a tile", "one tile", "several"],
)
def test_kernels_write_what_the_reference_does(vocab_size: int, dtype: torch.dtype) -> None:
    given = case(12, vocab_size, dtype, torch.device("cpu"))
    assert_equal_words(run(logprob_kernels.write_logprobs, given), run(logprobs.write_logprobs, given), given)
