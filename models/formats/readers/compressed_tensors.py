"""Weights as llm-compressor and others write them (quant_method "compressed-tensors").

    float-, int- and naive-quantized   weight            e4m3 or int8 [N, K]
                                       weight_zero_point int8, where the scheme is not symmetric
    pack-quantized                     weight_packed     int32 [N, ceil(K * bits / 32)]: code + 2^(bits - 1), the first
                                                         in the lowest bits
                                       weight_zero_point int32 [ceil(N * bits / 32), groups], packed along N alike
                                       weight_shape      int64 [2]
    all                                weight_scale      [1], [N, 1], [N, groups], or one for each block

    weight = (code - zero point) * scale

Which modules a scheme is for, `targets` and `ignore` say by name, by pattern (re:) or by class ("Linear").
"""

import re
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from graphgen.ipc.errors import CheckpointError
from graphgen.models.formats.readers.reader import Parts, Tensors, check_shape, need, need_matrix, scale_dtype
from graphgen.models.formats.readers.values import block_size, flag, names_in, refuse, section, whole
from graphgen.models.spec.formats import LinearFormat, ScaleDtype

if TYPE_CHECKING:
    from torch import Tensor

    from graphgen.models.formats.layout import Quantised

_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision", "dense")
_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "W8A16": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}},
    "W4A16": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}},
    "W4A16_ASYM": {
        "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": False}
    },
    "W8A8": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}, "input_activations": {"type": "int"}},
    "INT8": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}, "input_activations": {"type": "int"}},
    "FP8": {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}, "input_activations": {"type": "float"}},
    "FP8_DYNAMIC": {
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "input_activations": {"type": "float"},
    },
    "FP8_BLOCK": {
        "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        "input_activations": {"type": "float"},
    },
}
"""Schemes that a config may name instead of writing them out."""


class Scheme(Struct, frozen=True):
    """What one config group says of its modules."""

    targets: tuple[str, ...]
    bits: int
    is_float: bool
    strategy: str
    group: int | None
    rows: int
    symmetric: bool
    rounds_input: bool

    def format(self, scales: ScaleDtype) -> LinearFormat:
        """scales: dtype of groups' scales; others are kept in float32."""
        return LinearFormat(
            storage="e4m3" if self.is_float else "int8" if self.bits == 8 else "int4",
            group=self.group,
            rows=self.rows,
            scale_dtype=scales if self.group is not None and self.rows == 1 else "float32",
            zeros=not self.symmetric,
            activation="e4m3" if self.rounds_input else "model",
        )


