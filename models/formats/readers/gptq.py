"""Weights as AutoGPTQ and GPTQModel write them (quant_method "gptq").

    qweight   int32 [K * bits / 32, N]: along K, the first code in the lowest bits
    scales    float16 [groups, N]
    qzeros    int32 [groups, N * bits / 32]: along N. In the format "gptq" each was stored less 1, in "gptq_v2" as it is
    g_idx     int32 [K]: the group of each column

weight = (code - zero) * scale. Symmetric weights have the zero 2^(bits - 1), whatever qzeros holds: published ones hold
other numbers there. With desc_act columns of one group are not neighbours: they are put in the order of their groups,
and the layer's input is reordered.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graphgen.ipc.errors import CheckpointError
from graphgen.models.formats.readers.reader import Parts, Tensors, check_shape, need, need_matrix, scale_dtype
from graphgen.models.formats.readers.values import check_pattern, flag, group_size, refuse, section, whole
from graphgen.models.spec.formats import LinearFormat, ScaleDtype

if TYPE_CHECKING:
    from torch import Tensor

    from graphgen.models.formats.layout import Quantised

_VERSIONS = ("gptq", "gptq_v2")


class GptqReader:
    """See reader.Reader."""

    taken = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises UnsupportedModelError."""
        self._version = str(config.get("checkpoint_format") or "gptq")
        if self._version not in _VERSIONS:
            raise refuse(f"GPTQ's checkpoint_format {self._version!r}", f"known are {', '.join(_VERSIONS)}")
        overrides = section(config, "dynamic")
        self._config, self._overrides = config, {name: section(overrides, name) for name in overrides}
        for pattern in overrides:
            check_pattern("dynamic", pattern[2:] if pattern[:2] in ("-:", "+:") else pattern)
        self._settings_of("")

    def expected(self, module: str) -> LinearFormat | None:
        settings = self._settings_of(module)
        return None if settings is None or module.endswith("lm_head") else _format(settings, "float16")

    def is_quantised(self, parts: Parts) -> bool:
        return "qweight" in parts

    def stored(self, module: str, parts: Parts) -> tuple[LinearFormat, tuple[int, int]]:
        settings = self._settings_of(module)
        if settings is None:
            raise CheckpointError(f"{module} is quantised, and `dynamic` of its config says it is not: correct one")
        scales, words = need(module, parts, "scales"), need_matrix(module, parts, "qweight", "I32")
        per_word = 32 // settings["bits"]
        num_columns, num_rows = words.shape[0] * per_word, words.shape[1]
        form = _format(settings, scale_dtype(module, "scales", scales))
        groups = form.num_groups(num_columns)
        check_shape(module, "scales", scales, (groups, num_rows))
        if form.zeros:
            check_shape(module, "qzeros", need(module, parts, "qzeros", "I32"), (groups, num_rows // per_word))
        if form.permuted or "g_idx" in parts:
            check_shape(module, "g_idx", need(module, parts, "g_idx", "I32", "I64"), (num_columns,))
        return form, (num_rows, num_columns)

    def read(self, module: str, form: LinearFormat, tensors: Tensors) -> "Quantised":
        import torch

        from graphgen.models.formats.layout import Quantised

        bits = 4 if form.storage == "int4" else 8
        codes, zeros, permutation = _unpacked(tensors["qweight"].t(), bits), None, None
        if form.zeros:
            words = tensors["qzeros"]
            # A whole word at once: where 1 was taken from a zero of 0, it was borrowed from the next.
            words = words + _ONES[bits] if self._version == "gptq" else words
            zeros = _unpacked(words, bits).t().contiguous()
        if (groups := tensors.get("g_idx")) is not None and form.group is not None:
            order = torch.argsort(groups, stable=True)
            expected = torch.arange(len(groups), device=groups.device) // form.group
            if not torch.equal(groups[order].long(), expected):
                raise CheckpointError(
                    f"tensor {module}.g_idx does not deal the {len(groups)} columns into groups of {form.group}: the"
                    " checkpoint is damaged, or group_size is wrong"
                )
            if form.permuted:
                permutation, codes = order.int(), codes[:, order]
            elif not torch.equal(order, torch.arange(len(order), device=order.device)):
                raise CheckpointError(
                    f"tensor {module}.g_idx has columns in another order, and desc_act of the config is false: set it"
                )
        if form.storage == "int8":
            codes, zeros = _signed(codes), None if zeros is None else _signed(zeros)
        return Quantised(form, codes, tensors["scales"].t().contiguous(), zeros, permutation)

    def _settings_of(self, module: str) -> dict[str, Any] | None:
        """bits, group (None: all columns), symmetric and reordered of a module; None where it is left as it is."""
        config = dict(self._config)
        for pattern, changes in self._overrides.items():
            if pattern.startswith("-:"):
                if re.match(pattern[2:], module):
                    return None
            elif re.match(pattern.removeprefix("+:"), module):
                config |= changes
        bits, group = whole(config, "bits"), group_size(config, "group_size")
        if bits not in (4, 8):
            raise refuse(f"GPTQ of {bits} bits", "use one of 4 or 8 bits")
        return {
            "bits": bits,
            "group": group,
            "symmetric": flag(config, "sym", True),
            "reordered": flag(config, "desc_act", False) and group is not None,
        }


_ONES = {4: 0x11111111, 8: 0x01010101}
"""A word with 1 in each of its numbers."""


def _format(settings: Mapping[str, Any], scales: ScaleDtype) -> LinearFormat:
    return LinearFormat(
        storage="int4" if settings["bits"] == 4 else "int8",
        group=settings["group"],
        scale_dtype=scales,
        zeros=not settings["symmetric"],
        permuted=settings["reordered"],
    )


def _unpacked(words: "Tensor", bits: int) -> "Tensor":
    """[rows, words * 32 / bits] uint8. words: int32 [rows, words]."""
    import torch

    as_bytes = words.contiguous().view(torch.uint8)
    return as_bytes if bits == 8 else torch.stack((as_bytes & 15, as_bytes >> 4), dim=-1).flatten(1)


def _signed(codes: "Tensor") -> "Tensor":
    """Less 128."""
    import torch

    return (codes ^ 128).contiguous().view(torch.int8)
