"""What the router says to an engine and hears of it, in the words of GGP/1: for engines that are servers elsewhere.

Pure. Called by `graphgen.router.remote_link`.
"""

import hashlib
import time
from array import array

from graphgen.calls.sampling_params import SamplingParams
from graphgen.calls.structured import to_wire
from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.engine_messages import BucketSteps, EngineStats, Ready, StepSummary, Submit, TokenOutput
from graphgen.ipc.ggp.limits import MAX_DURATION_MS, MAX_TENANT_LEN
from graphgen.ipc.ggp.messages import (
    Delta,
    Generate,
    Sampling,
    Stats,
)
from graphgen.ipc.ggp.routing import Capacity, Load, Routed
from graphgen.ipc.ggp.statistics import BucketCount, Live
from graphgen.ipc.reports import EngineReport
from graphgen.ipc.worker_messages import Bucket, PageGroup, SamplerParams, WorkerReady
from graphgen.requests.open_request import OpenRequest


def generate_of(request: OpenRequest, wire_id: int, eos_token_ids: frozenset[int]) -> Generate:
    """The message that opens a request at a server, behind the tokens that it has. eos_token_ids: the server's."""
    submit = request.submit
    age_ms = max(0.0, time.monotonic() - submit.arrived_s) * 1000
    first_s = submit.first_token_s
    return Generate(
        id=wire_id,
        prompt_u32=submit.prompt_token_ids,
        sampling=_sampling(submit, request.sampling, eos_token_ids),
        tenant=_tenant(submit.tenant),
        log_id=submit.log_id,
        routed=Routed(
            seed=submit.sampler.seed,
            age_ms=age_ms,
            output_u32=submit.output_token_ids,
            first_token_ms=None if first_s is None else max(0.0, first_s - submit.arrived_s) * 1000,
            moves=submit.num_moves,
            deaths=submit.num_deaths,
        ),
    )


def _sampling(submit: Submit, sampling: SamplingParams, eos_token_ids: frozenset[int]) -> Sampling:
    """Every value as it was resolved here. Stop strings stay here, where the text is made."""
    sampler = submit.sampler
    ends = eos_token_ids.issubset(submit.stop_token_ids)
    return Sampling(
        max_tokens=submit.max_tokens,
        min_tokens=submit.min_tokens,
        temperature=sampler.temperature,
        top_k=sampler.top_k,
        top_p=sampler.top_p,
        min_p=sampler.min_p,
        repetition_penalty=sampler.repetition_penalty,
        presence_penalty=sampler.presence_penalty,
        frequency_penalty=sampler.frequency_penalty,
        logit_bias=_biases(sampler),
        stop_token_ids=[one for one in submit.stop_token_ids if not (ends and one in eos_token_ids)],
        ignore_eos=not ends,
        logprobs=submit.logprobs,
        prompt_logprobs=submit.prompt_logprobs,
        priority=submit.priority,
        deadline_ms=_milliseconds(submit.deadline_ms),
        itl_target_ms=_milliseconds(submit.itl_target_ms),
        ttft_target_ms=_milliseconds(submit.ttft_target_ms),
        tpot_target_ms=_milliseconds(submit.tpot_target_ms),
        cache_salt=submit.cache_salt,
        structured=None if sampling.structured is None else to_wire(sampling.structured),
    )


def _biases(sampler: SamplerParams) -> list[tuple[int, float]] | None:
    if not sampler.biases:
        return None
    half = len(sampler.biases) // 2
    values = array("f")
    values.frombytes(sampler.biases[half:])
    return list(zip(unpack_int32(sampler.biases[:half]).tolist(), values.tolist(), strict=True))


def _milliseconds(value: float | None) -> float | None:
    """The protocol's longest is an hour."""
    return None if value is None else min(value, MAX_DURATION_MS)


def _tenant(name: str) -> str:
    """Whom the request is accounted to; of a name that is too long for the protocol, its digest."""
    return name if len(name) <= MAX_TENANT_LEN else hashlib.blake2b(name.encode(), digest_size=32).hexdigest()


def output_of(delta: Delta, request: OpenRequest) -> TokenOutput:
    """What a delta has brought. The first one of a request says when its first chunk was planned, and what was cached;
    the later ones say it again."""
    is_first = request.awaits_first_token
    return TokenOutput(
        request.submit.request_id,
        tuple(delta.ids),
        delta.finish,  # type: ignore[arg-type]  # a reason of a later server is passed on as it is
        request.submit.arrived_s + delta.queued_ms / 1000 if is_first else request.started_s,
        delta.cached_tokens if is_first else request.cached_tokens,
        b"" if delta.logprobs is None else delta.logprobs.values,
        b"" if delta.prompt_logprobs is None else delta.prompt_logprobs.values,
    )


