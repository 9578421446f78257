"""What a reader of a quantised checkpoint is, and what several of them have in common."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol

from graphgen.ipc.errors import CheckpointError
from graphgen.models.checkpoint_files import StoredTensor
from graphgen.models.spec.formats import LinearFormat, ScaleDtype

if TYPE_CHECKING:
    from torch import Tensor

    from graphgen.models.formats.layout import Quantised

Parts = Mapping[str, StoredTensor]
"""Tensors of one module, by what follows the module's name."""

Tensors = Mapping[str, "Tensor"]
"""The same, read."""

SCALE_DTYPES: Mapping[str, ScaleDtype] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Safetensors' name of a dtype -> ours."""


class Reader(Protocol):
    """Of one quantization_config."""

    @property
    def taken(self) -> tuple[str, ...]:
        """Names, within a module, of tensors that belong to a quantised weight."""

    def expected(self, module: str) -> LinearFormat | None:
        """What the config alone says of a linear layer, for weights that nobody stored. None: it is not quantised."""

    def is_quantised(self, parts: Parts) -> bool:
        """Whether a module's tensors are a quantised weight."""

    def stored(self, module: str, parts: Parts) -> tuple[LinearFormat, tuple[int, int]]:
        """Format and shape (N, K) of a quantised weight, from the headers. Raises CheckpointError where a tensor is
        missing or has another shape than the rest says."""

    def read(self, module: str, form: LinearFormat, tensors: Tensors) -> "Quantised":
        """The weight. form: what `stored` said. tensors: those of `taken` that there are."""


def need(module: str, parts: Parts, name: str, *dtypes: str) -> StoredTensor:
    """Raises CheckpointError where the module has no such tensor, since codes without a scale mean nothing, or has it
    in another dtype than these; none named: in any."""
    if name not in parts:
        raise CheckpointError(
            f"tensor {module}.{name} is missing, though {module} is quantised: the checkpoint is incomplete, download"
            " it again"
        )
    tensor = parts[name]
    if dtypes and tensor.dtype not in dtypes:
        raise CheckpointError(
            f"tensor {module}.{name} in {tensor.file} has dtype {tensor.dtype}, its format has {' or '.join(dtypes)}:"
            " config.json and the weights are of different models"
        )
    return tensor


def need_matrix(module: str, parts: Parts, name: str, *dtypes: str) -> StoredTensor:
    """The same, of two dimensions."""
    tensor = need(module, parts, name, *dtypes)
    if len(tensor.shape) != 2:
        raise CheckpointError(
            f"tensor {module}.{name} in {tensor.file} has shape {list(tensor.shape)}, a weight has two dimensions:"
            " the checkpoint is damaged, download it again"
        )
    return tensor


def check_shape(module: str, name: str, tensor: StoredTensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise CheckpointError(
            f"tensor {module}.{name} in {tensor.file} has shape {list(tensor.shape)}, its weight asks for"
            f" {list(expected)}: config.json and the weights are of different models"
        )


def scale_dtype(module: str, name: str, tensor: StoredTensor) -> ScaleDtype:
    if tensor.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            f"tensor {module}.{name} in {tensor.file} has dtype {tensor.dtype}, supported are"
            f" {', '.join(SCALE_DTYPES)}: quantise the model again with scales in one of these"
        )
    return SCALE_DTYPES[tensor.dtype]


def is_among(module: str, names: list[str]) -> bool:
    """Whether a module is one of those named, lies in one of them, or fits a pattern with wildcards."""
    return any(
        module == name or module.startswith(f"{name}.") or f".{name}." in f".{module}." or fnmatchcase(module, name)
        for name in names
    )