class CompressedTensorsReader:
    """See reader.Reader."""

    taken = (
        *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"),
        *("input_scale", "input_zero_point"),  # inputs get scales of their own
    )

    def __init__(self, schemes: Sequence[Scheme], ignored: Sequence[str]) -> None:
        self._schemes, self._ignored = tuple(schemes), tuple(ignored)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "CompressedTensorsReader":
        _refuse_all_that_is_unknown(config)
        groups = section(config, "config_groups")
        return cls([_scheme(name, groups) for name in groups], names_in(config, "ignore"))

    def expected(self, module: str) -> LinearFormat | None:
        scheme = self._scheme_of(module)
        return None if scheme is None else scheme.format("bfloat16")

    def is_quantised(self, parts: Parts) -> bool:
        return "weight_packed" in parts or ("weight" in parts and parts["weight"].dtype in ("F8_E4M3", "I8"))

    def stored(self, module: str, parts: Parts) -> tuple[LinearFormat, tuple[int, int]]:
        scheme = self._scheme_of(module)
        if scheme is None:
            raise CheckpointError(
                f"{module} is quantised in {next(iter(parts.values())).file}, and no config group of its"
                " quantization_config is for it: correct targets and ignore there"
            )
        scale = need(module, parts, "weight_scale")
        form = scheme.format(scale_dtype(module, "weight_scale", scale))
        shape = _shape(module, parts, "F8_E4M3" if scheme.is_float else "I8")
        _check_scale(module, scheme, form, shape, scale.shape)
        if form.zeros:
            _check_zeros(module, parts, scheme, (shape[0], form.num_groups(shape[1])))
        return form, shape

    def read(self, module: str, form: LinearFormat, tensors: Tensors) -> "Quantised":
        from graphgen.models.formats.layout import Quantised, scale_shape

        scale, zeros = tensors["weight_scale"], tensors.get("weight_zero_point")
        if "weight_packed" in tensors:
            bits = 4 if form.storage == "int4" else 8
            num_rows, num_columns = (int(size) for size in tensors["weight_shape"].tolist())
            codes = _unpacked(tensors["weight_packed"], bits)[:, :num_columns]
            groups = form.num_groups(num_columns)
            if form.zeros and zeros is not None:
                zeros = _unpacked(zeros.t().contiguous(), bits).t()[:num_rows]
            if form.storage == "int8":
                codes = _signed(codes)
                zeros = None if zeros is None else _signed(zeros)
        else:
            codes = tensors["weight"]
            num_rows, num_columns = codes.shape
            groups = form.num_groups(num_columns)
            if form.storage == "int4":  # one signed code a byte
                codes = (codes.short() + 8).byte()
                zeros = None if zeros is None else (zeros.short() + 8).byte()
        shape = scale_shape(form, num_rows, num_columns)
        scale = _every(scale, shape).to(_dtype(form))
        zeros = _every(zeros, (num_rows, groups)) if form.zeros and zeros is not None else None
        return Quantised(form, codes, scale, zeros)

    def _scheme_of(self, module: str) -> Scheme | None:
        if any(_fits(module, name) for name in self._ignored):
            return None
        return next((one for one in self._schemes if any(_fits(module, name) for name in one.targets)), None)


def _shape(module: str, parts: Parts, codes: str) -> tuple[int, int]:
    """(N, K). codes: dtype of a weight that is not packed."""
    if "weight_packed" not in parts:
        rows, columns = need_matrix(module, parts, "weight", codes).shape
        return rows, columns
    # The words of a packed weight may not be full, so its shape is a tensor of its own.
    where = need(module, parts, "weight_shape")
    if (where.dtype, where.shape) != ("I64", (2,)):
        raise CheckpointError(
            f"tensor {module}.weight_shape is {where.dtype} {list(where.shape)}, not two of int64: download it again"
        )
    with where.file.open("rb") as file:
        file.seek(where.begin)
        rows, columns = struct.unpack("<qq", file.read(16))
    packed = need_matrix(module, parts, "weight_packed", "I32").shape
    if rows != packed[0] or not 0 < columns <= packed[1] * 32:
        raise CheckpointError(
            f"tensor {module}.weight_shape says {rows} x {columns}, its weight has {list(packed)} words"
        )
    return rows, columns


