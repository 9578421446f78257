"""What a server counts and what it does now: the maps `metrics` and `live` of a `stats`.

Owns the types. Counts are of the frontend's life or, where the description says so, of the engine's; who reads them
takes differences. All clients' requests are in them, over whatever protocol they came.
"""

from typing import Annotated

from msgspec import Meta, Struct

from graphgen.ipc.ggp import limits

Count = Annotated[int, Meta(ge=0, le=limits.MAX_INT)]
Measured = Annotated[float, Meta(ge=0, le=limits.MAX_INT)]
"""What a server has measured. It has an upper end so that infinity does not decode either."""


class Histogram(Struct, frozen=True, kw_only=True):
    """How values are distributed: an item of `metrics.histograms`."""

    bounds: Annotated[list[Measured], Meta(description="Upper ends of the ranges, ascending; an end belongs to it.")]
    counts: Annotated[list[Count], Meta(description="Values in each range, and above the last: one more than bounds.")]
    sum: Annotated[Measured, Meta(description="Of all values.")]


class BucketCount(Struct, frozen=True, kw_only=True):
    """The steps that one bucket was chosen for: an item of `metrics.buckets`."""

    prefill_rows: Count
    decode_rows: Count
    steps: Annotated[Count, Meta(description="That have ended.")]
    ms: Annotated[Measured, Meta(description="On the device, of all of them.")]


class EngineCount(Struct, frozen=True, kw_only=True):
    """One of several engines: an item of `stats.engines`, by its number from 0 on."""

    serves: Annotated[bool, Meta(description="false: it is being started, or has drained; its counts are 0.")]
    running: Annotated[Count, Meta(description="Samples that hold a slot.")]
    waiting: Annotated[Count, Meta(description="Samples in its scheduler's queue.")]
    pages_free: Count
    pages_total: Count
    steps: Count
    finished: Count
    preemptions: Count
    worker_restarts: Count


class Metrics(Struct, frozen=True, kw_only=True):
    """Counts since the start, for a monitoring system: the value of `stats.metrics`."""

    engine_serves: Annotated[bool, Meta(description="false: it has ended and is started again; its counts are 0.")]
    prompt_tokens: Annotated[Count, Meta(description="Of requests that have a first token; of samples once.")]
    cached_tokens: Annotated[Count, Meta(description="Of those, found in the prefix cache.")]
    output_tokens: Count
    requests: Annotated[
        dict[str, Count], Meta(description="Samples that ended, by `done.finish`, or requests by `error.code`.")
    ]
    with_target: Annotated[
        dict[str, Count],
        Meta(
            description="What had a target: `ttft` first tokens, `itl` gaps between two tokens, `tpot` mean gaps, of"
            " samples with at least two tokens."
        ),
    ]
    target_misses: Annotated[
        dict[str, Count],
        Meta(
            description="Of these, later than the target; `tpot`: the mean gap of a sample is above `tpot_target_ms`."
        ),
    ]
    histograms: Annotated[
        dict[str, Histogram],
        Meta(
            description="Of requests: `ttft_s`, `queue_s`, `prefill_s`, `decode_s`, `inference_s`, `e2e_s`,"
            " `prompt_tokens`, `output_tokens`; of samples `tpot_s`; of tokens `itl_s`; of the engine's steps `step_s`."
        ),
    ]
    http_answers: Annotated[dict[str, Count], Meta(description="Of all gateways, by path and status: see `report`.")]
    held_by_class: Annotated[
        list[Count], Meta(description="Requests that wait for their client's turn, from class 0 on.")
    ]
    waiting_by_class: Annotated[list[Count], Meta(description="Samples in the scheduler's queue, from class 0 on.")]
    pages_cached: Annotated[Count, Meta(description="Of `pages_free`: those that the prefix cache keeps.")]
    chunk_rows: Annotated[Count, Meta(description="Of the engine's steps: rows that held a token of a prompt.")]
    decode_rows: Count
    padding_rows: Annotated[Count, Meta(description="Rows that held no token.")]
    buckets: Annotated[list[BucketCount], Meta(description="Of the engine; those that a step ran in.")]
    prefix_queries: Annotated[Count, Meta(description="Of the engine: prompt tokens of samples that were started.")]
    prefix_hits: Annotated[Count, Meta(description="Of those, found in the prefix cache.")]
    refused: Annotated[Count, Meta(description="Of the engine: samples turned away because of overload.")]
    deadline_misses: Annotated[Count, Meta(description="Of the engine: samples that their deadline ended.")]
    graph_replays: Annotated[Count, Meta(description="Of the engine: steps that replayed a captured graph.")]
    eager_steps: Annotated[Count, Meta(description="Steps without a graph on a device that has graphs.")]
    recompilations: Count
    buckets_captured: Annotated[Count, Meta(description="Of the engine: shapes of steps that have a graph.")] = 0
    buckets_total: Annotated[Count, Meta(description="With those that get one while the engine is idle.")] = 0


class Steps(Struct, frozen=True, kw_only=True):
    """Steps that have ended, column by column and in order: the value of `live.steps`."""

    ids: list[Count]
    chunk_rows: list[Count]
    decode_rows: list[Count]
    padding_rows: list[Count]
    ms: Annotated[list[Measured], Meta(description="On the device.")]
    ended_ms: Annotated[list[Measured], Meta(description="By a clock of the server; only differences mean something.")]


class OpenRequest(Struct, frozen=True, kw_only=True):
    """One open request, without a word of it and without who asked: an item of `live.requests`."""

    age_ms: Measured
    priority: int
    prompt_tokens: Annotated[Count, Meta(description="0 until it is tokenized.")]
    cached_tokens: Count
    output_tokens: Annotated[Count, Meta(description="Of all samples, so far.")]
    max_tokens: Annotated[Count, Meta(description="Of all samples, at most.")]
    itl_target_ms: Annotated[Measured | None, Meta(description="What no gap between two of its tokens should exceed.")]
    state: Annotated[str, Meta(description="`held` in the frontend, `waiting` for a first token, or `running`.")]


class Live(Struct, frozen=True, kw_only=True):
    """What the engine does now: the value of `stats.live`."""

    steps: Annotated[Steps, Meta(description="Those after `stats_request.live_after`, of the last few seconds.")]
    requests: Annotated[list[OpenRequest], Meta(description="The oldest ones.")]
