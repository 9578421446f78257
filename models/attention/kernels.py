"""Which of FlashInfer's compiled kernels a model needs on a device, and what FlashInfer calls them.

A library is known by the name FlashInfer gives it, which says everything it depends on but the version and the
architecture. Never loads or launches one: where libraries lie and how they are loaded or built is libraries.py's.
Called by it, by flashinfer.py and by `graphgen prebuild`, which needs no GPU.
"""

import re
from collections.abc import Sequence
from enum import IntEnum, StrEnum
from typing import Any, Literal

import torch
from msgspec import Struct

from graphgen.ipc.errors import ConfigError, UnsupportedModelError
from graphgen.models.attention.variant import Scoring

HEAD_DIMS = (64, 128, 256)
"""Head sizes that FlashInfer's kernels are written for."""
_LEAST_MAJOR = 8
_REMEDY = "use attention='torch'"
_SHORT_DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}


class Kernel(IntEnum):
    """Which kernel attends for a region."""

    FA2 = 0
    FA3 = 1
    XQA = 2
    SPLIT_KV = 3  # ours, in Triton: see split_kv.py
    TILES = 4  # ours, in Triton, for any scores: see row_tiles.py


class Scores(StrEnum):
    """What is done to scores that are scaled and masked; in FlashInfer each is a library of its own."""

    PLAIN = "plain"
    SOFTCAP = "a soft cap"
    SINKS = "sinks"
    ALIBI = "ALiBi slopes"

    @classmethod
    def of(cls, scoring: Scoring) -> "Scores":
        """Raises UnsupportedModelError for what FlashInfer has no library for."""
        present = [
            scores
            for scores, there in (
                (cls.SOFTCAP, bool(scoring.numbers.softcap)),
                (cls.SINKS, scoring.sinks is not None),
                (cls.ALIBI, scoring.alibi_slopes is not None),
            )
            if there
        ]
        if scoring.numbers.segment or len(present) > 1:
            what = "segments" if scoring.numbers.segment else " and ".join(present)
            raise UnsupportedModelError(f"the layers have {what}, FlashInfer has no library for that: use TILES")
        return present[0] if present else cls.PLAIN


class AttentionShape(Struct, frozen=True):
    """What the kernels are built for."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    windows: tuple[int, ...]  # the distinct sliding windows of the layers, 0 for full attention
    scores: Scores | None = Scores.PLAIN  # of all layers; None: of kinds that FlashInfer has no one library for


def check_supported(shape: AttentionShape) -> None:
    """Raises UnsupportedModelError or ConfigError for what FlashInfer's kernels cannot run; see Scores.of too."""
    if shape.dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(f"FlashInfer attends in bfloat16 or float16, dtype is {shape.dtype}: {_REMEDY}")
    if shape.head_dim not in HEAD_DIMS:
        raise UnsupportedModelError(f"head_dim is {shape.head_dim}, FlashInfer has {HEAD_DIMS}: {_REMEDY}")


def best_kernels(capability: tuple[int, int], scores: Scores | None = Scores.PLAIN) -> tuple[Kernel, Kernel]:
    """The fastest measured pair of a compute capability: FA3 reads a chunk twice as fast as FA2 on SM90, and the
    split-KV kernel needs no plan, reads KV at the speed of memory and lets padded rows off with a page. Chunks whose
    scores FlashInfer has no library for are left to our tiles."""
    if scores is None:
        return Kernel.TILES, Kernel.SPLIT_KV
    has_fa3 = capability[0] == 9 and scores is not Scores.ALIBI
    return (Kernel.FA3 if has_fa3 else Kernel.FA2), Kernel.SPLIT_KV


