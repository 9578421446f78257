"""Which safetensors files hold a checkpoint's weights, and what their headers say; without torch.

Owns the choice of the files and the comparison of two stored tensors. Never makes a tensor: the loader does. Called by
families/reader.py, whose spec says whether the head is the embedding, and by loader.py.

A safetensors file is the length of its header (8 bytes, little endian), the header in JSON, and the tensors' bytes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from msgspec import Struct

from graphgen.ipc.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
WHOLE_FILE = "model.safetensors"
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ADAPTER_PREFIX = "adapter_"
_CONSOLIDATED_PREFIX = "consolidated"
_CONVERT = (
    'python -c "from transformers import AutoModelForCausalLM as Model;'
    " Model.from_pretrained({folder!r}, dtype='auto').save_pretrained({folder!r})\""
)
"""Writes safetensors beside pickled weights, which transformers reads without running code."""
_COMPARED_BYTES = 2**24
"""Read at once while two tensors are compared."""


class StoredTensor(Struct, frozen=True):
    """Where a tensor's bytes lie."""

    file: Path
    dtype: str  # as safetensors names it: "F32", "BF16"
    shape: tuple[int, ...]
    begin: int  # first byte in the file
    end: int  # one past its last


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files: model.safetensors, else those the index names, else the only one there is.

    That is the order of transformers. Raises CheckpointError when there is none, or not all of them.
    """
    whole, index = folder / WHOLE_FILE, folder / INDEX_FILE
    if whole.exists():
        return [whole]
    if index.exists():
        return _indexed_files(index)
    others = (_ADAPTER_PREFIX, _CONSOLIDATED_PREFIX)
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith(others))
    if len(files) == 1:
        return files
    raise CheckpointError(_missing_files(folder, len(files)))


def has_weights(folder: Path) -> bool:
    """Whether there is any file that `weight_files` could mean."""
    return (folder / INDEX_FILE).exists() or any(folder.glob("*.safetensors"))


def stored_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Every tensor of the files by name, from their headers. Raises CheckpointError for an unreadable one."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with file.open("rb") as opened:
                header_len = int.from_bytes(opened.read(8), "little")
                data_begin, file_len = 8 + header_len, file.stat().st_size
                if data_begin > file_len:
                    raise ValueError(f"its header ends at byte {data_begin}, it has {file_len}")
                header: dict[str, Any] = json.loads(opened.read(header_len))
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = (data_begin + offset for offset in entry["data_offsets"])
                    if end > file_len:
                        raise ValueError(f"tensor {name!r} ends at byte {end}, it has {file_len}")
                    tensors[name] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), begin, end)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is not a readable safetensors file ({error}): download it again") from error
    return tensors


def are_equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether both hold the same bytes; tensors of unequal dtypes never do."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.begin)
        other.seek(second.begin)
        return _same_bytes(one, other, first.end - first.begin)


def _same_bytes(one: BinaryIO, other: BinaryIO, num_bytes: int) -> bool:
    while num_bytes > 0:
        size = min(_COMPARED_BYTES, num_bytes)
        if one.read(size) != other.read(size):
            return False
        num_bytes -= size
    return True


def _missing_files(folder: Path, num_files: int) -> str:
    if num_files:
        return f"{folder} has {num_files} safetensors files and no {INDEX_FILE}: download the index as well"
    if any(folder.glob(f"{_ADAPTER_PREFIX}*")):
        return (
            f"{folder} has only an adapter, which graphgen does not apply: merge it into its base model and save that"
        )
    pickled = sorted(file.name for pattern in _PICKLE_PATTERNS for file in folder.glob(pattern))
    if pickled:
        return (
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when they are read; graphgen reads"
            f" safetensors and GGUF files: convert it with `{_CONVERT.format(folder=str(folder))}`"
        )
    if consolidated := sorted(folder.glob(f"{_CONSOLIDATED_PREFIX}*")):
        return (
            f"{folder} has only {consolidated[0].name}, whose tensors have other names and another order of rows: take"
            f" {WHOLE_FILE} of the same model on the hub, or convert it with convert_mistral_weights_to_hf.py of"
            " transformers"
        )
    return (
        f"{folder} has no safetensors file: name a folder with {WHOLE_FILE} or its shards, or a GGUF file (pickled"
        " weights, *.bin, are not downloaded)"
    )


def _indexed_files(index: Path) -> list[Path]:
    try:
        weight_map: Mapping[str, str] = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a checkpoint index ({error!r}): download it again") from error
    for name in names:
        # The index comes from outside: it may name its neighbours and nothing else.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names the shard {name!r}: shards are safetensors files beside the index")
        if not (index.parent / name).exists():
            raise CheckpointError(f"shard {name} named by {index} is missing: download it")
    return [index.parent / name for name in names]
