"""Attention kernels called as they lie in their files, against FlashInfer's own Python around the same kernels."""

import subprocess
import sys

import pytest
import torch

from graphgen.ipc.worker_messages import Bucket
from graphgen.models.attention.direct import PlannedFunctions, wrapped_functions
from graphgen.models.attention.kernels import Kernel, arch_of, planned_library
from graphgen.models.attention.libraries import KernelFolder, load_libraries, planned_functions
from graphgen.models.attention.variant import Numbers, Scoring
from tests import ROOT
from tests.gpu.test_attention_gpu import attend, live_rows, make_backend, poisoned_cache, random_case, random_rows


def _is_hopper() -> bool:
    return torch.cuda.get_device_capability()[0] == 9


@pytest.mark.parametrize(
    ("heads", "kernels"),
    [((32, 8, 128), "FA3+SPLIT_KV"), ((4, 2, 64), "FA3+SPLIT_KV"), ((32, 8, 128), "FA2+FA2"), ((4, 2, 64), "FA2+FA2")],
    ids=str,
)
def test_kernels_compute_the_same_bits_with_and_without_flashinfers_python(
    heads: tuple[int, int, int], kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels.startswith("FA3") and not _is_hopper():
        pytest.skip("FA3 needs compute capability 9.0 and runs there; FA2 is compared on every GPU")
    from graphgen.models.attention import planned

    backend = make_backend(heads, kernels)
    backend.load_kernels()
    kernel = Kernel[kernels.partition("+")[0]]
    library = planned_library(kernel, torch.bfloat16, heads[2], windowed=False)
    folder = KernelFolder.of(arch_of(torch.cuda.get_device_capability()))
    direct = planned_functions(library, folder)
    wrapped = wrapped_functions(library, library.load())
    plain = Scoring(Numbers(heads[2] ** -0.5))
    assert len(direct.run_tail(plain)) != len(wrapped.run_tail(plain)), "the installed FlashInfer takes other arguments"

    bucket = Bucket(448, 64)
    case = random_case(bucket, 440, 60, seed=1)
    rows = random_rows(bucket, heads, seed=1)
    outputs = []
    for functions in (direct, wrapped):

        def chosen(*_: object, functions: PlannedFunctions = functions) -> PlannedFunctions:
            return functions

        monkeypatch.setattr(planned, "_functions", chosen)
        cache = poisoned_cache(case, *heads[1:], seed=1)
        backend.plan(bucket.prefill_rows, case.starts, case.chunk_kv_lens, case.decode_kv_lens)
        outputs.append(attend(backend.prepare(case.tables), rows, cache)[live_rows(case)])
    assert torch.equal(*outputs)


def test_a_worker_whose_kernels_lie_ready_never_imports_flashinfer() -> None:
    """Its import takes seconds on a slow host, and a start waits for it."""
    kernel = Kernel.FA3 if _is_hopper() else Kernel.FA2
    library = planned_library(kernel, torch.bfloat16, 64, windowed=False)  # the embedded model's
    load_libraries([library], KernelFolder.of(arch_of(torch.cuda.get_device_capability())))
    code = (
        "import sys\n"
        "from graphgen.worker.runner import ModelRunner\n"
        "from graphgen import demo\n"
        "from tests.worker.local_engine import launch_config\n"
        "config = launch_config(demo.model_folder(), device='cuda', attention='flashinfer', num_pages=64)\n"
        "runner = ModelRunner(config, lambda progress: None)\n"
        "runner.close()\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "tvm_ffi" in loaded
    assert "flashinfer" not in loaded
