"""Which kernels a model needs on which architecture."""

import pytest
import torch

from graphgen.ipc.errors import ConfigError, UnsupportedModelError
from graphgen.models.attention.kernels import (
    AttentionShape,
    Kernel,
    PlannedLibrary,
    XqaLibrary,
    arch_of,
    best_kernels,
    check_supported,
    needed_libraries,
    parse_arch,
)

HOPPER = (9, 0)


def shape(windows: tuple[int, ...] = (0,), head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> AttentionShape:
    return AttentionShape(num_heads=32, num_kv_heads=8, head_dim=head_dim, page_size=64, dtype=dtype, windows=windows)


def test_hopper_needs_fa3_for_each_kind_of_window() -> None:
    full, windowed = (PlannedLibrary("fa3", torch.bfloat16, 128, windowed) for windowed in (False, True))
    assert needed_libraries(shape(), best_kernels(HOPPER)) == [full]
    # Windows of two lengths run the same kernels.
    assert needed_libraries(shape((0, 512, 4096)), best_kernels(HOPPER)) == [full, windowed]


def test_each_decode_kernel_needs_its_library() -> None:
    xqa = [XqaLibrary(torch.bfloat16, 64, 128, 4, windowed) for windowed in (False, True)]
    assert needed_libraries(shape((0, 512)), [Kernel.XQA]) == xqa
    assert needed_libraries(shape((0, 512)), [Kernel.SPLIT_KV]) == []


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_architectures_need_one_fa2_library(capability: tuple[int, int]) -> None:
    assert needed_libraries(shape(), best_kernels(capability)) == [PlannedLibrary("fa2", torch.bfloat16, 128, False)]


def test_shapes_without_kernels_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="head_dim is 80"):
        check_supported(shape(head_dim=80))
    with pytest.raises(ConfigError, match="float32"):
        check_supported(shape(dtype=torch.float32))


@pytest.mark.parametrize(
    ("text", "capability", "arch"),
    [("9.0a", (9, 0), "9.0a"), ("9.0", (9, 0), "9.0a"), ("8.6", (8, 6), "8.6"), ("12.0", (12, 0), "12.0f")],
)
def test_architectures_are_read_and_completed(text: str, capability: tuple[int, int], arch: str) -> None:
    assert parse_arch(text) == capability
    assert arch_of(capability) == arch


@pytest.mark.parametrize("text", ["", "90a", "9", "9.0.0", "sm_90", "7.5", "8.0a", "9.0b"])
def test_architectures_that_cannot_be_meant_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="arch is"):
        parse_arch(text)
