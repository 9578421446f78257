"""Several engines, or several ranks of them, on one machine: which devices there are, and what each engine is told.

Pure but for the look at the machine. Called by whoever starts engines, before anything starts.
"""

import contextlib
import ctypes
import os
from pathlib import Path

import msgspec

from graphgen.ipc.errors import ConfigError
from graphgen.launch.config import EngineConfig
from graphgen.launch.devices import check_device, find_device
from graphgen.launch.launch_config import LaunchConfig

MOST_ON_CPU = 64
"""Workers that share the cores. Each takes hundreds of megabytes, so a slip of the hand would take the machine."""


def check_devices(config: EngineConfig) -> None:
    """Raises ConfigError for a device that can never be used here, and for more engines, or ranks of them, than there
    are devices. On the CPU they are bounded, too."""
    check_device(config.device)
    needed = config.replicas * config.tensor_parallel
    if needed == 1:
        return
    asked = " and ".join(
        f"{name} is {value}"
        for name, value in (("replicas", config.replicas), ("tensor_parallel", config.tensor_parallel))
        if value > 1
    )
    if config.device.startswith("cuda:"):
        raise ConfigError(
            f"{asked}, and device is {config.device!r}, which is one GPU: use device 'cuda', and choose the GPUs with"
            " CUDA_VISIBLE_DEVICES"
        )
    if _on_cpu(config):
        if needed > MOST_ON_CPU:
            raise ConfigError(f"{asked}, {needed} workers in all; on the CPU {MOST_ON_CPU} are the most: lower it")
        return
    num_devices = count_gpus()
    if needed > num_devices:
        holds = "engine" if config.tensor_parallel == 1 else "rank of an engine"
        raise ConfigError(
            f"{asked}, and there are {num_devices} GPUs here, each of which holds one {holds}: lower it, or make more"
            f" GPUs visible (CUDA_VISIBLE_DEVICES), {needed} in all"
        )


def count_gpus() -> int:
    """NVIDIA GPUs that a process started now may use. Makes no CUDA context and imports no torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    num_present = _count_present()
    if visible is None:
        return num_present
    count = 0
    for name in visible.split(","):  # the driver ignores what follows one that is not there
        name = name.strip()
        if not name or name == "-1" or (name.isdigit() and int(name) >= num_present):
            break
        count += 1
    return count


def _count_present() -> int:
    """By NVML, which sees what the container may use; by the device files where there is none."""
    with contextlib.suppress(OSError, AttributeError):
        nvml, count = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_uint()
        if nvml.nvmlInit_v2() == 0:
            try:
                if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0:
                    return count.value
            finally:
                nvml.nvmlShutdown()
    return len([*Path("/dev").glob("nvidia[0-9]*")]) or len([*Path("/dev").glob("dxg")])


def of_replica(launch: LaunchConfig, number: int, count: int) -> LaunchConfig:
    """What engine `number` of `count` is told: its devices, its ranks' share of the cores, a step log of its own."""
    num_workers = count * launch.num_ranks
    if num_workers == 1:
        return launch
    on_cpu = launch.device == "cpu"
    threads = launch.cpu_threads
    if on_cpu and threads is None:
        threads = _share_of_cores(num_workers)
    return msgspec.structs.replace(
        launch,
        device="cpu" if on_cpu else f"cuda:{number * launch.num_ranks}",
        cpu_threads=threads,
        step_log=launch.step_log if launch.step_log is None or count == 1 else f"{launch.step_log}.{number}",
    )


def alone(config: EngineConfig) -> EngineConfig:
    """One engine with what each of `config`'s replicas has, which is less than one has that was asked for alone: of
    the cores, on the CPU."""
    threads = config.cpu_threads
    if config.replicas > 1 and threads is None and _on_cpu(config):
        threads = _share_of_cores(config.replicas * config.tensor_parallel)
    return msgspec.structs.replace(config, replicas=1, cpu_threads=threads)


OF_FRONTENDS = frozenset(
    (
        *("model", "revision", "tokenizer", "chat_template", "generation_config", "max_model_len", "device"),
        *("itl_target_ms", "ttft_target_ms", "tpot_target_ms", "start_timeout_s", "progress"),
    )
)
"""What a frontend whose engines are elsewhere has to know; all else is told to the engines, where they are started."""


def of_frontend(config: EngineConfig) -> EngineConfig:
    """What a server is told that has no engine of its own. Raises ConfigError for what only an engine can be told."""
    default = EngineConfig()
    given = [
        name
        for name in EngineConfig.__struct_fields__
        if name not in OF_FRONTENDS and getattr(config, name) != getattr(default, name)
    ]
    if given:
        named = " and ".join(f"{name} is {getattr(config, name)!r}" for name in given)
        raise ConfigError(f"{named}, and the engines are elsewhere: tell them, where they are started")
    return msgspec.structs.replace(config, device="cpu")


def _on_cpu(config: EngineConfig) -> bool:
    return config.device == "cpu" or (config.device == "auto" and find_device() == "cpu")


def _share_of_cores(num_workers: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // num_workers)
