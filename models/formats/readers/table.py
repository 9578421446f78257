"""Which reader a quantization_config needs; what has none is refused by name."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from graphgen.ipc.errors import CheckpointError, UnsupportedModelError
from graphgen.models.formats.kv_scheme import quantises_only_kv
from graphgen.models.formats.readers.awq import AwqReader
from graphgen.models.formats.readers.compressed_tensors import CompressedTensorsReader
from graphgen.models.formats.readers.fp8 import Fp8Reader
from graphgen.models.formats.readers.gptq import GptqReader
from graphgen.models.formats.readers.reader import Reader

_READERS: Mapping[str, Callable[[Mapping[str, Any]], Reader]] = {
    "fp8": Fp8Reader.of,
    "compressed-tensors": CompressedTensorsReader.of,
    "modelopt": Fp8Reader.of_modelopt,
    "awq": AwqReader.of,
    "gptq": GptqReader,
}
_OWN_LOADERS = ("mxfp4",)
"""Methods that checkpoint.py undoes for a family that says so."""
_ANOTHER = "use a checkpoint in one of these, or the unquantised one with --quantization fp8, int8 or int4"
_REMEDIES: Mapping[str, str] = {
    "bitsandbytes": "use the unquantised checkpoint with --quantization int8 or int4",
    "gguf": "name the GGUF file itself",
    "mxfp4": "it is read for gpt-oss alone; use the unquantised checkpoint",
    "nvfp4": "use an FP8 checkpoint of the same model, or the unquantised one with --quantization int4",
}

_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where else a quantization_config may stand, and of which method it is where it does not say so."""


def open_reader(config: Mapping[str, Any], where: str) -> Reader | None:
    """None for what a family's own loader undoes, and where the weights are not quantised. where: for the message.
    Raises UnsupportedModelError."""
    method = method_of(config)
    if method in _OWN_LOADERS or quantises_only_kv(config):
        return None
    if method not in _READERS:
        raise UnsupportedModelError(
            f"the weights of {where!r} are quantised ({method}), graphgen reads {', '.join(_READERS)}:"
            f" {_REMEDIES.get(method, _ANOTHER)}"
        )
    return _READERS[method](config)


def method_of(config: Mapping[str, Any]) -> str:
    """quant_method in small letters, with one name for each reader."""
    method = str(config.get("quant_method", "")).lower().replace("_", "-")
    inner = config.get("quantization")
    if not method and ("quant_algo" in config or (isinstance(inner, Mapping) and "quant_algo" in inner)):
        return "modelopt"
    return "modelopt" if method.startswith("modelopt") else method


def read_beside(folder: Path) -> dict[str, Any] | None:
    """A quantization_config that stands in a file of its own beside config.json; None where there is none."""
    for name, method in _FILES.items():
        path = folder / name
        if path.is_file():
            try:
                config = json.loads(path.read_bytes())
                if not isinstance(config, dict):
                    raise ValueError("it is no object")
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path} is not readable ({error}): download it again") from error
            return {"quant_method": method, **config}
    return None
