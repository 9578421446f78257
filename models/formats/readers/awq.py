"""Weights as AutoAWQ writes them (quant_method "awq", version "gemm").

    qweight   int32 [K, N / 8], eight columns a word
    qzeros    int32 [groups, N / 8], packed alike
    scales    float16 [groups, N]

The four bits at 4 j of a word are those of column ORDER[j] of its eight. weight = (code - zero) * scale.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graphgen.models.formats.readers.reader import (
    Parts,
    Tensors,
    check_shape,
    is_among,
    need,
    need_matrix,
    scale_dtype,
)
from graphgen.models.formats.readers.values import flag, group_size, names_in, refuse, whole
from graphgen.models.spec.formats import LinearFormat, ScaleDtype

if TYPE_CHECKING:
    from torch import Tensor

    from graphgen.models.formats.layout import Quantised

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each column of eight is in ORDER."""


class AwqReader:
    """See reader.Reader."""

    taken = ("qweight", "qzeros", "scales")

    def __init__(self, group: int | None, ignored: list[str]) -> None:
        """group: columns of one scale; None: all."""
        self._group, self._ignored = group, ignored

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "AwqReader":
        version, bits = str(config.get("version", "gemm")).lower(), whole(config, "bits", "w_bit")
        if version != "gemm":
            raise refuse(f"AWQ's version {version!r}", "use a checkpoint of its version gemm")
        if bits != 4:
            raise refuse(f"AWQ of {bits} bits", "use one of 4 bits")
        if not flag(config, "zero_point", True):
            raise refuse("AWQ without zero points", "use a checkpoint with them")
        return cls(group_size(config, "group_size", "q_group_size"), names_in(config, "modules_to_not_convert"))

    def expected(self, module: str) -> LinearFormat | None:
        return None if is_among(module, self._ignored) else self._format("float16")

    def is_quantised(self, parts: Parts) -> bool:
        return "qweight" in parts

    def stored(self, module: str, parts: Parts) -> tuple[LinearFormat, tuple[int, int]]:
        num_columns, words = need_matrix(module, parts, "qweight", "I32").shape
        scales, num_rows = need(module, parts, "scales"), 8 * words
        form = self._format(scale_dtype(module, "scales", scales))
        groups = form.num_groups(num_columns)
        check_shape(module, "scales", scales, (groups, num_rows))
        check_shape(module, "qzeros", need(module, parts, "qzeros", "I32"), (groups, words))
        return form, (num_rows, num_columns)

    def read(self, module: str, form: LinearFormat, tensors: Tensors) -> "Quantised":
        from graphgen.models.formats.layout import Quantised

        codes, zeros = (_unpacked(tensors[name]).t().contiguous() for name in ("qweight", "qzeros"))
        return Quantised(form, codes, tensors["scales"].t().contiguous(), zeros)

    def _format(self, scales: ScaleDtype) -> LinearFormat:
        return LinearFormat(storage="int4", group=self._group, scale_dtype=scales, zeros=True)


def _unpacked(words: "Tensor") -> "Tensor":
    """[rows, 8 * words] uint8 in the order of the columns."""
    import torch

    as_bytes = words.contiguous().view(torch.uint8)
    eights = torch.stack((as_bytes & 15, as_bytes >> 4), dim=-1).flatten(1).unflatten(1, (-1, 8))
    ordered: Tensor = eights.index_select(2, torch.tensor(_PLACES, device=words.device))
    return ordered.flatten(1)
