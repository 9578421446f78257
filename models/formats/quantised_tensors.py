"""A checkpoint's quantised weights as a loader sees them: one under the name of the weight that they mean.

Owns which of a checkpoint's tensors belong together; what they are worth, the readers know. Called by checkpoint.py.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from msgspec.structs import replace

from graphgen.ipc.errors import CheckpointError
from graphgen.models.checkpoint_files import StoredTensor
from graphgen.models.formats.readers.reader import Parts, Reader
from graphgen.models.spec.formats import LinearFormat

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from graphgen.models.formats.layout import Quantised

WEIGHT = "weight"


class QuantisedTensors:
    """Of one checkpoint."""

    def __init__(self, reader: Reader, stored: Mapping[str, StoredTensor]) -> None:
        """stored: every tensor of the checkpoint by its name."""
        self._reader = reader
        self._modules: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in stored.items():
            module, _, part = name.rpartition(".")
            self._modules.setdefault(module, {})[part] = tensor
        self._quantised = {name: parts for name, parts in self._modules.items() if reader.is_quantised(parts)}

    @cached_property
    def weights(self) -> Mapping[str, tuple[LinearFormat, StoredTensor]]:
        """Name of each quantised weight -> its format, and where it lies. Raises CheckpointError."""
        found = {}
        for module, parts in self._quantised.items():
            form, shape = self._reader.stored(module, parts)
            found[f"{module}.{WEIGHT}"] = form, replace(self._codes(parts), dtype=form.name, shape=shape)
        return found

    def expected(self, module: str) -> LinearFormat | None:
        """Of a linear layer whose weight nobody stored, as the config says."""
        return self._reader.expected(module)

    def shown(self) -> dict[str, StoredTensor]:
        """What a loader is to see: weights instead of their parts, and all other tensors."""
        shown = {name: tensor for name, (_, tensor) in self.weights.items()}
        for module, parts in self._modules.items():
            taken = self._reader.taken if module in self._quantised else ()
            for part, tensor in parts.items():
                if part not in taken:
                    shown[f"{module}.{part}" if module else part] = tensor
        return shown

    def module_of(self, name: str) -> str | None:
        """The module whose quantised weight the tensor is a part of."""
        module, _, part = name.rpartition(".")
        return module if module in self._quantised and part in self._reader.taken else None

    def is_codes(self, name: str) -> bool:
        """Whether it is that part of a quantised weight with which all of it is read."""
        module, _, part = name.rpartition(".")
        return module in self._quantised and self._quantised[module][part] is self._codes(self._quantised[module])

    def read(self, module: str, get: "Callable[[str], Tensor]") -> "Quantised":
        """get: a tensor by its name in the checkpoint. Raises CheckpointError for a scale that is no finite number,
        with which every logit would be none."""
        parts = self._quantised[module]
        tensors = {part: get(f"{module}.{part}") for part in parts if part in self._reader.taken}
        made = self._reader.read(module, self.weights[f"{module}.{WEIGHT}"][0], tensors)
        if not bool(made.scale.isfinite().all()):
            raise CheckpointError(
                f"a scale of {module} in {self._codes(parts).file} is not a finite number: the checkpoint is damaged,"
                " download it again"
            )
        return made

    @staticmethod
    def _codes(parts: Parts) -> StoredTensor:
        return max(parts.values(), key=lambda tensor: tensor.end - tensor.begin)
