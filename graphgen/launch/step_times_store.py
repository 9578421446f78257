"""Where measured step times are kept between starts, and which of them belong to an engine.

Owns the file format and the key; never measures and never imports torch. The worker reads and writes tables here
(`graphgen.worker.step_timing`); `graphgen tune` asks for the path; `benchmarks.simulate` reads a file that came along.

    $GRAPHGEN_CACHE/step-times/<device>-<digest of the key>.json

A file that is damaged or says something else than its name promises is passed over with a warning: times can be
measured again, so a bad file never keeps an engine from starting.
"""

import importlib.metadata
import logging
import math
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta, Struct

from graphgen.base.caches import cache_root
from graphgen.base.version import __version__
from graphgen.ipc.errors import ConfigError
from graphgen.ipc.worker_messages import Bucket, BucketTime, StepTimeTable, WorkerReady
from graphgen.launch.launch_config import LaunchConfig
from graphgen.models.spec import ModelSpec, Norm, RopeSpec

FOLDER = "step-times"

THOROUGH_SOURCE = "measured by `graphgen tune`"
QUICK_SOURCE = "measured in a hurry at the first start"

logger = logging.getLogger("graphgen.step_times")


class StepTimesKey(Struct, frozen=True, forbid_unknown_fields=True):
    """What step times depend on. Equal keys: equal times."""

    device: str  # as torch names it; "cpu"
    cpu_threads: int | None  # None: all cores
    model: str  # architecture, layers x hidden size, digest of all that has to do with time
    dtype: str
    kv_format: str  # how keys and values are kept
    attention: str  # backend and kernels
    compiled: bool
    page_size: int
    buckets: str  # like "0+1 0+2 496+16"
    graphgen: str  # versions; of the others "" where the package is absent
    torch: str
    flashinfer: str

    @classmethod
    def of(cls, config: LaunchConfig, ready: WorkerReady) -> Self:
        """The key of a worker that is up."""
        return cls(
            device=ready.device,
            cpu_threads=config.cpu_threads if config.device == "cpu" else None,
            model=_describe_shape(config.spec) + (f", {config.num_ranks} ranks" if config.num_ranks > 1 else ""),
            dtype=config.dtype,
            kv_format=config.kv_format,
            # Where the kernels were found is part of the description, and changes nothing once they are loaded.
            attention=re.sub(r", kernels[^)]*", "", ready.attention),
            compiled=ready.compiled,
            page_size=ready.page_size,
            buckets=" ".join(map(str, ready.buckets)),
            graphgen=__version__,
            torch=_version("torch"),
            flashinfer=_version("flashinfer-python"),
        )

    @property
    def digest(self) -> str:
        """16 hex digits over all fields."""
        return _digest(msgspec.json.encode(self))