def ready_of(capacity: Capacity, address: str) -> Ready:
    """What the engine with least room of those behind a server would say of itself."""
    rows = Bucket(capacity.chunk_rows, capacity.step_rows - capacity.chunk_rows)
    worker = WorkerReady(
        device=address,
        attention="its own",
        graphs=False,
        compiled=False,
        buckets=(rows,),
        max_chunks=1,
        num_pages=capacity.pages,
        page_size=capacity.page_size,
        phases=(),
        page_groups=tuple(PageGroup(window) for window in capacity.windows),
    )
    return Ready(worker, -(-capacity.slots // capacity.engines), capacity.step_rows, capacity.engines)


def capacity_of(ready: Ready, num_engines: int) -> Capacity:
    """What a server tells frontends that route to it: the opposite. ready: of its engine with least room."""
    worker = ready.worker
    return Capacity(
        engines=num_engines,
        slots=ready.num_slots * num_engines,
        pages=worker.num_pages,
        page_size=worker.page_size,
        step_rows=ready.token_budget,
        chunk_rows=min(ready.token_budget, max(bucket.prefill_rows for bucket in worker.buckets)),
        windows=[group.window for group in worker.page_groups],
    )


def report_of(load: Load, num_own: int) -> EngineReport:
    """num_own: of the open requests, those that this frontend sent. The others' part of the tokens is not told: each
    request is taken to have an equal one."""
    num_others = max(0, load.open - num_own)
    share = num_others / load.open if load.open else 0.0
    return EngineReport(
        epoch=load.epoch,
        is_serving=load.serves,
        num_open=load.open,
        num_tenants=load.tenants,
        prompt_tokens=load.prompt_tokens,
        output_tokens=load.output_tokens,
        num_others=num_others,
        others_prompt_tokens=round(share * load.prompt_tokens),
        others_output_tokens=round(share * load.output_tokens),
        num_steps=load.steps,
        pages_free=load.pages_free,
        prompt_token_s=load.prompt_token_s,
        output_token_s=load.output_token_s,
        step_s=load.step_s,
    )


def load_of(report: EngineReport, num_engines: int) -> Load:
    """The opposite."""
    return Load(
        epoch=report.epoch,
        serves=report.is_serving,
        engines=num_engines,
        open=report.num_open,
        tenants=report.num_tenants,
        prompt_tokens=max(0, report.prompt_tokens),
        output_tokens=max(0, report.output_tokens),
        steps=report.num_steps,
        pages_free=report.pages_free,
        prompt_token_s=report.prompt_token_s,
        output_token_s=report.output_token_s,
        step_s=report.step_s,
    )


def stats_of(stats: Stats) -> EngineStats:
    """A server's engine, or the sum of its engines. Requests that its frontend holds wait, too."""
    metrics = stats.metrics
    if metrics is None:  # a server that tells less
        return EngineStats(
            running=stats.running,
            waiting=stats.waiting + stats.held_requests,
            pages_free=stats.pages_free,
            pages_total=stats.pages_total,
            steps=stats.steps,
            graph_replays=0,
            eager_steps=0,
            recompilations=0,
            padding_share=0.0,
            preemptions=stats.preemptions,
            finished=stats.finished,
            step_ms_p50=stats.step_ms_p50,
            step_ms_p95=stats.step_ms_p95,
            step_ms_p99=stats.step_ms_p99,
            step_ms_max=stats.step_ms_max,
        )
    step_s = metrics.histograms.get("step_s")
    total_rows = metrics.chunk_rows + metrics.decode_rows + metrics.padding_rows
    return EngineStats(
        running=stats.running,
        waiting=stats.waiting + stats.held_requests,
        pages_free=stats.pages_free,
        pages_total=stats.pages_total,
        steps=stats.steps,
        graph_replays=metrics.graph_replays,
        eager_steps=metrics.eager_steps,
        recompilations=metrics.recompilations,
        padding_share=metrics.padding_rows / total_rows if total_rows else 0.0,
        preemptions=stats.preemptions,
        finished=stats.finished,
        step_ms_p50=stats.step_ms_p50,
        step_ms_p95=stats.step_ms_p95,
        step_ms_p99=stats.step_ms_p99,
        step_ms_max=stats.step_ms_max,
        pages_cached=metrics.pages_cached,
        prefix_queries=metrics.prefix_queries,
        prefix_hits=metrics.prefix_hits,
        refused=metrics.refused,
        deadline_misses=metrics.deadline_misses,
        worker_restarts=stats.worker_restarts,
        worker_loss=stats.worker_loss,
        poisoned=stats.poisoned,
        numerical_errors=stats.numerical_errors,
        total_rows=total_rows,
        padding_rows=metrics.padding_rows,
        decode_rows=metrics.decode_rows,
        waiting_by_class=tuple(metrics.waiting_by_class),
        buckets=tuple(map(_bucket_of, metrics.buckets)),
        steps_within_ms=() if step_s is None else tuple(step_s.counts),
        recent_steps=() if stats.live is None else _steps_of(stats.live),
        buckets_captured=metrics.buckets_captured,
        buckets_total=metrics.buckets_total,
    )


def _bucket_of(count: BucketCount) -> BucketSteps:
    return BucketSteps(Bucket(count.prefill_rows, count.decode_rows), count.steps, count.ms)


def _steps_of(live: Live) -> tuple[StepSummary, ...]:
    """By the server's clock."""
    steps = live.steps
    rows = zip(steps.chunk_rows, steps.decode_rows, steps.padding_rows, strict=True)
    told = zip(steps.ids, rows, steps.ms, steps.ended_ms, strict=True)
    return tuple(StepSummary(step_id, *num, ms, ended_ms / 1000) for step_id, num, ms, ended_ms in told)
