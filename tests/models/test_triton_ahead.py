"""Launches on no device tell which kernels to compile, and those are then found in Triton's cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

pytest.importorskip(
    "triton", reason="Triton comes with torch for CUDA: runs with `make gpu-test`, or where it is there"
)

KERNELS = """
import torch, triton, triton.language as tl

@triton.jit
def fill(out, value: float, count: int, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(out + places, tl.full([BLOCK], value, tl.float32), places < count)

@triton.jit
def broken(out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), nothing)
"""
PROGRAM = """
import os, sys, torch
from pathlib import Path
import kernels
from graphgen.models.triton_ahead import compile_sources, recorded_launches, target_of

target, out = target_of((9, 0)), torch.zeros(64)
with recorded_launches(target) as sources:
    for count in (32, 48, 3):                                    # two multiples of 16 are one kernel
        kernels.fill[(1,)](out, 1.0, count, BLOCK=32)
    kernels.fill[(1,)](out[1:], 1.0, 32, BLOCK=32)               # begins at no multiple of 16 bytes
    kernels.fill[(1,)](out, 1.0, 32, BLOCK=64, num_warps=1)
    kernels.broken[(1,)](out, BLOCK=32)
assert not out.any(), "nothing was launched"
print(len(sources), *(source.name for source in sources))
compiled = compile_sources(sources, target, 2)
print(compiled.num_kernels, *compiled.failures)
cache = Path(os.environ["TRITON_CACHE_DIR"])
first = {path: path.stat().st_mtime_ns for path in cache.rglob("*.cubin")}
compile_sources(sources, target, 2)
assert first == {path: path.stat().st_mtime_ns for path in cache.rglob("*.cubin")}, "compiled a second time"
from triton.backends.nvidia import driver
print(len(first), len(list(cache.rglob("*launcher*"))) > 0 or not hasattr(driver, "make_launcher"))
"""


def test_what_is_launched_on_no_device_is_compiled_for_one(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(KERNELS)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = f"{ROOT}:{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    recorded, compiled, kept = done.stdout.splitlines()
    assert recorded == "5 fill fill fill fill broken"
    assert compiled.startswith("5 broken: CompilationError"), "one that cannot be compiled keeps no other"
    assert kept == "4 True"
