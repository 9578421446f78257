"""A GGUF file as a checkpoint: its tensors by the names and in the order of rows that Hugging Face's have.

Owns the way back from what llama.cpp's converters did to each tensor. Quantised ones are dequantised with the package
gguf, some rows at a time. Called by models/checkpoint.py.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from graphgen.ipc.errors import CheckpointError
from graphgen.models.checkpoint_files import StoredTensor
from graphgen.models.gguf.architectures import Architecture
from graphgen.models.gguf.config import EMBEDDING, HEAD, architecture_of, config_of
from graphgen.models.gguf.header import GGUFHeader, GGUFTensor, read_header
from graphgen.models.gguf.scaling import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from graphgen.models.families.family import TensorNames

logger = logging.getLogger("graphgen.models")

_SLAB_BYTES = 2**26
"""Of dequantised rows at a time."""
_UNUSED = 5
"""Type of a token."""
_EXPERT = "{expert}"
"""In the canonical name of a tensor that each expert has."""
_DOTS_OF_ONE_EXPERT = 4
"""In the name of a tensor of files of before, which do not stack them: blk.0.ffn_up.5.weight."""
_READ_BY_CONFIG = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types that are no quantised ones -> torch's names."""


class GGUFCheckpoint:
    """See models/checkpoint.py."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def config(self) -> dict[str, Any]:
        return config_of(self._header, str(self._file))

    def generation_eos(self) -> None:
        """The config has all of them."""

    def num_tokens(self) -> int | None:
        """Without the unused ones at the end, with which converters fill the vocabulary up."""
        types = list(self._header.metadata.get("tokenizer.ggml.token_type", ()))
        while types and types[-1] == _UNUSED:
            types.pop()
        return len(types) or None

    def stored_tensors(self, names: "TensorNames") -> Mapping[str, StoredTensor]:
        return {
            name: StoredTensor(tensor.file, tensor.type, tensor.shape, tensor.begin, tensor.end)
            for name, tensor in self._named(names).items()
        }

    def quantised(self) -> None:
        """A loader sees dequantised weights."""

    def tensors(
        self, names: "TensorNames", device: "torch.device", dtype: "torch.dtype"
    ) -> Iterator[tuple[str, Path, "Tensor"]]:
        _check_installed(self._file)
        for name, tensor in self._named(names).items():
            yield name, tensor.file, self._canonical(tensor, device, dtype)

    @cached_property
    def _header(self) -> GGUFHeader:
        return read_header(self._file)

    @cached_property
    def _architecture(self) -> Architecture:
        return architecture_of(self._header, str(self._file))

    def _named(self, names: "TensorNames") -> dict[str, GGUFTensor]:
        """By canonical names. One without a place keeps its own, and the loader refuses it."""
        canonical = _canonical_names(names)
        named: dict[str, GGUFTensor] = {}
        for own, tensor in self._header.tensors.items():
            name = _canonical_name(own, canonical)
            if _EXPERT in name and tensor.name.count(".") == _DOTS_OF_ONE_EXPERT:
                named[name.replace(_EXPERT, own.split(".")[3])] = tensor
            elif _EXPERT in name:
                named |= {name.replace(_EXPERT, str(number)): part for number, part in enumerate(_unstacked(tensor))}
            elif own not in _READ_BY_CONFIG:
                named[name] = tensor
        return named

    def _canonical(self, tensor: GGUFTensor, device: "torch.device", dtype: "torch.dtype") -> "Tensor":
        weight = _read(tensor, device, dtype)
        kind = tensor.name.removeprefix("blk.").partition(".")[2].partition(".")[0]
        if self._architecture.pairs and kind in ("attn_q", "attn_k"):
            counts = self._header.metadata
            prefix = f"{counts['general.architecture']}.attention.head_count"
            num_heads = counts[prefix] if kind == "attn_q" else counts.get(f"{prefix}_kv", counts[prefix])
            return _halves(weight, num_heads)
        if self._architecture.norms_plus_one and tensor.name.endswith("norm.weight"):
            return weight - 1
        return weight


def _unstacked(tensor: GGUFTensor) -> Iterator[GGUFTensor]:
    """The matrix of each expert, which lie one behind the other."""
    count, *shape = tensor.shape
    each = (tensor.end - tensor.begin) // count
    for number in range(count):
        begin = tensor.begin + number * each
        yield msgspec.structs.replace(tensor, shape=tuple(shape), begin=begin, end=begin + each)


def _halves(weight: "Tensor", num_heads: int) -> "Tensor":
    """Rows of each head in halves, of which one turns into the other, from rows in pairs. Of a bias too."""
    pairs: Tensor = weight.unflatten(0, (num_heads, -1, 2))  # torch gives it no type
    return pairs.transpose(1, 2).flatten(0, 2)


def _check_installed(file: Path) -> None:
    """Raises CheckpointError where the package gguf is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"reading {file} needs the package gguf ({error}): pip install gguf, or graphgen with the extra gguf"
        ) from error


