"""What the processes of an engine are told (LaunchConfig).

Owns the form of the launch file in the engine's folder. Chooses nothing: `graphgen.launch.resolve` makes a LaunchConfig
in the process that starts the engine, and the scheduler, the workers and a server's frontend read it from the file.
Imports no torch.
"""

import time
from pathlib import Path

import msgspec
from msgspec import Struct

from graphgen.ipc.engine_messages import ObjectiveName
from graphgen.ipc.ggp.messages import SamplingDefaults
from graphgen.models.spec import ModelSpec

LAUNCH_FILE = "launch.msgpack"


class LaunchConfig(Struct, frozen=True, kw_only=True):
    """What the processes need, resolved: what is left to choose, the device's memory or its libraries decide."""

    model_path: str  # a folder or a GGUF file
    spec: ModelSpec
    eos_token_ids: tuple[int, ...]
    sampling_defaults: SamplingDefaults  # of requests that state no values
    device: str  # "cpu", "cuda" or "cuda:N"; of several ranks the first one's
    dtype: str  # "float32", "bfloat16" or "float16"
    kv_format: str  # how keys and values are kept: the dtype, "fp8" or "int8"
    attention: str  # "auto", "flashinfer" or "torch"
    compile: bool
    load_format: str
    seed: int
    max_model_len: int
    num_slots: int  # requests that may run at once
    token_budget: int
    objective: ObjectiveName
    page_size: int
    num_pages: int | None  # None: the worker measures what the memory holds
    memory_fraction: float
    step_times: str  # "auto", "measure" or "off"
    captures_all: bool  # before the engine is ready; else rare buckets while nothing runs
    itl_target_ms: float | None  # of requests that state none
    ttft_target_ms: float | None
    tpot_target_ms: float | None
    step_log: str | None  # an absolute path
    cpu_threads: int | None
    prefix_cache: bool
    max_waiting: int  # requests
    max_waiting_tokens: int  # prompt tokens
    max_long_prompts: int
    start_timeout_s: float
    standby: bool
    needed_bytes: int = 0  # of the device, which the worker before this one used; 0: nobody knows
    num_ranks: int = 1  # that share the model

    @property
    def rank_spec(self) -> ModelSpec:
        """The sizes of what each rank has of the model."""
        return self.spec.shared_by(self.num_ranks)

    def device_of(self, rank: int) -> str:
        """The ranks of an engine have GPUs beside each other."""
        if self.device == "cpu" or self.num_ranks == 1:
            return self.device
        return f"cuda:{int(self.device.partition(':')[2] or 0) + rank}"

    def write(self, folder: Path) -> None:
        """Puts the file into `folder` in one rename, so that a reader sees all of it or nothing."""
        partial = folder / f"{LAUNCH_FILE}.partial"
        partial.write_bytes(msgspec.msgpack.encode(self))
        partial.rename(folder / LAUNCH_FILE)

    @classmethod
    def read(cls, folder: Path) -> "LaunchConfig":
        """Waits for the file. The Engine starts its processes first and reads the model's config while they import
        torch, so a child calls this after its imports; it waits as long as its watchdog lets it live."""
        path = folder / LAUNCH_FILE
        while not path.exists():
            time.sleep(0.01)
        return msgspec.msgpack.decode(path.read_bytes(), type=cls)
