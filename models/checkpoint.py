"""One way to read a checkpoint, whichever kind of file it lies in.

Owns the choice of the reader. What comes of any: a config in the keys of Hugging Face, and tensors by the names and in
the order of rows that Hugging Face's checkpoints have. Called by families/reader.py and loader.py, which do not know
which kind of file they read.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from graphgen.ipc.errors import CheckpointError
from graphgen.models.checkpoint_config import read_config, read_generation_eos
from graphgen.models.checkpoint_files import StoredTensor, has_weights, stored_tensors, weight_files
from graphgen.models.formats.quantised_tensors import WEIGHT, QuantisedTensors
from graphgen.models.formats.readers.table import open_reader, read_beside
from graphgen.models.gguf.checkpoint import GGUFCheckpoint
from graphgen.models.gguf.header import is_gguf
from graphgen.models.mxfp4 import BLOCKS, SCALES, unpack, unpacked_name, with_unpacked
from graphgen.models.vocabulary import count_tokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from graphgen.models.families.family import TensorNames
    from graphgen.models.formats.layout import Quantised


_QUANTIZATION = "quantization_config"


class Checkpoint(Protocol):
    """Reads when it is asked, and raises CheckpointError where it cannot. `names`: the family's, for files that have
    names of their own."""

    def config(self) -> dict[str, Any]:
        """What config.json says or would say."""

    def generation_eos(self) -> int | list[int] | None:
        """End-of-sequence ids that go before the config's; None where there are none."""

    def num_tokens(self) -> int | None:
        """Ids that the tokenizer has; None where that is not known. Rows of the head beyond them mean nothing."""

    def stored_tensors(self, names: "TensorNames") -> Mapping[str, StoredTensor]:
        """Every tensor by its name, without reading any. Needs no torch."""

    def quantised(self) -> QuantisedTensors | None:
        """The weights that have formats; None where a loader sees none."""

    def tensors(
        self, names: "TensorNames", device: "torch.device", dtype: "torch.dtype"
    ) -> Iterator[tuple[str, Path, "Tensor | Quantised"]]:
        """(name, file, tensor), one at a time, on the device. dtype: of those that torch has no dtype for."""


def open_checkpoint(location: str | Path, revision: str | None = None) -> Checkpoint:
    """Of a GGUF file, of a folder, or of a hub id, of which the config alone can be read. Reads nothing yet."""
    return GGUFCheckpoint(Path(location)) if is_gguf(location) else FolderCheckpoint(str(location), revision)


class FolderCheckpoint:
    """config.json, generation_config.json and safetensors files, in a folder."""

    def __init__(self, location: str, revision: str | None = None) -> None:
        self._location = location
        self._revision = revision

    def config(self) -> dict[str, Any]:
        config = read_config(self._location, self._revision)
        beside = None if config.get(_QUANTIZATION) else read_beside(Path(self._location))
        return config if beside is None else {**config, _QUANTIZATION: beside}

    def generation_eos(self) -> int | list[int] | None:
        return read_generation_eos(self._location, self._revision)

    def num_tokens(self) -> int | None:
        return count_tokens(Path(self._location))

    def stored_tensors(self, names: "TensorNames") -> Mapping[str, StoredTensor]:
        return with_unpacked(self._stored if self._quantised is None else self._quantised.shown())

    def quantised(self) -> QuantisedTensors | None:
        return self._quantised

    def tensors(
        self, names: "TensorNames", device: "torch.device", dtype: "torch.dtype"
    ) -> Iterator[tuple[str, Path, "Tensor | Quantised"]]:
        quantised, shown = self._quantised, self.stored_tensors(names)
        for file in self._files:
            with _opened(file, device) as tensors:
                for name in tensors.keys():  # noqa: SIM118  # safe_open is no mapping
                    module = None if quantised is None else quantised.module_of(name)
                    base = unpacked_name(name, self._stored)
                    if quantised is not None and module is not None:
                        if quantised.is_codes(name):
                            weight = quantised.read(module, lambda part: self._get(part, device))
                            yield f"{module}.{WEIGHT}", file, weight
                    elif base is None and name in shown:
                        yield name, file, tensors.get_tensor(name)
                    elif base is not None and name.endswith(BLOCKS):
                        yield base, file, unpack(tensors.get_tensor(name), self._get(base + SCALES, device), dtype)

    def _get(self, name: str, device: "torch.device") -> "Tensor":
        with _opened(self._stored[name].file, device) as tensors:
            tensor: Tensor = tensors.get_tensor(name)
            return tensor

    @cached_property
    def _quantised(self) -> QuantisedTensors | None:
        config = self.config()
        # Of a model that reads images too, it may stand with that of the text.
        nested = (part.get(_QUANTIZATION) for part in config.values() if isinstance(part, dict))
        own = config.get(_QUANTIZATION) or next((found for found in nested if found), None)
        reader = open_reader(own, self._location) if own else None
        return None if reader is None else QuantisedTensors(reader, self._stored_or_none())

    def _stored_or_none(self) -> Mapping[str, StoredTensor]:
        """Nothing where there are no weights, which the load format dummy does without."""
        return self._stored if Path(self._location).is_dir() and has_weights(Path(self._location)) else {}

    @cached_property
    def _stored(self) -> Mapping[str, StoredTensor]:
        return stored_tensors(self._files)

    @cached_property
    def _files(self) -> list[Path]:
        return weight_files(Path(self._location))


@contextmanager
def _opened(file: Path, device: "torch.device") -> Iterator[Any]:
    """safe_open's, whose methods have no types, hence Any."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file ({error}): download it again") from error