class PlannedLibrary(Struct, frozen=True):
    """Attention of ragged rows over paged KV, planned by the host."""

    backend: Literal["fa2", "fa3"]
    dtype: torch.dtype
    head_dim: int
    windowed: bool
    scores: Scores = Scores.PLAIN

    @property
    def name(self) -> str:
        """FlashInfer's name, known without its package. A version that forms another finds the library by that."""
        dtype, sm90 = _SHORT_DTYPES[self.dtype], "_sm90" if self.backend == "fa3" else ""
        of_all = (
            f"dtype_q_{dtype}_dtype_kv_{dtype}_dtype_o_{dtype}_dtype_idx_i32"
            f"_head_dim_qk_{self.head_dim}_head_dim_vo_{self.head_dim}"
        )
        if self.scores is Scores.SINKS:
            return f"batch_prefill_with_attention_sink_kv_cache_{of_all}_use_swa_{self.windowed}_{sm90}"
        return (
            f"batch_prefill_with_kv_cache_{of_all}_posenc_{self._position_encoding}_use_swa_{self.windowed}"
            f"_use_logits_cap_{self.scores is Scores.SOFTCAP}_f16qk_False{sm90}"
        )

    def spec(self) -> Any:  # FlashInfer is untyped
        """FlashInfer's JitSpec: name, paths and sources."""
        if self.scores is Scores.SINKS:
            from flashinfer.jit.attention.modules import gen_batch_prefill_attention_sink_module

            return gen_batch_prefill_attention_sink_module(*self._arguments())
        from flashinfer.jit.attention.modules import gen_batch_prefill_module

        return gen_batch_prefill_module(*self._arguments())

    def load(self) -> Any:
        """FlashInfer's Python around the module, which keeps it: later calls return the same. With sinks the module."""
        if self.scores is Scores.SINKS:
            return self.spec().build_and_load()
        from flashinfer.prefill import get_batch_prefill_module

        return get_batch_prefill_module(*self._arguments())

    @property
    def _position_encoding(self) -> int:
        """FlashInfer's PosEncodingMode: the model has applied the rotation."""
        return 2 if self.scores is Scores.ALIBI else 0

    def _arguments(self) -> tuple[Any, ...]:
        dtypes = (self.dtype, self.dtype, self.dtype, torch.int32)  # of q, KV, output and indices
        of_all = self.backend, *dtypes, self.head_dim, self.head_dim, self._position_encoding, self.windowed
        if self.scores is Scores.SINKS:
            return of_all
        no_fp16_qk = False
        return *of_all, self.scores is Scores.SOFTCAP, no_fp16_qk


class XqaLibrary(Struct, frozen=True):
    """Attention of one row per request, which reads block tables on the device."""

    dtype: torch.dtype
    page_size: int
    head_dim: int
    group: int  # query heads of one KV head
    windowed: bool

    def spec(self) -> Any:  # FlashInfer is untyped
        """FlashInfer's JitSpec: name, paths and sources."""
        from flashinfer.jit.xqa import gen_xqa_module

        return gen_xqa_module(*self._arguments())

    def load(self) -> Any:
        """FlashInfer's Python around the module. It is kept there: later calls return the same."""
        from flashinfer.xqa import get_xqa_module

        return get_xqa_module(*self._arguments())

    def _arguments(self) -> tuple[Any, ...]:
        rows_per_request = 1
        return (
            self.dtype,
            self.dtype,
            self.page_size,
            self.head_dim,
            self.group,
            self.windowed,
            self.dtype,
            rows_per_request,
        )


Library = PlannedLibrary | XqaLibrary


def needed_libraries(shape: AttentionShape, kernels: Sequence[Kernel]) -> list[Library]:
    """Every library that layers of this shape use with these kernels, each once."""
    libraries = [
        _library(shape, kernel, window > 0)
        for window in shape.windows
        for kernel in kernels
        if kernel not in (Kernel.SPLIT_KV, Kernel.TILES)  # Triton compiles them at their first launch
    ]
    return list(dict.fromkeys(libraries))


def _library(shape: AttentionShape, kernel: Kernel, windowed: bool) -> Library:
    if kernel is Kernel.XQA:
        group = shape.num_heads // shape.num_kv_heads
        return XqaLibrary(shape.dtype, shape.page_size, shape.head_dim, group, windowed)
    return planned_library(kernel, shape.dtype, shape.head_dim, windowed, shape.scores)


def planned_library(
    kernel: Kernel, dtype: torch.dtype, head_dim: int, windowed: bool, scores: Scores | None = Scores.PLAIN
) -> PlannedLibrary:
    """The library of a kernel that the host plans."""
    if scores is None:
        raise ConfigError(f"{kernel.name} has no library for these scores: use TILES")
    if kernel is Kernel.FA3 and scores is Scores.ALIBI:
        raise ConfigError(f"FA3 has no {scores}: use FA2")
    backends: dict[Kernel, Literal["fa2", "fa3"]] = {Kernel.FA2: "fa2", Kernel.FA3: "fa3"}
    return PlannedLibrary(backends[kernel], dtype, head_dim, windowed, scores)


# --- architectures ---------------------------------------------------------------------------------------------


def arch_of(capability: tuple[int, int]) -> str:
    """A compute capability as nvcc's architecture: from 9.0 on with the suffix that opens its own instructions."""
    major, minor = capability
    if major < 9:
        return f"{major}.{minor}"
    return f"{major}.{minor}f" if capability == (12, 0) else f"{major}.{minor}a"


def parse_arch(text: str) -> tuple[int, int]:
    """The compute capability of "9.0a" or "9.0". Raises ConfigError."""
    found = re.fullmatch(r"(\d+)\.(\d)([a-z]?)", text)
    if found is None:
        raise ConfigError(f"arch is {text!r}: write it like 8.0 or 9.0a")
    capability = int(found[1]), int(found[2])
    if capability[0] < _LEAST_MAJOR:
        raise ConfigError(f"arch is {text!r}, FlashInfer's kernels need {_LEAST_MAJOR}.0 or newer")
    if found[3] and text != arch_of(capability):
        raise ConfigError(f"arch is {text!r}, kernels are built for {arch_of(capability)}: use that")
    return capability
