"""Weights in e4m3 as DeepSeek, Qwen and AutoFP8 publish them (quant_method "fp8"), and as ModelOpt does.

    weight                             e4m3 [N, K]
    weight_scale or weight_scale_inv   one number, [N], [N, 1], or one for each block: [ceil(N / R), ceil(K / C)], which
                                       ModelOpt writes as [N / R, 1, K / C, 1]
    input_scale                        of static activations: not needed, since inputs get a scale for each row

In spite of the name, a weight is code * scale_inv. One number for all becomes a scale for each row, so that the parts
of a fused layer need not agree on one.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from graphgen.ipc.errors import CheckpointError
from graphgen.models.formats.readers.reader import SCALE_DTYPES, Parts, Tensors, is_among, need, need_matrix
from graphgen.models.formats.readers.values import block_size, names_in, refuse, section
from graphgen.models.spec.formats import LinearFormat

if TYPE_CHECKING:
    from graphgen.models.formats.layout import Quantised

_SCALES = ("weight_scale_inv", "weight_scale")
_E4M3 = "F8_E4M3"


class Fp8Reader:
    """See reader.Reader."""

    taken = ("weight", *_SCALES, "input_scale", "activation_scale")

    def __init__(self, block: tuple[int, int] | None, ignored: list[str], rounds_input: bool = True) -> None:
        """block: rows and columns of one, where the config names such. rounds_input: whether inputs may be e4m3 too."""
        self._block, self._ignored = block, ignored
        self._rounds_input = rounds_input

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Fp8Reader":
        """quant_method "fp8"."""
        if (kind := config.get("fmt", "e4m3")) != "e4m3":
            raise refuse(f"fmt {kind!r}", "use a checkpoint in e4m3")
        return cls(
            block_size(config, "weight_block_size"), names_in(config, "ignored_layers", "modules_to_not_convert")
        )

    @classmethod
    def of_modelopt(cls, config: Mapping[str, Any]) -> "Fp8Reader":
        """quant_method "modelopt", in config.json or hf_quant_config.json."""
        inner = section(config, "quantization") or config
        kind = str(inner.get("quant_algo")).upper()
        if kind not in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"):
            raise refuse(f"quant_algo {kind} of ModelOpt", "use its FP8, or the unquantised checkpoint")
        ignored = names_in(inner, "exclude_modules", "ignore")
        block = (128, 128) if kind == "FP8_PB_WO" else None
        return cls(block, ignored, rounds_input=kind != "FP8_PB_WO")

    def expected(self, module: str) -> LinearFormat | None:
        if is_among(module, self._ignored):
            return None
        return self._format(*(self._block or (1, None)))

    def is_quantised(self, parts: Parts) -> bool:
        return "weight" in parts and parts["weight"].dtype == _E4M3

    def stored(self, module: str, parts: Parts) -> tuple[LinearFormat, tuple[int, int]]:
        weight = need_matrix(module, parts, "weight")
        name = next((name for name in _SCALES if name in parts), _SCALES[1])
        scale = tuple(size for size in need(module, parts, name, *SCALE_DTYPES, "F8_E8M0").shape if size != 1)
        rows, columns = weight.shape
        if scale in ((), (rows,)):
            return self._format(1, None), (rows, columns)
        block_rows, block_columns = self._block or (128, 128)
        blocks = -(-rows // block_rows), -(-columns // block_columns)
        if scale != tuple(size for size in blocks if size != 1):
            raise CheckpointError(
                f"tensor {module}.{name} in {weight.file} has shape {list(parts[name].shape)}, a weight of {rows} x"
                f" {columns} has one scale, {rows} of them, or {blocks[0]} x {blocks[1]} of blocks"
                f" {block_rows} x {block_columns}: correct weight_block_size, or download it again"
            )
        return self._format(block_rows, block_columns), (rows, columns)

    def read(self, module: str, form: LinearFormat, tensors: Tensors) -> "Quantised":
        from graphgen.models.formats.layout import Quantised, scale_shape

        codes, scale = tensors["weight"], next(tensors[name] for name in _SCALES if name in tensors).float()
        shape = scale_shape(form, *codes.shape)
        scale = scale.reshape(-1).expand(shape[0]) if scale.numel() == 1 else scale
        return Quantised(form, codes, scale.reshape(shape))

    def _format(self, rows: int, columns: int | None) -> LinearFormat:
        activation: Literal["model", "e4m3"] = "e4m3" if self._rounds_input else "model"
        return LinearFormat(storage="e4m3", rows=rows, group=columns, activation=activation)
