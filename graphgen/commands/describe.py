"""Why an engine is set up as it is: one sentence for each decision. Used by `graphgen info`."""

import importlib.metadata
import platform

import msgspec
from msgspec import Struct

from graphgen.base.version import __version__
from graphgen.ipc.engine_messages import Ready
from graphgen.ipc.ggp.messages import SamplingDefaults
from graphgen.ipc.worker_messages import TIMING_PHASE, Bucket, Phase, WorkerReady
from graphgen.launch.config import EngineConfig
from graphgen.launch.launch_config import LaunchConfig
from graphgen.models.spec import ModelSpec


class Decision(Struct, frozen=True):
    """One setting, its value and its reason."""

    what: str
    value: str
    why: str


class Info(Struct, frozen=True):
    """All that `graphgen info` tells."""

    versions: dict[str, str | None]  # by package; None: not installed
    decisions: list[Decision]
    buckets: tuple[Bucket, ...]
    phases: tuple[Phase, ...]
    start_s: float

    def as_objects(self) -> dict[str, object]:
        """For JSON, each value under its name: on the wire buckets and phases are arrays."""
        return {
            "versions": self.versions,
            "decisions": {one.what: {"value": one.value, "why": one.why} for one in self.decisions},
            "buckets": [msgspec.structs.asdict(bucket) for bucket in self.buckets],
            "phases": [msgspec.structs.asdict(phase) for phase in self.phases],
            "start_s": self.start_s,
        }


