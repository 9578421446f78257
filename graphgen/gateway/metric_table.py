"""Every metric of `GET /metrics`: its name, ours or vLLM's, its meaning, its labels, and where its numbers are.

The numbers are the frontend's and the engine's: a gateway counts nothing but its answers, which it reports to the
frontend, so that several gateways on one port show the same. Read by `graphgen.gateway.metrics`.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from graphgen.ipc.ggp.messages import Stats
from graphgen.ipc.ggp.statistics import BucketCount, EngineCount, Histogram, Metrics

Names = Literal["graphgen", "vllm"]
Value = float | Histogram
Labelled = Mapping[tuple[str, ...], Value]
"""By the values of its labels."""


class Series(NamedTuple):
    """One metric. The name of a counter ends with _total."""

    name: str
    values: Callable[[Stats, Metrics], Labelled]
    meaning: str
    labels: tuple[str, ...] = ()


def _one(name: str, value: Callable[[Stats, Metrics], Value], meaning: str) -> Series:
    """Without labels."""
    return Series(name, lambda stats, metrics: {(): value(stats, metrics)}, meaning)


def _histogram(name: str, key: str, meaning: str) -> Series:
    """key: in `metrics.histograms`."""
    return _one(name, lambda _, metrics: metrics.histograms[key], meaning)


def _by_name(counts: Mapping[str, int]) -> Labelled:
    return {(name,): count for name, count in counts.items()}


def _by_bucket(metrics: Metrics, value: Callable[[BucketCount], float]) -> Labelled:
    return {(f"{one.prefill_rows}+{one.decode_rows}",): value(one) for one in metrics.buckets}


def _usage(stats: Stats, _: Metrics) -> float:
    return (stats.pages_total - stats.pages_free) / stats.pages_total if stats.pages_total else 0.0


def _waiting(_: Stats, metrics: Metrics) -> Labelled:
    """Class 0 always, the others while somebody waits in them."""
    places = {"frontend": metrics.held_by_class, "scheduler": metrics.waiting_by_class or [0]}
    return {
        (place, str(priority)): count
        for place, counts in places.items()
        for priority, count in enumerate(counts)
        if count or not priority
    }


def _by_engine(stats: Stats, value: Callable[[EngineCount], float]) -> Labelled:
    """One engine is not told apart."""
    return {(str(number),): value(one) for number, one in enumerate(stats.engines)}


def _usage_of(engine: EngineCount) -> float:
    return (engine.pages_total - engine.pages_free) / engine.pages_total if engine.pages_total else 0.0


def _pages(stats: Stats, metrics: Metrics) -> Labelled:
    return {
        ("used",): stats.pages_total - stats.pages_free,
        ("cached",): metrics.pages_cached,
        ("free",): stats.pages_free - metrics.pages_cached,
    }


def _rows(_: Stats, metrics: Metrics) -> Labelled:
    return {("chunk",): metrics.chunk_rows, ("decode",): metrics.decode_rows, ("padding",): metrics.padding_rows}


def _http(_: Stats, metrics: Metrics) -> Labelled:
    """`PATH STATUS` of a report."""
    parted = {name.rpartition(" "): count for name, count in metrics.http_answers.items()}
    return {(path, status): count for (path, _space, status), count in parted.items()}


GAUGES = (
    _one("graphgen_engine_serves", lambda _, m: m.engine_serves, "1 while an engine serves, 0 while one is started."),
    _one("graphgen_requests_running", lambda s, _: s.running, "Samples that hold a slot."),
    Series(
        "graphgen_requests_waiting",
        _waiting,
        "Requests in the frontend, until their client's turn comes, and samples in the scheduler's queue, by class.",
        ("place", "priority"),
    ),
    _one("graphgen_kv_usage_ratio", _usage, "Share of the KV cache's pages that requests hold, 0 to 1."),
    Series(
        "graphgen_kv_pages",
        _pages,
        "Pages of the KV cache: used by requests, cached for prompts that may share them, free.",
        ("state",),
    ),
    Series(
        "graphgen_buckets",
        lambda _, m: {("captured",): m.buckets_captured, ("rare",): m.buckets_total - m.buckets_captured},
        "Shapes of steps that have a graph, and those that get one while the engine is idle or were given up.",
        ("state",),
    ),
    Series(
        "graphgen_replica_serves",
        lambda s, _: _by_engine(s, lambda one: one.serves),
        "1 while this engine of several serves, 0 while it is started or has drained.",
        ("engine",),
    ),
    Series(
        "graphgen_replica_requests_running",
        lambda s, _: _by_engine(s, lambda one: one.running),
        "Samples that hold a slot of this engine of several.",
        ("engine",),
    ),
    Series(
        "graphgen_replica_requests_waiting",
        lambda s, _: _by_engine(s, lambda one: one.waiting),
        "Samples in the queue of this engine of several.",
        ("engine",),
    ),
    Series(
        "graphgen_replica_kv_usage_ratio",
        lambda s, _: _by_engine(s, _usage_of),
        "Share of this engine's pages that requests hold, 0 to 1.",
        ("engine",),
    ),
    _one("graphgen_sessions", lambda s, _: s.sessions, "Sessions of the GGP/1 protocol, the gateways' included."),
    _one("graphgen_frontend_memory_bytes", lambda s, _: s.frontend_rss_bytes, "Memory of the frontend process."),
)

COUNTERS = (
    _one("graphgen_prompt_tokens_total", lambda _, m: m.prompt_tokens, "Prompt tokens of requests that got a token."),
    _one("graphgen_cached_prompt_tokens_total", lambda _, m: m.cached_tokens, "Of these, from the prefix cache."),
    _one("graphgen_output_tokens_total", lambda _, m: m.output_tokens, "Tokens of output."),
    Series(
        "graphgen_requests_total",
        lambda _, m: _by_name(m.requests),
        "Samples that ended, by finish reason, and requests that failed, by error code.",
        ("finish",),
    ),
    Series(
        "graphgen_http_requests_total",
        _http,
        "HTTP requests that were answered; with code 499 the client left before.",
        ("path", "code"),
    ),
    Series(
        "graphgen_targets_total",
        lambda _, m: _by_name(m.with_target),
        "What had a latency target: first tokens (ttft), gaps between two tokens (itl), mean gaps of samples (tpot).",
        ("target",),
    ),
    Series(
        "graphgen_target_misses_total",
        lambda _, m: _by_name(m.target_misses),
        "Of these, what came later than its target.",
        ("target",),
    ),
    _one("graphgen_steps_total", lambda s, _: s.steps, "Steps of the engine, or of all of them."),
    Series(
        "graphgen_replica_steps_total",
        lambda s, _: _by_engine(s, lambda one: one.steps),
        "Steps of this engine of several.",
        ("engine",),
    ),
    Series(
        "graphgen_step_rows_total",
        _rows,
        "Rows of all steps: tokens of prompts (chunk), decodes, and padding, which holds no token.",
        ("kind",),
    ),
    Series(
        "graphgen_bucket_steps_total",
        lambda _, m: _by_bucket(m, lambda one: one.steps),
        "Steps by the bucket that was chosen, as prefill rows + decode rows.",
        ("bucket",),
    ),
    Series(
        "graphgen_bucket_step_seconds_total",
        lambda _, m: _by_bucket(m, lambda one: one.ms / 1000),
        "Time of these steps on the device.",
        ("bucket",),
    ),
    _one("graphgen_graph_replays_total", lambda _, m: m.graph_replays, "Steps that replayed a captured graph."),
    _one("graphgen_eager_steps_total", lambda _, m: m.eager_steps, "Steps without a graph though there are graphs."),
    _one("graphgen_recompilations_total", lambda _, m: m.recompilations, "Compilations while the engine serves."),
    _one("graphgen_prefix_queries_total", lambda _, m: m.prefix_queries, "Prompt tokens of samples that started."),
    _one("graphgen_prefix_hits_total", lambda _, m: m.prefix_hits, "Of these, found in the prefix cache."),
    _one("graphgen_preemptions_total", lambda s, _: s.preemptions, "Times that a request had to wait again."),
    _one("graphgen_refused_total", lambda _, m: m.refused, "Samples that the scheduler refused for overload."),
    _one("graphgen_deadline_misses_total", lambda _, m: m.deadline_misses, "Samples that their deadline ended."),
    _one("graphgen_worker_restarts_total", lambda s, _: s.worker_restarts, "Workers that replaced a lost one."),
    _one("graphgen_poisoned_total", lambda s, _: s.poisoned, "Samples given up because workers died of them."),
    _one("graphgen_numerical_errors_total", lambda s, _: s.numerical_errors, "Samples whose logits were no numbers."),
    _one("graphgen_frontend_cpu_seconds_total", lambda s, _: s.frontend_cpu_s, "CPU time of the frontend process."),
)

HISTOGRAMS = (
    _histogram("graphgen_time_to_first_token_seconds", "ttft_s", "From a request's arrival to its first token."),
    _histogram("graphgen_inter_token_latency_seconds", "itl_s", "Gap between two tokens of a sample."),
    _histogram("graphgen_time_per_output_token_seconds", "tpot_s", "Mean gap of a sample that has ended."),
    _histogram("graphgen_request_seconds", "e2e_s", "From a request's arrival to its last token."),
    _histogram("graphgen_request_queue_seconds", "queue_s", "From its arrival to the plan of its first chunk."),
    _histogram("graphgen_request_prefill_seconds", "prefill_s", "From that plan to its first token."),
    _histogram("graphgen_request_decode_seconds", "decode_s", "From its first token to its last."),
    _histogram("graphgen_request_inference_seconds", "inference_s", "From that plan to its last token."),
    _histogram("graphgen_request_prompt_tokens", "prompt_tokens", "Prompt tokens of a request."),
    _histogram("graphgen_request_output_tokens", "output_tokens", "Tokens of output of a request, all samples'."),
    _histogram("graphgen_step_seconds", "step_s", "Time of a step on the device."),
)

_VLLM_REASONS = {"stop": "stop", "length": "length", "aborted": "abort"}
_VLLM_SERIES = {
    "graphgen_requests_waiting": _one(
        "vllm:num_requests_waiting", lambda s, _: s.waiting + s.held_requests, "Requests that wait."
    ),
    "graphgen_requests_total": Series(
        "vllm:request_success_total",
        lambda _, m: {(theirs,): m.requests.get(ours, 0) for ours, theirs in _VLLM_REASONS.items()},
        "Samples that ended, by reason.",
        ("finished_reason",),
    ),
}
"""Where more than the name is another."""
_VLLM_NAMES = {
    "graphgen_requests_running": "vllm:num_requests_running",
    "graphgen_kv_usage_ratio": "vllm:kv_cache_usage_perc",
    "graphgen_prompt_tokens_total": "vllm:prompt_tokens_total",
    "graphgen_output_tokens_total": "vllm:generation_tokens_total",
    "graphgen_prefix_queries_total": "vllm:prefix_cache_queries_total",
    "graphgen_prefix_hits_total": "vllm:prefix_cache_hits_total",
    "graphgen_preemptions_total": "vllm:num_preemptions_total",
    "graphgen_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "graphgen_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "graphgen_time_per_output_token_seconds": "vllm:request_time_per_output_token_seconds",
    "graphgen_request_seconds": "vllm:e2e_request_latency_seconds",
    "graphgen_request_queue_seconds": "vllm:request_queue_time_seconds",
    "graphgen_request_prefill_seconds": "vllm:request_prefill_time_seconds",
    "graphgen_request_decode_seconds": "vllm:request_decode_time_seconds",
    "graphgen_request_inference_seconds": "vllm:request_inference_time_seconds",
    "graphgen_request_prompt_tokens": "vllm:request_prompt_tokens",
    "graphgen_request_output_tokens": "vllm:request_generation_tokens",
}


def named(series: Series, names: Names, model: str) -> tuple[Series, dict[str, str]]:
    """A metric as it is called, and the labels that it has besides its own. With vLLM's names, what vLLM has not keeps
    ours: each metric has one name at a time."""
    if names == "graphgen":
        return series, {}
    theirs = _VLLM_SERIES.get(series.name)
    if theirs is None and series.name in _VLLM_NAMES:
        theirs = series._replace(name=_VLLM_NAMES[series.name])
    return (series, {}) if theirs is None else (theirs, {"model_name": model})
