"""What the user asks for (EngineConfig).

Owns its defaults and the checks that need neither the model nor the device. Never loads weights, never imports torch.
Made by whoever starts an engine; `graphgen.launch.resolve` makes every choice that is left open, and the processes are
told the result, the LaunchConfig of `graphgen.launch.launch_config`.
"""

import math
from typing import ClassVar, Literal, TypedDict

import msgspec
from msgspec import Struct

from graphgen.base.keywords import KnownKeywords, type_problem
from graphgen.base.plain import plain_fields
from graphgen.capture.buckets import MIN_TOKEN_BUDGET
from graphgen.ipc.engine_messages import MAX_TARGET_MS, ObjectiveName
from graphgen.ipc.errors import ConfigError
from graphgen.models.spec import Quantization

_PAGE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class EngineConfig(Struct, frozen=True, kw_only=True, metaclass=KnownKeywords):
    """Everything an Engine can be told. None or "auto" leave the choice to the engine, which says what it chose.

    Raises ConfigError on a value that can work on no machine; what depends on the model or on the device is
    checked when the engine starts.
    """

    refused_with: ClassVar[type[Exception]] = ConfigError
    called: ClassVar[str] = "EngineConfig"

    model: str | None = None
    """Folder or Hugging Face id. None: the embedded demo model."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. None: its main branch."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; "none" serves token ids alone. None: the model's."""
    chat_template: str | None = None
    """File with a chat template (Jinja), or the name of one of the model's own. None: the model's default."""
    generation_config: Literal["auto", "none"] = "auto"
    """auto: sampling values that a request leaves out are those of the model's generation_config.json (temperature,
    top_k, top_p, min_p, repetition_penalty; do_sample false is temperature 0). none: they are 1, or off. Its
    end-of-sequence ids hold either way."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto: CUDA where a GPU and a CUDA build of torch are present, else the CPU."""
    replicas: int = 1
    """Engines that serve side by side, each with a scheduler and workers of its own: on CUDA each on its own GPUs, from
    cuda:0 on; on the CPU each with its part of the cores. A request goes where the beginning of its prompt is kept, or
    where there is least to do; when its engine ends it goes on at another."""
    tensor_parallel: int = 1
    """Ranks that share an engine's model, each a process with a GPU of its own, from cuda:0 on; on the CPU, with its
    part of the cores. Each has its part of the heads, of the feed-forwards' inner columns, of every expert and of the
    output's vocabulary, which it must divide but for the last."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on the CPU, bfloat16 there for quantised weights; on CUDA the checkpoint's, bfloat16 if that is
    float32."""
    quantization: Quantization | None = None
    """Weights of the layers are quantised as they are loaded: fp8 and int8 with a scale for each row, int4 with one for
    each 128 columns or fewer. Embedding and head stay as they are. None: as the checkpoint has them."""
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8", "int8"] = "auto"
    """How keys and values are kept. fp8: in half the memory of bfloat16, so that a cache holds twice the tokens and a
    step reads half the bytes; on a GPU it needs compute capability 8.9. int8: the same for any device, with a scale for
    each position and head. A dtype: as computed, it must be that of `dtype`. auto: fp8 where the checkpoint asks for
    it, else as computed."""
    max_model_len: int | None = None
    """Longest prompt and output together, in tokens. None: the model's own limit."""
    max_num_seqs: int = 256
    """Requests that run at once; fewer when prompts would keep less than a quarter of the token budget."""
    token_budget: int | None = None
    """Most token rows of one step. None: 1024 on CUDA, 2048 there with the objective throughput, 256 on the CPU. A step
    takes as many as the ITL target allows; without a target, as many as the objective does."""
    objective: ObjectiveName = "balanced"
    """How large steps are where requests state no target. latency: as few rows as compute 91 % of the best prompt
    tokens/s, which are 512 of an 8B model on an H200, so that gaps between tokens stay short. balanced: the same, and
    larger steps of up to 30 ms while a long queue of prompts waits. throughput: larger steps for shorter queues."""
    page_size: int | None = None
    """KV positions of a page, a power of two. None: 64 on CUDA, 16 on the CPU."""
    num_pages: int | None = None
    """Pages of the KV cache. None: what the device's memory holds."""
    memory_fraction: float = 0.9
    """Share of the device's memory that the engine may use in all, 0 < fraction <= 1."""
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    """auto and safetensors read the checkpoint; dummy makes random weights of the real shapes."""
    seed: int = 0
    """Of the random weights of the load format dummy; a request has a seed of its own, in SamplingParams."""
    progress: bool | None = None
    """Show progress bars while the engine starts; where there are none, phases are logged. None: on a terminal."""
    compile: bool | None = None
    """Compile the decoder layer with torch.compile. None: on CUDA, not on the CPU."""
    attention: Literal["auto", "flashinfer", "torch"] = "auto"
    """Attention backend. auto: FlashInfer on CUDA where it is installed."""
    step_times: Literal["auto", "measure", "off"] = "auto"
    """Where the scheduler's step times come from. auto: what `graphgen tune` stored for this device, model and buckets;
    else, on a device with graphs, a quick measurement at the first start. measure: a thorough one. Both are stored."""
    captured_at_start: Literal["auto", "essential", "all"] = "auto"
    """Buckets that are captured before the engine is ready. essential: a third of them, into which every step fits; the
    others follow one at a time while the engine has been idle for a second, and a request that arrives meanwhile waits
    for the one at hand, a tenth of a second with an 8B model on an H200. auto: essential on CUDA, all with the step
    times measure; the CPU has nothing to capture."""
    step_log: str | None = None
    """File that receives one JSON line per step. None: no log."""
    cpu_threads: int | None = None
    """Threads of one CPU operation in a worker. None: all cores, or its part of them where there are several."""
    itl_target_ms: float | None = None
    """Milliseconds that no gap between two tokens of a request should exceed, for requests that state no target of
    their own: steps are made no longer than that as far as measured step times tell. None: no target."""
    ttft_target_ms: float | None = None
    """Milliseconds from a request's arrival to its first token, for requests that state no target of their own: when it
    is near, steps grow beyond the efficient size, up to the token budget and the ITL target. None: no target."""
    tpot_target_ms: float | None = None
    """Milliseconds that the mean of the gaps between a request's tokens should not exceed, for requests that state no
    target of their own. Time that one is ahead of it may be spent on a longer step. None: no target."""
    prefix_cache: bool = True
    """Share the KV pages of equal beginnings of prompts. Always off for models whose rotation of a key depends on the
    length of the prompt (dynamic NTK)."""
    max_waiting: int = 2**16
    """Requests that may wait; more are refused with OverloadedError."""
    max_waiting_tokens: int = 2**26
    """Prompt tokens of all waiting requests; more are refused with OverloadedError."""
    max_long_prompts: int = 1
    """Prompts of more than eight full steps that are computed at the same time; the others of them wait."""
    start_timeout_s: float = 600.0
    """How long the start may take before it is given up, and that of a worker which replaces another."""
    standby: bool | None = None
    """Keep a second worker process that has imported everything and takes over when the worker dies: a pause without
    the imports for 150 to 300 MB of the host's memory. None: where layers are compiled."""

    def __post_init__(self) -> None:
        """The checks that need neither the model nor the device."""
        plain_fields(self)
        _check_types(self)
        if not (self.device in ("auto", "cpu", "cuda") or _is_cuda_index(self.device)):
            raise ConfigError(f'device is {self.device!r}: use "auto", "cpu", "cuda" or "cuda:N"')
        for name in (
            "max_model_len",
            "max_num_seqs",
            "num_pages",
            "replicas",
            "tensor_parallel",
            "cpu_threads",
            "max_waiting",
            "max_waiting_tokens",
            "max_long_prompts",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, the least is 1: raise it or leave it out")
        for name in ("itl_target_ms", "ttft_target_ms", "tpot_target_ms"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= MAX_TARGET_MS:
                limit = f"use milliseconds above 0 and up to {MAX_TARGET_MS:g}, or leave it out"
                raise ConfigError(f"{name} is {value}: {limit}")
        if self.token_budget is not None and self.token_budget < MIN_TOKEN_BUDGET:
            raise ConfigError(f"token_budget is {self.token_budget}, the least is {MIN_TOKEN_BUDGET}: raise it")
        if self.page_size is not None and self.page_size not in _PAGE_SIZES:
            raise ConfigError(f"page_size is {self.page_size}: use a power of two from 1 to {_PAGE_SIZES[-1]}")
        if not 0.0 < self.memory_fraction <= 1.0:
            raise ConfigError(f"memory_fraction is {self.memory_fraction}: use a value above 0 and up to 1")
        if not (self.start_timeout_s > 0 and math.isfinite(self.start_timeout_s)):
            raise ConfigError(f"start_timeout_s is {self.start_timeout_s}: use a positive number of seconds")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}: use an integer from 0 to 2**63 - 1")


class EngineSettings(TypedDict, total=False):
    """The fields of EngineConfig as keyword arguments, for type checkers and editors."""

    model: str | None
    revision: str | None
    tokenizer: str | None
    chat_template: str | None
    generation_config: Literal["auto", "none"]
    device: str
    replicas: int
    tensor_parallel: int
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    quantization: Quantization | None
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8", "int8"]
    max_model_len: int | None
    max_num_seqs: int
    token_budget: int | None
    objective: ObjectiveName
    page_size: int | None
    num_pages: int | None
    memory_fraction: float
    load_format: Literal["auto", "safetensors", "dummy"]
    seed: int
    progress: bool | None
    compile: bool | None
    attention: Literal["auto", "flashinfer", "torch"]
    step_times: Literal["auto", "measure", "off"]
    captured_at_start: Literal["auto", "essential", "all"]
    step_log: str | None
    cpu_threads: int | None
    itl_target_ms: float | None
    ttft_target_ms: float | None
    tpot_target_ms: float | None
    prefix_cache: bool
    max_waiting: int
    max_waiting_tokens: int
    max_long_prompts: int
    start_timeout_s: float
    standby: bool | None


def make_config(model: str | EngineConfig | None, settings: EngineSettings) -> EngineConfig:
    """The config of `Engine(model, **settings)`. Raises ConfigError when something is given twice."""
    if isinstance(model, EngineConfig):
        if settings:
            raise ConfigError(f"both an EngineConfig and {', '.join(settings)} were given: put all into EngineConfig")
        return model
    if model is not None and "model" in settings:
        raise ConfigError(f"model is given twice, as {model!r} and {settings['model']!r}: give it once")
    if model is not None:
        settings = {**settings, "model": model}
    return EngineConfig(**settings)


def _is_cuda_index(device: str) -> bool:
    kind, _, index = device.partition(":")
    return kind == "cuda" and index.isascii() and index.isdigit()


def _check_types(config: EngineConfig) -> None:
    for field in msgspec.structs.fields(EngineConfig):
        value = getattr(config, field.name)
        if (problem := type_problem(value, field.type)) is not None:
            raise ConfigError(f"{field.name} is {value!r}: {problem}")