class StepTimesFile(Struct, frozen=True, forbid_unknown_fields=True):
    """The document: a StepTimeTable in words that a reader of the file understands, and where it comes from."""

    format: Literal[2]
    source: str
    date: str
    key: StepTimesKey
    decode_context: Annotated[int, Meta(ge=1)]
    prompt_start: Annotated[int, Meta(ge=0)]
    ms_per_decode_position: Annotated[float, Meta(ge=0)]
    ms_per_prompt_pair: Annotated[float, Meta(ge=0)]
    ms_per_chunk_position: Annotated[float, Meta(ge=0)]
    ms: dict[Annotated[str, Meta(pattern=r"^\d+\+\d+$")], Annotated[float, Meta(gt=0)]]  # of each bucket

    @classmethod
    def of(cls, key: StepTimesKey, table: StepTimeTable, source: str) -> Self:
        return cls(
            format=2,
            source=source,
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
            key=key,
            decode_context=table.decode_context,
            prompt_start=table.prompt_start,
            ms_per_decode_position=table.ms_per_decode_position,
            ms_per_prompt_pair=table.ms_per_prompt_pair,
            ms_per_chunk_position=table.ms_per_chunk_position,
            ms={str(time.bucket): time.milliseconds for time in table.times},
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises OSError, or ValueError for what is no such document or has times that are not finite or of no bucket.

        Rare buckets that were never captured have none.
        """
        file = msgspec.json.decode(path.read_bytes(), type=cls)
        if names := " ".join(name for name in file.ms if name not in file.key.buckets.split()):
            raise ValueError(f"{path} has times of {names}, its key has the buckets {file.key.buckets}: measure again")
        slopes = file.ms_per_decode_position, file.ms_per_prompt_pair, file.ms_per_chunk_position
        numbers = (*file.ms.values(), *slopes)
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{path} has a time that is not finite: measure again")
        return file

    @property
    def table(self) -> StepTimeTable:
        """What the cost model takes."""
        return StepTimeTable(
            times=tuple(BucketTime(_bucket_named(name), milliseconds) for name, milliseconds in self.ms.items()),
            decode_context=self.decode_context,
            prompt_start=self.prompt_start,
            ms_per_decode_position=self.ms_per_decode_position,
            ms_per_prompt_pair=self.ms_per_prompt_pair,
            ms_per_chunk_position=self.ms_per_chunk_position,
        )

    def encode(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"


def step_times_path(environment: Mapping[str, str], key: StepTimesKey) -> Path:
    """Where the table of this key lies, if it was ever stored. Raises ConfigError where no home folder is known."""
    device = re.sub(r"[^a-z0-9]+", "-", key.device.lower()).strip("-")
    return cache_root(environment) / FOLDER / f"{device}-{key.digest}.json"


def load_step_times(environment: Mapping[str, str], key: StepTimesKey) -> StepTimeTable | None:
    """The stored table of this key; None where there is none that can be believed."""
    try:
        path = step_times_path(environment, key)
        file = StepTimesFile.read(path)
    except FileNotFoundError:
        return None
    except (ConfigError, OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        logger.warning("stored step times cannot be used (%s): `graphgen tune` measures them again", error)
        return None
    if file.key != key:
        logger.warning("%s belongs to another engine (%s): `graphgen tune` measures again", path, file.key.device)
        return None
    return file.table


def stored_file(environment: Mapping[str, str], key: StepTimesKey, table: StepTimeTable) -> Path | None:
    """The file of this key, when it holds this very table."""
    return step_times_path(environment, key) if load_step_times(environment, key) == table else None


def save_step_times(
    environment: Mapping[str, str], key: StepTimesKey, table: StepTimeTable, source: str = THOROUGH_SOURCE
) -> Path | None:
    """Writes the table whole or not at all; returns the file, or None, with a warning, where none can be written."""
    content = StepTimesFile.of(key, table, source).encode()
    try:
        path = step_times_path(environment, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(content)
        partial.replace(path)
    except (ConfigError, OSError) as error:
        logger.warning("step times were measured and cannot be stored (%s): set GRAPHGEN_CACHE to a folder", error)
        return None
    return path


def _describe_shape(spec: ModelSpec) -> str:
    """Models that differ by their weights, their special tokens or their constants alone take the same time."""
    shape = msgspec.structs.replace(
        _without_constants(spec),
        initializer_std=0.0,
        kv_format=None,  # what is used of it is in the key
        max_position_embeddings=0,
        bos_token_id=None,
        eos_token_ids=(),
        dtype="",
    )
    digest = _digest(msgspec.json.encode(shape))
    return f"{spec.architecture} {spec.num_layers}x{spec.hidden_size} {digest}"


def _without_constants(part: Any) -> Any:
    """A part of a spec, of any type, without the numbers that change what is computed and not how long it takes."""
    match part:
        case Norm():
            return msgspec.structs.replace(part, eps=0.0)
        case RopeSpec():
            return RopeSpec(kind=part.kind)
        case msgspec.Struct():
            fields = {name: _without_constants(getattr(part, name)) for name in part.__struct_fields__}
            return type(part)(**fields)
        case tuple():
            return tuple(map(_without_constants, part))
        case _:
            return part


def _bucket_named(name: str) -> Bucket:
    prefill_rows, decode_rows = map(int, name.split("+"))
    return Bucket(prefill_rows, decode_rows)


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=8).hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
