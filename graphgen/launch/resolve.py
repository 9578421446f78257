"""From what the user asks for to what the processes are told: every open choice, made once.

Owns the defaults that depend on the model or on the kind of device, and the checks that need them. Never loads weights,
never imports torch. Called by `graphgen.requests.core`, once when engines start, and by
`graphgen.commands.prebuild`.
"""

from pathlib import Path

from graphgen.capture.buckets import slots_for
from graphgen.ipc.engine_messages import ObjectiveName
from graphgen.ipc.errors import ConfigError
from graphgen.ipc.ggp.messages import SamplingDefaults
from graphgen.launch.config import EngineConfig
from graphgen.launch.devices import find_device
from graphgen.launch.launch_config import LaunchConfig
from graphgen.models.spec import (
    EXPERTS,
    LEAST_TILE,
    Latent,
    LinearFormat,
    LinearPlace,
    ModelSpec,
    format_at_load,
    kv_format,
)


def resolve(
    config: EngineConfig,
    spec: ModelSpec,
    model_path: Path,
    sampling_defaults: SamplingDefaults = SamplingDefaults(),  # noqa: B008  # frozen: a model that states none
) -> LaunchConfig:
    """Every choice that EngineConfig left open, made once. Raises ConfigError."""
    device = find_device() if config.device == "auto" else config.device
    on_cuda = device != "cpu"
    token_budget = config.token_budget or default_token_budget(config.objective, on_cuda)
    page_size = config.page_size or (64 if on_cuda else 16)
    max_model_len = _resolve_max_model_len(config, spec)
    spec = spec.within(max_model_len)
    compiles = on_cuda if config.compile is None else config.compile
    _check_num_pages(config.num_pages, page_size, min(token_budget, max_model_len))
    spec = spec.padded() if on_cuda and config.attention != "torch" else spec
    spec = _with_quantization(config, spec, on_cuda)
    dtype = _resolve_dtype(config, spec, on_cuda)
    spec.shared_by(config.tensor_parallel)  # raises where so many ranks cannot share it
    return LaunchConfig(
        model_path=str(model_path),
        spec=spec,
        eos_token_ids=tuple(spec.eos_token_ids),
        sampling_defaults=sampling_defaults,
        device=device,
        dtype=dtype,
        kv_format=_resolve_kv_format(config, spec, dtype),
        attention=config.attention,
        compile=compiles,
        load_format=config.load_format,
        seed=config.seed,
        max_model_len=max_model_len,
        # Decodes come first in every step: a cap on running requests is what keeps room for prompts.
        num_slots=slots_for(config.max_num_seqs, token_budget),
        token_budget=token_budget,
        objective=config.objective,
        page_size=page_size,
        num_pages=config.num_pages,
        memory_fraction=config.memory_fraction,
        step_times=config.step_times,
        captures_all=_resolve_captures_all(config, on_cuda),
        itl_target_ms=config.itl_target_ms,
        ttft_target_ms=config.ttft_target_ms,
        tpot_target_ms=config.tpot_target_ms,
        step_log=None if config.step_log is None else str(Path(config.step_log).absolute()),
        cpu_threads=config.cpu_threads,
        # With a rotation that depends on the length of the prompt, the keys of equal tokens are not equal.
        prefix_cache=config.prefix_cache and not spec.depends_on_length,
        max_waiting=config.max_waiting,
        max_waiting_tokens=config.max_waiting_tokens,
        max_long_prompts=config.max_long_prompts,
        start_timeout_s=config.start_timeout_s,
        # The compiler is most of what a worker imports.
        standby=compiles if config.standby is None else config.standby,
        num_ranks=config.tensor_parallel,
    )


def default_token_budget(objective: ObjectiveName, on_cuda: bool) -> int:
    """Rows of a step at most, where EngineConfig does not say."""
    if not on_cuda:
        return 256
    return 2048 if objective == "throughput" else 1024


