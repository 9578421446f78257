"""The first start of an engine, ahead of it: on a machine that has the card, an engine is started once and ended.

Owns when that can be done, and the config of that engine: weights that are made up, since what a start compiles and
measures follows from their shapes, and every bucket captured, so that each has a time. What it leaves in the caches
folder is what any start leaves. Called by `graphgen prebuild`.
"""

import ctypes
from collections.abc import Callable

import msgspec
from msgspec import Struct

from graphgen.api.engine import Engine
from graphgen.ipc.errors import GraphgenError
from graphgen.ipc.worker_messages import WorkerReady
from graphgen.launch.config import EngineConfig
from graphgen.launch.devices import find_device
from graphgen.worker.ahead import Capability, capability_of


class FirstStart(Struct, frozen=True):
    """What became of it."""

    seconds: float  # 0.0 where no engine was started
    buckets_timed: int
    problem: str  # why none was started, or why it did not come to serve; "" if it did


Start = Callable[[EngineConfig], tuple[WorkerReady, float]]
"""Starts an engine and ends it: what its worker said, and the seconds until it was ready. Raises GraphgenError."""


def cards_here() -> list[Capability]:
    """The compute capability of each GPU that an engine may use here. Makes no CUDA context: an engine is to have all
    of the memory."""
    if find_device() == "cpu":
        return []
    driver = ctypes.CDLL("libcuda.so.1")
    found: list[Capability] = []
    while (capability := capability_of(driver, len(found))) is not None:
        found.append(capability)
    return found


def start_engine(config: EngineConfig) -> tuple[WorkerReady, float]:
    """See Start."""
    with Engine(config) as engine:
        return engine.info.worker, engine.start_s


def start_first(
    config: EngineConfig,
    target: Capability,
    cards: Callable[[], list[Capability]] = cards_here,
    start: Start = start_engine,
) -> FirstStart:
    """Starts the engine that this config describes, if it can serve here as it will. target: of the card it is for."""
    found = cards()
    if (problem := _find_problem(found, config.tensor_parallel, target)) is not None:
        return FirstStart(0.0, 0, problem)
    config = msgspec.structs.replace(
        config, load_format="dummy", tokenizer="none", captured_at_start="all", standby=False, replicas=1
    )
    try:
        worker, seconds = start(config)
    except GraphgenError as error:
        return FirstStart(0.0, 0, f"it did not start: {error}")
    return FirstStart(seconds, 0 if worker.step_times is None else len(worker.step_times.times), "")


def _find_problem(cards: list[Capability], num_ranks: int, target: Capability) -> str | None:
    if not cards:
        return "no GPU is here"
    if cards[0] != target:
        here, there = (".".join(map(str, one)) for one in (cards[0], target))
        return f"the GPU here has compute capability {here}, the one to build for {there}"
    if len(cards) < num_ranks:
        return f"{num_ranks} ranks need as many GPUs, {len(cards)} are here"
    return None