def _check_scale(
    module: str, scheme: Scheme, form: LinearFormat, shape: tuple[int, int], given: tuple[int, ...]
) -> None:
    rows, groups = -(-shape[0] // form.rows), form.num_groups(shape[1])
    if scheme.strategy == "tensor" and given in ((), (1,), (1, 1)):
        return
    if given not in ((rows, groups), (rows,) if groups == 1 else None):
        raise CheckpointError(
            f"tensor {module}.weight_scale has shape {list(given)}, a weight of {shape[0]} x {shape[1]} in {form.name}"
            f" has {rows} x {groups} scales: config.json and the weights are of different models"
        )


def _check_zeros(module: str, parts: Parts, scheme: Scheme, shape: tuple[int, int]) -> None:
    """shape: rows and groups of the weight."""
    if "weight_packed" in parts:
        zeros = need(module, parts, "weight_zero_point", "I32")
        check_shape(module, "weight_zero_point", zeros, (-(-shape[0] * scheme.bits // 32), shape[1]))
        return
    zeros = need(module, parts, "weight_zero_point", "I8")
    is_one = scheme.strategy == "tensor" and zeros.shape in ((), (1,), (1, 1))
    if not is_one and not (shape[1] == 1 and zeros.shape == shape[:1]):
        check_shape(module, "weight_zero_point", zeros, shape)


def _scheme(name: str, groups: Mapping[str, Any]) -> Scheme:
    if isinstance(groups[name], list):
        if name not in _PRESETS:
            raise refuse(f"the scheme {name!r}", f"known are {', '.join(_PRESETS)} and those that are written out")
        group: Mapping[str, Any] = {**_PRESETS[name], "targets": groups[name]}
    else:
        group = section(groups, name)
    weights, inputs = section(group, "weights"), section(group, "input_activations")
    if not weights:
        raise refuse(f"a config group {name!r} without weights", "use a checkpoint whose weights are quantised")
    bits, kind, strategy = whole(weights, "num_bits"), weights.get("type", "int"), weights.get("strategy")
    size = weights.get("group_size")
    strategy = strategy or ("tensor" if size is None else "channel" if size == -1 else "group")
    if (bits, kind) not in ((8, "float"), (8, "int"), (4, "int")):
        raise refuse(f"{bits} bits of type {kind}", "use FP8, INT8 or INT4 (W4A16)")
    if strategy not in ("tensor", "channel", "group", "block"):
        raise refuse(f"the strategy {strategy!r}", "use one with scales for each tensor, channel, group or block")
    if kind == "float" and not flag(weights, "symmetric", True):
        raise refuse("FP8 weights with zero points", "use symmetric ones")
    if weights.get("actorder") == "group":
        raise refuse("actorder 'group'", "use actorder 'static' or 'weight', whose groups are neighbours")
    if group.get("output_activations"):
        raise refuse("output_activations", "use a scheme without them")
    if inputs and inputs.get("type", "int") == "float" and inputs.get("num_bits", 8) != 8:
        raise refuse(f"activations of {inputs['num_bits']} bits", "use FP8 ones, or weights alone")
    rows, columns = block_size(weights, "block_structure") or (128, 128)
    return Scheme(
        targets=tuple(names_in(group, "targets")),
        bits=bits,
        is_float=kind == "float",
        strategy=strategy,
        group=whole(weights, "group_size") if strategy == "group" else columns if strategy == "block" else None,
        rows=rows if strategy == "block" else 1,
        symmetric=flag(weights, "symmetric", True),
        rounds_input=kind == "float" and bool(inputs),
    )


def _refuse_all_that_is_unknown(config: Mapping[str, Any]) -> None:
    formats = [
        config.get("format"),
        *(group.get("format") for group in section(config, "config_groups").values() if isinstance(group, Mapping)),
    ]
    for name in formats:
        if name is not None and name not in _FORMATS:
            raise refuse(f"the format {name!r} of compressed-tensors", f"known are {', '.join(_FORMATS)}")
    if section(config, "sparsity_config").get("format", "dense") != "dense":
        raise refuse("a sparsity_config", "use a checkpoint that is not sparse")
    if any(section(config, "transform_config").values()):
        raise refuse("a transform_config", "use a checkpoint without transforms of its weights")
    if (status := config.get("quantization_status", "compressed")) != "compressed":
        raise refuse(f"quantization_status {status!r}", "save it compressed")


def _fits(module: str, target: str) -> bool:
    """Every module that has a quantised weight is a linear layer."""
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in (module, "Linear")


def _unpacked(packed: "Tensor", bits: int) -> "Tensor":
    """[rows, columns] uint8 of 2^bits values each, as they are stored. packed: int32 [rows, words], contiguous."""
    import torch

    as_bytes = packed.view(torch.uint8)
    return as_bytes if bits == 8 else torch.stack((as_bytes & 15, as_bytes >> 4), dim=-1).flatten(1)


def _signed(codes: "Tensor") -> "Tensor":
    """Stored with 128 added."""
    import torch

    return (codes ^ 128).view(torch.int8) if codes.is_contiguous() else _signed(codes.contiguous())


def _every(values: "Tensor", shape: tuple[int, int]) -> "Tensor":
    """One number for all, or as many as there are."""
    return values.reshape(1, 1).expand(shape) if values.numel() == 1 else values.reshape(shape)


def _dtype(form: LinearFormat) -> Any:
    import torch

    return getattr(torch, form.scale_dtype)