def _with_quantization(config: EngineConfig, spec: ModelSpec, on_cuda: bool) -> ModelSpec:
    """The model with the formats that its linear layers have on the device."""
    kind = config.quantization
    if kind is None:
        return spec.with_formats(lambda _, place: _on_cuda(place) if on_cuda else _on_cpu(place.format))
    if spec.formats:
        given = ", ".join(form.name for form in spec.formats)
        raise ConfigError(
            f"quantization is {kind!r}, and the weights of this checkpoint are quantised already ({given}): leave it"
            " out, or take the checkpoint that is not quantised"
        )
    if kind == "fp8" and not on_cuda:
        raise ConfigError("quantization is 'fp8', which the CPU cannot multiply: use int8, which is nearer, or int4")
    spec = spec.with_formats(lambda _, place: format_at_load(kind, place.num_columns))
    return spec.with_formats(lambda _, place: _on_cuda(place)) if on_cuda else spec


def _on_cuda(place: LinearPlace) -> LinearFormat | None:
    """The tiles of experts cannot read every format, and a step has no room for matrices of all experts."""
    form = place.format
    if form is None or not place.name.startswith(EXPERTS):
        return form
    return form if form.tile_bytes(place.num_columns, LEAST_TILE) == LEAST_TILE else None


def _on_cpu(form: LinearFormat | None) -> LinearFormat | None:
    # The CPU has no product of e4m3, and making such a weight a matrix takes longer than the product itself.
    return None if form is not None and form.storage == "e4m3" else form


def _resolve_captures_all(config: EngineConfig, on_cuda: bool) -> bool:
    if config.captured_at_start == "auto":
        # The CPU has nothing to capture, and a thorough measurement is of all buckets.
        return not on_cuda or config.step_times == "measure"
    if config.captured_at_start == "essential" and config.step_times == "measure":
        raise ConfigError(
            "captured_at_start is 'essential' and step_times is 'measure', which measures every bucket before the"
            " engine is ready: leave one of them out"
        )
    return config.captured_at_start == "all"


def _resolve_dtype(config: EngineConfig, spec: ModelSpec, on_cuda: bool) -> str:
    if config.dtype == "float16" and not spec.float16:
        raise ConfigError(f"dtype is 'float16', whose range {spec.architecture} leaves: use bfloat16 or float32")
    if config.dtype != "auto":
        return config.dtype
    if not on_cuda:
        # What torch's products of quantised weights take.
        return "bfloat16" if spec.formats else "float32"
    return spec.dtype if spec.dtype == "bfloat16" or (spec.dtype == "float16" and spec.float16) else "bfloat16"


def _resolve_kv_format(config: EngineConfig, spec: ModelSpec, dtype: str) -> str:
    chosen = (spec.kv_format or dtype) if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    if not kv_format(chosen).quantised and chosen != dtype:
        raise ConfigError(
            f"kv_cache_dtype is {chosen!r}, dtype is {dtype!r}: keys and values are kept as they are computed"
            ' ("auto") or quantised ("fp8", "int8")'
        )
    if kv_format(chosen).quantised and any(isinstance(layer.mixer, Latent) for layer in spec.layers):
        raise ConfigError(
            f"kv_cache_dtype is {chosen!r}, this {spec.architecture} has latent attention, which keeps one latent for"
            f" all heads that is key and value in one: no kernel here reads it quantised, use kv_cache_dtype={dtype!r}"
        )
    return chosen


def _resolve_max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    if config.max_model_len is None:
        return spec.max_position_embeddings
    # Configs with scaled rotations often still state the length of before the scaling.
    unscaled = spec.max_position_embeddings
    limit = max(unscaled, *(int((rope.original_max_len or unscaled) * rope.factor) for rope in spec.ropes))
    if config.max_model_len > limit:
        raise ConfigError(f"max_model_len is {config.max_model_len}, the model's limit is {limit}: lower it")
    return config.max_model_len


def _check_num_pages(num_pages: int | None, page_size: int, least_positions: int) -> None:
    """Refuses a cache that does not hold one full step: prompts that users think of as short would never fit."""
    if num_pages is not None and num_pages * page_size < least_positions:
        raise ConfigError(
            f"num_pages is {num_pages}, which hold {num_pages * page_size} positions ({page_size} each), one full step"
            f" has {least_positions}: use {-(-least_positions // page_size)} pages or more, or leave it out for what"
            " the memory holds"
        )
