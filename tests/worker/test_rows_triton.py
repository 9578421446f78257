"""The prologue of a step in Triton's interpreter: everything that the torch version gives.

Where a CUDA device is, tests/gpu/test_rows_gpu.py runs the compiled kernels instead, on every bucket.
"""

import importlib.util

import pytest
import torch

from graphgen.ipc.worker_messages import Bucket
from tests.worker.row_cases import assert_prologues_agree

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed; comes with torch for CUDA", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("tests/gpu/test_rows_gpu.py runs the compiled kernels", allow_module_level=True)


@pytest.mark.parametrize("windows", [(None,), (None, 100, 1000), (128,)])
@pytest.mark.parametrize("bucket", [Bucket(0, 4), Bucket(28, 4), Bucket(300, 20)], ids=str)
def test_both_prologues_agree(bucket: Bucket, windows: tuple[int | None, ...]) -> None:
    assert_prologues_agree(bucket, windows, bucket.num_rows, torch.device("cpu"))
