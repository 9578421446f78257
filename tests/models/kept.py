"""Pages of any format, made of pages that are not quantised, and what values become when they are stored and read."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graphgen.models.attention.pages import FP8, STORED_DTYPES, LayerPages, store, take
from graphgen.models.spec import kv_format

FORMATS = ("fp8", "int8")


def head_scales(num_heads: int) -> tuple[Tensor, Tensor]:
    """No powers of two, so that a scale that is left out or applied twice shows."""
    return torch.linspace(0.3, 1.7, num_heads), torch.linspace(2.3, 0.6, num_heads)


def kept_as(name: str, pages: LayerPages) -> LayerPages:
    """The same values in pages of that format; what is NaN stays so."""
    num_pages, page_size, num_heads, _ = pages.k.shape
    device = pages.k.device
    of_position = kv_format(name).scale_bytes > 0
    scales = (
        tuple(torch.full((num_pages, page_size, num_heads), torch.nan, device=device) for _ in range(2))
        if of_position
        else tuple(scales.to(device) for scales in head_scales(num_heads))
    )
    stored = [torch.zeros(pages.k.shape, dtype=STORED_DTYPES[name], device=device) for _ in range(2)]
    for tensor, scale, plain in zip(stored, scales, pages[:2], strict=True):
        store(tensor, scale, plain.flatten(0, 1), torch.arange(num_pages * page_size, device=device))
    return LayerPages(*stored, *scales)


def read_back(name: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [positions, Hkv, D] as they are read from pages of that format."""
    pages = kept_as(name, LayerPages(k[None], v[None]))
    return read(pages.k, pages.k_scales)[0], read(pages.v, pages.v_scales)[0]


def read(pages: Tensor, scales: Tensor | None) -> Tensor:
    """All pages, in float32."""
    return take(pages, scales, torch.arange(len(pages), device=pages.device), torch.float32)


def convert_fp8_as_a_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter of Triton 3.9 loses the carry of a mantissa that is rounded up, and knows no NaN."""
    import triton.language as tl
    from triton.runtime import interpreter  # Triton exists where it is installed

    plain = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:  # as Triton, numpy without types
        if target == tl.float8e4nv and source == tl.float32:
            numbers = torch.from_numpy(values.view(np.float32)).clamp(-480, 480).to(FP8)
            return numbers.view(torch.uint8).numpy().reshape(values.shape)
        if source == tl.float8e4nv and target == tl.float32:
            return torch.from_numpy(values.view(np.uint8)).view(FP8).float().numpy().view(np.uint32)
        return plain(values, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def splat_truth_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter of Triton 3.9 makes integers of a truth value that it repeats, and refuses them as a mask."""
    from triton.runtime import interpreter  # Triton exists where it is installed

    def splat(_: object, block: Any, value: Any) -> interpreter.TensorHandle:
        return interpreter.TensorHandle(np.full(block.shape, value.data.flat[0]), value.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_splat", splat)
