"""The header of a GGUF file: its metadata and where its tensors lie; without torch and without the package gguf.

Owns the layout of the file. Never reads a tensor. Called by gguf/checkpoint.py and by the reader of its tokenizer,
graphgen.requests.tokenizer_gguf: each process reads the header once, which takes 0.1 s for 150 000 tokens.

    "GGUF", version, number of tensors, number of metadata entries
    entries   name, type, value
    tensors   name, dimensions (the last of a row first), type, offset
    data      from the next multiple of general.alignment
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import itertools
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from graphgen.ipc.errors import CheckpointError

SUFFIX = ".gguf"
_VERSIONS = (2, 3)
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
"""Number of a type -> how a value lies."""
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2),
}
"""Number of a type that graphgen reads -> its name, elements of a block, bytes of one."""


class GGUFTensor(Struct, frozen=True):
    """Where a tensor's bytes lie."""

    name: str
    file: Path
    type: str  # a name of TENSOR_TYPES
    shape: tuple[int, ...]  # rows first
    begin: int  # first byte in the file
    end: int  # one past its last


class GGUFHeader(Struct, frozen=True):
    """Of a file, or of all files of a split model."""

    metadata: Mapping[str, Any]  # numbers, texts, booleans and lists of them
    tensors: Mapping[str, GGUFTensor]


def is_gguf(location: str | Path) -> bool:
    """Whether the name is one of a GGUF file."""
    return str(location).endswith(SUFFIX)


def read_header(file: Path) -> GGUFHeader:
    """Of a file; of a split model's first file, the tensors of all.

    Raises CheckpointError for what is no such file, is cut short, or has tensors of types that graphgen does not read.
    """
    files = _shards(file)
    headers = [_read_file(one) for one in files]
    tensors: dict[str, GGUFTensor] = {}
    for header in headers:
        tensors |= header.tensors
    return GGUFHeader(headers[0].metadata, tensors)


def _shards(file: Path) -> list[Path]:
    named = _SHARD.fullmatch(file.name)
    if named is None:
        return [file]
    count = int(named["count"])
    files = [file.with_name(f"{named['stem']}-{number + 1:05d}-of-{count:05d}.gguf") for number in range(count)]
    missing = [one.name for one in files if not one.exists()]
    if missing:
        raise CheckpointError(f"{file} is one of {count} files, and {missing[0]} is missing: download it")
    return files


def _read_file(file: Path) -> GGUFHeader:
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(file, data).header()
    except (OSError, ValueError, struct.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a readable GGUF file ({error}): download it again") from error


class _Reader:
    """A walk over the header. Raises ValueError and struct.error for one that is broken."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self._file = file
        self._data = data
        self._at = 0

    def header(self) -> GGUFHeader:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._number(4)
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}, supported are {', '.join(map(str, _VERSIONS))}, little endian")
        num_tensors, num_entries = self._number(10), self._number(10)
        metadata = {}
        for _ in range(self._count(num_entries)):
            name = self._text()
            metadata[name] = self._value(self._number(4))
        entries = [self._tensor() for _ in range(self._count(num_tensors))]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        tensors = [self._placed(start, *entry) for entry in entries]
        _check_apart(tensors)
        return GGUFHeader(metadata, {tensor.name: tensor for tensor in tensors})

    def _placed(self, start: int, name: str, shape: tuple[int, ...], number: int, offset: int) -> GGUFTensor:
        if number not in TENSOR_TYPES:
            raise CheckpointError(
                f"tensor {name!r} in {self._file} is of type {_type_name(number)}, supported are"
                f" {', '.join(kind for kind, _, _ in TENSOR_TYPES.values())}: take a file of one of these"
            )
        kind, block, block_bytes = TENSOR_TYPES[number]
        elements = 1
        for size in shape:
            elements *= size
        if not elements:
            raise ValueError(f"tensor {name!r} has the shape {list(shape)}, the least size is 1")
        if not shape or shape[-1] % block:
            raise ValueError(f"tensor {name!r} has the shape {list(shape)}, {kind} has rows of a multiple of {block}")
        begin = start + offset
        end = begin + elements // block * block_bytes
        if end > len(self._data):
            raise ValueError(f"tensor {name!r} ends at byte {end}, the file has {len(self._data)}")
        return GGUFTensor(name, self._file, kind, shape, begin, end)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dimensions = self._text(), self._number(4)
        if num_dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {num_dimensions} dimensions, the limit is {_MAX_DIMENSIONS}")
        shape = tuple(self._number(10) for _ in range(num_dimensions))[::-1]
        return name, shape, self._number(4), self._number(10)

    def _value(self, kind: int) -> Any:  # of any type that the file may hold
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._array()
        return self._scalar(kind)

    def _array(self) -> list[Any]:
        kind, count = self._number(4), self._count(self._number(10))
        if kind == _STRING:
            return self._texts(count)
        if kind == _ARRAY:
            return [self._array() for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a metadata type is {kind}")
        each = _SCALARS[kind]
        values = struct.unpack_from(f"<{count}{each.format[1:]}", self._data, self._at)
        self._at += each.size * count
        return list(values)

    def _scalar(self, kind: int) -> Any:
        if kind not in _SCALARS:
            raise ValueError(f"a metadata type is {kind}")
        (value,) = _SCALARS[kind].unpack_from(self._data, self._at)
        self._at += _SCALARS[kind].size
        return value

    def _number(self, kind: int) -> int:
        value: int = self._scalar(kind)
        return value

    def _count(self, count: int) -> int:
        """Of things that follow. A broken file must not make a list of them."""
        if count > len(self._data) - self._at:
            raise ValueError(f"{count} things follow byte {self._at}, the file has {len(self._data)}")
        return count

    def _text(self) -> str:
        size = self._count(self._number(10))
        begin = self._at
        self._at += size
        return self._data[begin : self._at].decode("utf-8")

    def _texts(self, count: int) -> list[str]:
        """As _text, without its calls: a vocabulary has a quarter of a million."""
        data, at, size_at, texts = self._data, self._at, _SCALARS[10].unpack_from, []
        for _ in range(count):
            begin = at + 8
            at = begin + size_at(data, at)[0]
            texts.append(data[begin:at].decode("utf-8"))
        if at > len(data):
            raise ValueError(f"a text ends at byte {at}, the file has {len(data)}")
        self._at = at
        return texts


def _check_apart(tensors: Sequence[GGUFTensor]) -> None:
    """Raises ValueError where two tensors have one name or share bytes."""
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise ValueError(f"two tensors are called {tensor.name!r}")
        names.add(tensor.name)
    for one, next_one in itertools.pairwise(sorted(tensors, key=lambda tensor: tensor.begin)):
        if next_one.begin < one.end:
            raise ValueError(
                f"tensor {next_one.name!r} begins at byte {next_one.begin}, tensor {one.name!r} ends at {one.end}"
            )


def _type_name(number: int) -> str:
    """As the package gguf calls it, where it is installed."""
    try:
        from gguf import GGMLQuantizationType

        return str(GGMLQuantizationType(number).name)
    except (ImportError, ValueError):
        return f"number {number}"
