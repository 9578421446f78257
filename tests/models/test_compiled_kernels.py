"""Kernels with PTX in them, and those cut for one device, are compiled for it: Triton's interpreter sees neither.

Needs Triton, not a GPU. What they compute is tested in the interpreter and in tests/gpu.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

pytest.importorskip(
    "triton", reason="Triton comes with torch for CUDA: runs with `make gpu-test`, or where it is there"
)

BEGIN = """
import torch
from graphgen.models.triton_ahead import compile_sources, recorded_launches, target_of

def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape).to(dtype)

def launch():
"""
END = """
target = target_of((9, 0))
with recorded_launches(target) as sources:
    launch()
compiled = compile_sources(sources, target, 1)
assert not compiled.failures, compiled.failures
print(*sorted({source.name for source in sources}))
"""
DECODES = """
    from graphgen.models.attention import split_kv
    from graphgen.models.attention.pages import FP8, LayerPages
    from graphgen.models.attention.variant import Numbers, Scoring

    rows, heads, kv_heads, width = 4, 8, 2, 128
    q, k, v = (zeros(rows, count, width, dtype=torch.bfloat16) for count in (heads, kv_heads, kv_heads))
    cos = zeros(rows, width, dtype=torch.bfloat16)
    pages = zeros(2, 9, 64, kv_heads, width, dtype=FP8)
    tables, lens = zeros(rows, 2, dtype=torch.int32), zeros(rows, dtype=torch.int32)
    workspace = split_kv.open_workspace(rows, heads, kv_heads, width, q.device)
    split_kv.share_out(lens, kv_heads, 64, workspace)
    split_kv.split_kv_attention(
        q, q, LayerPages(*pages, zeros(kv_heads), zeros(kv_heads)), tables, lens, workspace,
        Scoring(Numbers(width**-0.5, 0, 0, 0.0), None, None), split_kv.FreshRows(k, v, cos, cos, None), chained=True,
    )
"""
INT4 = """
    from graphgen.models.formats import few_rows_int4

    for rows, group, with_zeros in ((16, 128, True), (32, 64, False)):
        few_rows_int4.product(
            zeros(rows, 512, dtype=torch.float8_e4m3fn), zeros(rows, 1), zeros(256, 256, dtype=torch.uint8),
            zeros(256, 512 // group, dtype=torch.bfloat16),
            zeros(256, 512 // group, dtype=torch.uint8) if with_zeros else None,
            group, None, torch.bfloat16, chained=True,
        )
"""
E4M3 = """
    from graphgen.models.formats import few_rows_e4m3

    left, codes = zeros(32, 512, dtype=torch.float8_e4m3fn), zeros(256, 512, dtype=torch.float8_e4m3fn)
    scales = {False: (zeros(32, 1), zeros(256, 1)), True: (zeros(4, 32), zeros(2, 4))}
    for blocked, fast_sums in ((False, True), (False, False), (True, True)):
        of_left, of_codes = scales[blocked]
        few_rows_e4m3.product(
            left, of_left, codes, of_codes, None, torch.bfloat16, blocked, fast_sums, chained=True
        )
"""
GATED = """
    from graphgen.models.gated_kernel import gated_rows

    for activation, columns in ((0, 14_336), (1, 1024), (2, 352)):
        gated_rows(zeros(4, 2 * columns, dtype=torch.bfloat16), activation, chained=True)
"""


@pytest.mark.parametrize(
    ("launches", "names"),
    [
        (DECODES, "share_kernel split_kv_kernel"),
        (INT4, "int4_kernel"),
        (E4M3, "e4m3_kernel"),
        (GATED, "gated_rows_kernel"),
    ],
    ids=["fp8 pages", "int4", "e4m3", "gated rows"],
)
def test_a_kernel_of_sm90_is_compiled(launches: str, names: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    program = BEGIN + launches + END
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == names