def _canonical_names(names: "TensorNames") -> dict[str, str]:
    """Name in a layer of a GGUF file, or of a tensor outside, without .weight and .bias -> the canonical one."""
    whole = {
        EMBEDDING.removesuffix(".weight"): names.embedding.removesuffix(".weight"),
        HEAD.removesuffix(".weight"): names.head.removesuffix(".weight"),
        "output_norm": names.final_norm,
    }
    layer = {
        "attn_norm": names.input_norm,
        "attn_output": names.o,
        "attn_q_norm": names.q_norm,
        "attn_k_norm": names.k_norm,
        "post_attention_norm": names.mixer_output_norm,
        "ffn_norm": names.ff_norm,
        "ffn_down": names.down,
        "post_ffw_norm": names.ff_output_norm,
        **dict(zip(("attn_q", "attn_k", "attn_v") if len(names.qkv) > 1 else ("attn_qkv",), names.qkv, strict=False)),
        **dict(zip(("ffn_gate", "ffn_up") if len(names.gate_up) > 1 else ("ffn_up",), names.gate_up, strict=False)),
        "ffn_gate_inp": names.experts.router.removesuffix(".weight"),
        **{
            stacked: each.removesuffix(".weight")
            for stacked, each in zip(
                ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
                (*names.experts.gate_up, names.experts.down),
                strict=False,
            )
        },
    }
    return {**whole, **{f"blk.{{layer}}.{name}": names.layer + canonical for name, canonical in layer.items()}}


def _canonical_name(name: str, names: Mapping[str, str]) -> str:
    """The given one where there is none."""
    stem, _, suffix = name.rpartition(".")
    parts = stem.split(".")
    of_one_expert = len(parts) == 4 and parts[3].isdecimal()
    if (len(parts) == 3 or of_one_expert) and parts[0] == "blk" and parts[1].isdecimal():
        canonical = names.get(f"blk.{{layer}}.{parts[2]}{'_exps' if of_one_expert else ''}")
        return name if canonical is None else f"{canonical.replace('{layer}', parts[1])}.{suffix}"
    return f"{names[stem]}.{suffix}" if stem in names else name


def _read(tensor: GGUFTensor, device: "torch.device", dtype: "torch.dtype") -> "Tensor":
    """A tensor of a type that torch has as it is, others dequantised into `dtype`."""
    import torch

    rows = math.prod(tensor.shape[:-1])
    row_bytes = (tensor.end - tensor.begin) // rows
    stored = np.memmap(tensor.file, np.uint8, "r", tensor.begin, (rows, row_bytes))
    if tensor.type in _PLAIN:
        plain = torch.from_numpy(np.array(stored)).view(getattr(torch, _PLAIN[tensor.type]))
        return plain.view(tensor.shape).to(device)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    weight = torch.empty((rows, tensor.shape[-1]), dtype=dtype, device=device)
    step = max(1, _SLAB_BYTES // (4 * tensor.shape[-1]))
    for first in range(0, rows, step):
        slab = dequantize(stored[first : first + step], GGMLQuantizationType[tensor.type])
        weight[first : first + step].copy_(torch.from_numpy(slab))
    return weight.view(tensor.shape)
