"""The statistics of several engines as those of one, and their reports.

Pure. Called by `graphgen.router.links`.
"""

from collections.abc import Sequence

from graphgen.ipc.engine_messages import BucketSteps, EngineStats
from graphgen.ipc.reports import EngineReport
from graphgen.ipc.worker_messages import Bucket

_MOST = ("step_ms_p50", "step_ms_p95", "step_ms_p99", "step_ms_max", "worker_pause_s", "capture_ms_max")
_OWN = ("padding_share", "worker_loss", "waiting_by_class", "buckets", "steps_within_ms", "recent_steps", "engines")
"""What is neither a sum nor the most of any engine."""


def sum_of(engines: Sequence[EngineStats | None]) -> EngineStats:
    """Counts are those of all engines together, step times those of the slowest. None: an engine that does not serve.

    Recent steps have those of all engines, by the time they ended; `engines` has each engine's own.
    """
    found = [one for one in engines if one is not None]
    values = {
        name: sum(getattr(one, name) for one in found)
        for name in EngineStats.__struct_fields__
        if name not in _MOST and name not in _OWN
    }
    values |= {name: max((getattr(one, name) for one in found), default=0.0) for name in _MOST}
    steps = sorted((step for one in found for step in one.recent_steps), key=lambda step: step.finished_s)
    return EngineStats(
        **values,
        padding_share=values["padding_rows"] / values["total_rows"] if values["total_rows"] else 0.0,
        worker_loss=next((one.worker_loss for one in found if one.worker_loss), ""),
        waiting_by_class=_added([one.waiting_by_class for one in found]),
        buckets=_buckets(found),
        steps_within_ms=_added([one.steps_within_ms for one in found]),
        recent_steps=tuple(steps),
        engines=tuple(engines),
    )


def sum_of_reports(reports: Sequence[EngineReport], epoch: int) -> EngineReport:
    """Those of engines that serve; none: they serve not. Work is added up. So is speed: two engines compute a token in
    half the time. epoch: of all together."""
    serving = [one for one in reports if one.is_serving]
    return EngineReport(
        epoch=epoch,
        is_serving=bool(serving),
        num_open=sum(one.num_open for one in reports),
        num_tenants=max((one.num_tenants for one in reports), default=0),
        prompt_tokens=sum(one.prompt_tokens for one in reports),
        output_tokens=sum(one.output_tokens for one in reports),
        num_others=sum(one.num_others for one in reports),
        others_prompt_tokens=sum(one.others_prompt_tokens for one in reports),
        others_output_tokens=sum(one.others_output_tokens for one in reports),
        num_steps=sum(one.num_steps for one in reports),
        pages_free=sum(one.pages_free for one in reports),
        prompt_token_s=_together([one.prompt_token_s for one in serving]),
        output_token_s=_together([one.output_token_s for one in serving]),
        step_s=max((one.step_s for one in serving), default=0.0),
    )


def _together(seconds: Sequence[float]) -> float:
    """Of a token, by engines that each take so long for one; 0 where nothing was measured."""
    rate = sum(1.0 / one for one in seconds if one > 0.0)
    return 1.0 / rate if rate else 0.0


def _added(columns: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Place by place."""
    return tuple(map(sum, zip(*(column for column in columns if column), strict=True)))


def _buckets(engines: Sequence[EngineStats]) -> tuple[BucketSteps, ...]:
    found: dict[Bucket, BucketSteps] = {}
    for one in (one for engine in engines for one in engine.buckets):
        other = found.get(one.bucket, BucketSteps(one.bucket, 0, 0.0))
        found[one.bucket] = BucketSteps(one.bucket, other.steps + one.steps, other.milliseconds + one.milliseconds)
    return tuple(sorted(found.values(), key=lambda one: (one.bucket.num_rows, one.bucket.decode_rows)))