def installed_versions() -> dict[str, str | None]:
    """Of graphgen, Python and the packages that matter; None for one that is not installed."""
    versions: dict[str, str | None] = {"graphgen": __version__, "Python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "flashinfer-python", "pyzmq", "msgspec"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def decisions(config: EngineConfig, launch: LaunchConfig, ready: Ready) -> list[Decision]:
    """In the order in which one depends on the other."""
    worker, spec = ready.worker, launch.spec
    return [
        Decision("model", launch.model_path, _model_reason(config, launch)),
        _sampling_decision(config, launch),
        Decision("device", worker.device, _asked(config.device != "auto") or _device_reason(launch)),
        Decision(
            "dtype",
            launch.dtype,
            _asked(config.dtype != "auto") or _dtype_reason(launch),
        ),
        *_replicas_decision(config),
        *_ranks_decision(worker),
        Decision("attention", worker.attention, _asked(config.attention != "auto") or "the fastest that is installed"),
        Decision(
            "layer compiled",
            "yes" if worker.compiled else "no",
            _asked(config.compile is not None) or "by default on CUDA and not on the CPU",
        ),
        Decision(
            "steps are",
            "graph replays" if worker.graphs else "calls",
            _captured_reason(worker) if worker.graphs else "this device has no graphs",
        ),
        Decision(
            "token budget",
            str(ready.token_budget),
            _asked(config.token_budget is not None) or f"the default on {launch.device}",
        ),
        _step_times_decision(worker),
        Decision("requests at once", str(ready.num_slots), _running_reason(config, ready)),
        Decision(
            "max_model_len",
            str(launch.max_model_len),
            _asked(config.max_model_len is not None) or "max_position_embeddings of the model",
        ),
        Decision(
            "weights",
            f"{spec.rank_weight_bytes(launch.dtype, launch.num_ranks) / 2**20:.0f} MiB" + _each(launch),
            _weights_reason(config, launch),
        ),
        Decision("keys and values", launch.kv_format, _asked(config.kv_cache_dtype != "auto") or _kv_reason(spec)),
        Decision(
            "KV cache",
            f"{worker.num_pages} pages, {worker.page_bytes * worker.num_pages / 2**20:.0f} MiB" + _each(launch),
            (_asked(config.num_pages is not None) or "what the memory left after weights and buffers")
            + _page_reason(worker),
        ),
    ]


def _captured_reason(worker: WorkerReady) -> str:
    captured = len(worker.captured)
    if not worker.rare:
        return f"all {captured} are captured before the first request"
    return f"{captured} of {len(worker.buckets)} are captured before the first request, the others while nothing runs"


def _dtype_reason(launch: LaunchConfig) -> str:
    if launch.device != "cpu":
        return f"stored as {launch.spec.dtype}"
    return "what the CPU multiplies quantised weights with" if launch.spec.formats else "the CPU's"


def _weights_reason(config: EngineConfig, launch: LaunchConfig) -> str:
    """What is in which format, and why."""
    spec = launch.spec
    parameters = f"{spec.num_parameters:,} parameters in {launch.dtype}"
    if not spec.formats:
        return parameters
    counted = ", ".join(f"{count} linear layers in {form.name}" for form, count in spec.formats.items())
    why = _asked(config.quantization is not None) or "as the checkpoint has them"
    return f"{parameters}, but for {counted}: {why}"


def _kv_reason(spec: ModelSpec) -> str:
    return "kept as computed" if spec.kv_format is None else "the checkpoint asks for it"


def _replicas_decision(config: EngineConfig) -> list[Decision]:
    if config.replicas == 1:
        return []
    return [Decision("replicas", str(config.replicas), "you asked for it; all that is said here is of each engine")]


def _ranks_decision(worker: WorkerReady) -> list[Decision]:
    if worker.num_ranks == 1:
        return []
    return [Decision("ranks", str(worker.num_ranks), f"tensor_parallel; they add up with {worker.collectives}")]


def _each(launch: LaunchConfig) -> str:
    return " on each rank" if launch.num_ranks > 1 else ""


def _page_reason(worker: WorkerReady) -> str:
    """What the pages hold."""
    windows = [group.window for group in worker.page_groups]
    if windows == [None]:
        return f"; holds {worker.num_pages * worker.page_size:,} positions, {worker.page_size} a page"
    kept = ", ".join(f"{windows.count(one)} {one or 'all'}" for one in dict.fromkeys(windows))
    return f"; {worker.page_size} positions a page; page groups, and how many positions of a request they keep: {kept}"


def _sampling_decision(config: EngineConfig, launch: LaunchConfig) -> Decision:
    """What a request draws with that states nothing: the values that differ from those of a model without any."""
    plain = msgspec.structs.asdict(SamplingDefaults())
    own = {
        name: value for name, value in msgspec.structs.asdict(launch.sampling_defaults).items() if value != plain[name]
    }
    return Decision(
        "sampling defaults",
        ", ".join(f"{name} {value:g}" for name, value in own.items()) or "temperature 1, nothing else",
        _asked(config.generation_config != "auto")
        or ("the model's generation_config.json" if own else "the model's generation_config.json states no others"),
    )


def _step_times_decision(worker: WorkerReady) -> Decision:
    table = worker.step_times
    if table is None:
        return Decision("step times", "unknown", "`graphgen tune` measures them; until then they are learnt from steps")
    measured = any(phase.name == TIMING_PHASE for phase in worker.phases)
    return Decision(
        "step times",
        f"{table.times[0].milliseconds:.2f} to {max(time.milliseconds for time in table.times):.2f} ms",
        "measured at this start" if measured else "stored by `graphgen tune` or an earlier start",
    )


def _asked(was_asked: bool) -> str:
    return "you asked for it" if was_asked else ""


def _model_reason(config: EngineConfig, launch: LaunchConfig) -> str:
    chosen = "the embedded demo model, since none was named" if config.model is None else "you named it"
    return f"{chosen}; {launch.spec.architecture} with {launch.spec.num_layers} layers"


def _device_reason(launch: LaunchConfig) -> str:
    if launch.device == "cpu":
        return "no NVIDIA device with a driver and a CUDA build of torch was found"
    return "an NVIDIA device, its driver and a CUDA build of torch are present"


def _running_reason(config: EngineConfig, ready: Ready) -> str:
    if ready.num_slots == config.max_num_seqs:
        return "max_num_seqs"
    return f"less than max_num_seqs = {config.max_num_seqs}, so that prompts keep a quarter of the token budget"
