"""Which device an engine gets that was told none, and whether this installation of torch can use one.

Looks at files, the driver's library and torch's version alone; imports no torch, which takes seconds. Called by
`graphgen.launch.resolve` and `graphgen.launch.replicas`.
"""

import ctypes
import importlib.util
import os
from pathlib import Path
from types import ModuleType

from graphgen.ipc.errors import ConfigError


def find_device() -> str:
    """CUDA where an NVIDIA device, its driver and a CUDA build of torch are present, else the CPU. Imports no torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "cpu"
    devices = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("dxg")]
    return "cuda" if devices and _has_driver() and _torch_has_cuda() else "cpu"


def check_device(device: str) -> None:
    """Raises ConfigError for a CUDA device that was asked for and that this installation of torch can never use."""
    if device not in ("auto", "cpu") and not _torch_has_cuda():
        raise ConfigError(f'device is {device!r}, torch here is built without CUDA: install a CUDA build or use "cpu"')


def _has_driver() -> bool:
    """Loads the driver's library as torch would, without initialising it."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _torch_has_cuda() -> bool:
    """Reads torch/version.py alone, which says what torch was built for: importing torch takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    spec = importlib.util.spec_from_file_location("_torch_version", Path(found.origin).with_name("version.py"))
    if spec is None or spec.loader is None:
        return False
    module = ModuleType("_torch_version")
    spec.loader.exec_module(module)
    return getattr(module, "cuda", None) is not None
