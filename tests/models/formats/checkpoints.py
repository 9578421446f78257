"""Quantised checkpoints that tests write, and the same with every weight dequantised.

compressed-tensors packs with its own package. AutoGPTQ's and AutoAWQ's packages need a GPU or builds of their own: what
they write is packed here number by number, after the description of each format, and with nothing of graphgen's.
"""

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models import tiny
from tests.models.edits import WEIGHTS, edit_config


class Packed(NamedTuple):
    """One weight as a format stores it, and what it is worth."""

    tensors: Mapping[str, Tensor]  # by what follows the module's name
    worth: Tensor  # [N, K] float32


Pack = Callable[[str, Tensor], Packed | None]
"""(module, weight [N, K]) -> None: it is left as it is."""


class Pair(NamedTuple):
    """Folders of two checkpoints that mean the same."""

    quantised: Path
    plain: Path


def write(folder: Path, config: Mapping[str, Any], pack: Pack, /, *, case: str = "llama", **overrides: Any) -> Pair:
    """Every linear layer of the blocks, and the head, is offered to `pack`."""
    pair = Pair(folder / "quantised", folder / "plain")
    settings = json.dumps({"dtype": "float32", **overrides}, sort_keys=True)
    for own in pair:
        shutil.copytree(_saved(case, settings), own)
    quantised, plain = load_file(pair.quantised / WEIGHTS), load_file(pair.plain / WEIGHTS)
    for name in list(quantised):
        module = name.removesuffix(".weight")
        if name.endswith("_proj.weight") or name == "lm_head.weight":
            made = pack(module, quantised[name])
            if made is not None:
                del quantised[name]
                quantised |= {f"{module}.{part}": tensor.contiguous() for part, tensor in made.tensors.items()}
                plain[name] = made.worth.float().contiguous()
    save_file(quantised, pair.quantised / WEIGHTS, metadata={"format": "pt"})
    save_file(plain, pair.plain / WEIGHTS, metadata={"format": "pt"})
    edit_config(pair.quantised, quantization_config=config)
    return pair


@cache
def _saved(case: str, settings: str) -> Path:
    """Writing one with transformers takes longer than all else of a test."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    tiny.save(case, folder, **json.loads(settings))
    return folder


# --- fp8 -------------------------------------------------------------------------------------------------------


def in_fp8(weight: Tensor, rows: int | None, columns: int | None, name: str = "weight_scale") -> Packed:
    """A scale for each block of so many rows and columns; None: all of them."""
    rows, columns = rows or weight.shape[0], columns or weight.shape[1]
    counts = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    scale, codes = torch.empty(counts), torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    worth = torch.empty(weight.shape)
    for i in range(counts[0]):
        for j in range(counts[1]):
            block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scale[i, j] = weight[block].abs().max() / 448
            codes[block] = (weight[block] / scale[i, j]).to(torch.float8_e4m3fn)
            worth[block] = codes[block].float() * scale[i, j]
    return Packed({"weight": codes, name: scale}, worth)


# --- four and eight bits ---------------------------------------------------------------------------------------


class Codes(NamedTuple):
    """Numbers before they are packed."""

    codes: Tensor  # [N, K] int64, 0 up
    zeros: Tensor  # [N, groups] int64
    scales: Tensor  # [N, groups] float16
    groups: Tensor  # [K] int64: the group of each column

    @property
    def worth(self) -> Tensor:
        return (self.codes - self.zeros[:, self.groups]) * self.scales.float()[:, self.groups]


def rounded(weight: Tensor, bits: int, groups: Tensor, symmetric: bool) -> Codes:
    """groups: [K] of each column."""
    count, most = int(groups.max()) + 1, 2**bits - 1
    scales, zeros = torch.empty(len(weight), count), torch.empty(len(weight), count, dtype=torch.int64)
    for group in range(count):
        own = weight[:, groups == group]
        if symmetric:
            scales[:, group] = own.abs().amax(1) / (most // 2)
            zeros[:, group] = 2 ** (bits - 1)
        else:
            least = own.amin(1).clamp(max=0)
            scales[:, group] = (own.amax(1).clamp(min=0) - least) / most
            zeros[:, group] = (-least / scales[:, group]).round().clamp(0, most).long()
    halves = scales.half()
    codes = (weight / halves.float()[:, groups]).round().long() + zeros[:, groups]
    return Codes(codes.clamp(0, most), zeros, halves, groups)


def words_along_rows(numbers: Tensor, bits: int) -> Tensor:
    """[rows * bits / 32, columns] int32: the first number of a word in its lowest bits."""
    per_word = 32 // bits
    words = torch.zeros(len(numbers) // per_word, numbers.shape[1], dtype=torch.int64)
    for row, own in enumerate(numbers):
        words[row // per_word] |= own << bits * (row % per_word)
    return _int32(words)


def awq_words(numbers: Tensor) -> Tensor:
    """[rows, columns / 8] int32."""
    words = torch.zeros(len(numbers), numbers.shape[1] // 8, dtype=torch.int64)
    for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= numbers[:, column::8] << 4 * place
    return _int32(words)


def _int32(words: Tensor) -> Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).int()


def in_awq(weight: Tensor, group: int) -> Packed:
    made = rounded(weight, 4, torch.arange(weight.shape[1]) // group, symmetric=False)
    tensors = {"qweight": awq_words(made.codes.t()), "qzeros": awq_words(made.zeros.t()), "scales": made.scales.t()}
    return Packed(tensors, made.worth)


def in_gptq(
    weight: Tensor, bits: int, group: int, symmetric: bool, version: str = "gptq", order: Tensor | None = None
) -> Packed:
    """order: of the columns, in which their groups are cut; None: as they are. Zeros of version "gptq" are stored less
    1, and of symmetric weights they are what some published checkpoints have."""
    groups = torch.empty(weight.shape[1], dtype=torch.int64)
    groups[torch.arange(weight.shape[1]) if order is None else order] = torch.arange(weight.shape[1]) // group
    made = rounded(weight, bits, groups, symmetric)
    zeros = made.zeros if version == "gptq_v2" or symmetric else made.zeros - 1
    packed = words_along_rows(zeros.clamp(min=0), bits)  # along N
    tensors = {
        "qweight": words_along_rows(made.codes.t(), bits),
        "qzeros": packed.t(),
        "scales": made.scales.t(),
        "g_idx": groups.int(),
    }
    return Packed(tensors, made.worth)
