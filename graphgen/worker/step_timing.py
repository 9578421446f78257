"""How long is a step of each bucket? Measured with full steps, on the device and through the runner that serve.

Owns the timed steps and what they leave behind: the pages they used are zero-filled again, no slot keeps an owner,
and counters restart. Never draws a conclusion: the scheduler's cost model does. Called by process.py before the
worker is ready, and by `benchmarks.steps`.

Every row of a timed step is live: one chunk in slot 0 (and where prompts meet, one in slot 1), and decode rows that all
attend to the same number of positions. Pages are dealt in order and from the start again where the cache has too few:
rows then share pages, which costs the time of pages of their own, since no cache of a device holds what lies between
two reads of one page.
"""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median_low
from typing import TypeVar

import msgspec
from msgspec import Struct

from graphgen.ipc.attended import Attended
from graphgen.ipc.codec import pack_int32
from graphgen.ipc.step_schema import NEW_PAGE_WORDS
from graphgen.ipc.worker_messages import (
    TIMING_PHASE,
    Bucket,
    BucketTime,
    Chunk,
    Phase,
    Progress,
    SamplerParams,
    SlotInit,
    StepPlan,
    StepTimeTable,
    WorkerReady,
)
from graphgen.launch.launch_config import LaunchConfig
from graphgen.launch.step_times_store import (
    QUICK_SOURCE,
    THOROUGH_SOURCE,
    StepTimesKey,
    load_step_times,
    save_step_times,
)
from graphgen.models.collectives.group import RankGroup
from graphgen.worker.runner import LaunchedStep, ModelRunner, Report

_Case = TypeVar("_Case", bound=Hashable)

STEPS_IN_FLIGHT = 2
"""As when serving: the next step waits on the device when one ends."""

DECODE_CONTEXT = 1024
PROMPT_START = 512
"""Where the rows of the table stand, typical of serving; in a model of a short context, in the middle of it."""

FAR_PROMPT_START = 4096
"""The second start, beside 0, of the chunk that shows what a prompt pair costs."""

TAIL_SHARE = 4
"""This part of the rows ends a prompt there, and the rest begins another, to show what a position costs that a chunk
reads. Few rows that attend to much keep few of a device's processors busy, for as long as more rows would take: serving
an 8B model on an H200 in steps of 512 or 1024 rows, a chunk took as long as its pairs and those of 240 to 470 rows."""

NEAR_SHARE = 4
"""The second context that shows what a decode position costs is this part of the first."""

SLOPE_BUCKETS = 3
"""Buckets that show what a decode position costs."""


class Depth(Struct, frozen=True):
    """Steps of each bucket: some that do not count, then those whose lower median is its time."""

    settling: int
    repeats: int
    enough_ms: float = math.inf  # no further step of a bucket once those in a row have taken so long
    passes: int = 1  # through the buckets with prompts, each in the opposite order of the one before


QUICK = Depth(settling=1, repeats=6, enough_ms=30.0, passes=2)
"""At a start. The first replay of a graph is slower than all that follow. Several steps in a row, because what one
takes depends on the power that those before it drew; and two passes, because a GPU at its power limit swings for tens
of milliseconds: on an H100 nine of ten steps with prompts then lie within 3.5 % of a thorough timing, the furthest 5 %
off, where one pass had one 10 % off and rounds of single steps put those of 512 rows 8 % too low."""

HEATING = Depth(settling=0, repeats=100, enough_ms=500.0)
"""Of the widest steps before those that count. A device that has idled runs faster than its power limit will let it
run under load: on an H200 a step of 768 rows takes 17 ms at first, 19 after a tenth of a second, and 20 later."""

PROMPT_SLOPES = Depth(settling=1, repeats=2, passes=4)
"""Of a chunk at either of two starts, and of the end of a prompt beside the beginning of another. They differ by a
tenth of the step, so all must run at the same clock: they take turns."""

FULL = Depth(settling=2, repeats=20, enough_ms=500.0)
"""When asked. Of long steps, fewer are enough: on a CPU all of them would take a minute."""


class Places(Struct, frozen=True):
    """What the rows of a timed step attend to."""

    decode_context: int  # positions of each decode row
    prompt_start: int  # position of the chunk's first token
    prompts_meet: bool = False  # only a part of the rows is that chunk, and the rest begins another prompt


class StepTimer:
    """Runs full steps of any bucket. Made by `open_timer`."""

    def __init__(
        self,
        runner: ModelRunner,
        config: LaunchConfig,
        buckets: Sequence[Bucket],
        agreed: Callable[[float], float] = lambda milliseconds: milliseconds,
    ) -> None:
        """agreed: of what this rank and the others took, what all believe: they go on timing by it, in step."""
        self._agreed = agreed
        self._runner = runner
        self._config = config
        self._buckets = buckets

    @property
    def widest_chunk(self) -> int:
        """Prompt rows of the widest bucket."""
        return max(bucket.prefill_rows for bucket in self._buckets)

    def times_ms(self, bucket: Bucket, places: Places, depth: Depth) -> list[float]:
        """Of each repeat, from the start of its input's copy to its end, in the order they ran."""
        plan = self._full_step(bucket, places)
        times: list[float] = []

        def plans() -> Iterator[StepPlan]:
            for _ in range(depth.settling + depth.repeats):
                if sum(times) > depth.enough_ms and len(times) > depth.settling:
                    return
                yield plan

        for milliseconds in self._run(plans()):
            times.append(milliseconds)
        return times[depth.settling :]

    def _run(self, plans: Iterable[StepPlan]) -> Iterator[float]:
        """What each step took; later ones are in flight when it ends."""
        in_flight: deque[LaunchedStep] = deque()
        for plan in plans:
            in_flight.append(self._runner.launch(plan, received_s=0.0))
            if len(in_flight) > STEPS_IN_FLIGHT:
                yield self._agreed(_milliseconds(in_flight.popleft()))
        yield from (self._agreed(_milliseconds(step)) for step in in_flight)

    def attended_by_chunks(self, bucket: Bucket, places: Places) -> Attended:
        return Attended().with_chunks(self._chunks(bucket, places))

    def _chunks(self, bucket: Bucket, places: Places) -> tuple[Chunk, ...]:
        """They fill the prefill rows, unless the model's context ends before: the rest is padding then."""
        start = places.prompt_start
        num_rows = min(bucket.prefill_rows, self._config.max_model_len - start)
        length = num_rows // TAIL_SHARE if places.prompts_meet else num_rows
        return tuple(
            Chunk(slot=slot, start=start, length=length, draws=True, init=_owner_of(start + length))
            for slot, (start, length) in enumerate(((start, length), (0, num_rows - length)))
            if length
        )

    def _full_step(self, bucket: Bucket, places: Places) -> StepPlan:
        chunks = self._chunks(bucket, places)
        num_tokens = sum(chunk.length for chunk in chunks)
        tokens = pack_int32(number % self._config.spec.vocab_size for number in range(num_tokens))
        # From the last slot down, so that a slot decodes beside its own chunk only where nearly all slots decode.
        slots = pack_int32(self._config.num_slots - 1 - row for row in range(bucket.decode_rows))
        positions = pack_int32([places.decode_context - 1] * bucket.decode_rows)
        return StepPlan(
            step_id=0,
            bucket=bucket,
            chunks=chunks,
            chunk_token_ids=tokens,
            decode_slots=slots,
            decode_positions=positions,
            planned_s=0.0,
        )


@contextmanager
def open_timer(
    runner: ModelRunner, config: LaunchConfig, reach: Places, ranks: RankGroup | None = None
) -> Iterator[StepTimer]:
    """A timer whose steps go no further than `reach`, while nothing else runs. ranks: all of them time the same steps,
    of which the slowest counts.

    The pages hold random numbers meanwhile, as kernels draw less power and run faster over zeros. All hold the same
    ones: making different ones for tens of gigabytes would take longer than the steps of a quick timing.
    """
    ready = runner.describe()
    timer = _make_timer(runner, config, ready, ranks)
    entries = _deal_pages(config, ready, reach, timer.widest_chunk)
    num_used = min(ready.num_pages, len(entries) // NEW_PAGE_WORDS)
    runner.run_between_steps(lambda: runner.kv_cache.fill_with_noise(num_used))
    _enter_pages(runner, config, ready, entries)
    try:
        yield timer
    finally:
        runner.run_between_steps(lambda: runner.kv_cache.clear(num_used))
        runner.restart_counters()


@contextmanager
def open_late_timer(
    runner: ModelRunner, config: LaunchConfig, places: Places, ranks: RankGroup | None = None
) -> Iterator[StepTimer]:
    """The same between requests, for steps at these places alone: what they write goes to the trash page, so that the
    pages keep what they hold, and they are in no counter."""
    ready = runner.describe()
    timer = _make_timer(runner, config, ready, ranks)
    entries = _deal_pages(config, ready, places, timer.widest_chunk, runner.kv_cache.trash_page)
    with runner.uncounted():
        _enter_pages(runner, config, ready, entries)
        yield timer


def _make_timer(runner: ModelRunner, config: LaunchConfig, ready: WorkerReady, ranks: RankGroup | None) -> StepTimer:
    return StepTimer(runner, config, ready.captured, *(() if ranks is None else (ranks.most,)))


def measure_step_times(
    runner: ModelRunner,
    config: LaunchConfig,
    depth: Depth,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: RankGroup | None = None,
) -> StepTimeTable:
    """The table of all captured buckets, and its slopes. Nothing else may run meanwhile."""
    ready = runner.describe()
    buckets = ready.captured
    widest = max(bucket.prefill_rows for bucket in buckets)
    room = max(0, config.max_model_len - widest)  # starts at which the widest chunk fits
    places = Places(min(DECODE_CONTEXT, -(-config.max_model_len // 2)), min(PROMPT_START, room // 2))
    # What a near start adds is less than steps vary by, and what a start nearer than a chunk adds is not told apart.
    far_start = min(FAR_PROMPT_START, room) if TAIL_SHARE * room >= widest else 0
    two_chunks = min(ready.max_chunks, config.num_slots) > 1 and far_start >= widest >= TAIL_SHARE
    far = Places(places.decode_context, far_start, two_chunks)
    with open_timer(runner, config, far, ranks) as timer:
        widest_first = sorted(buckets, key=lambda bucket: (-bucket.prefill_rows, -bucket.decode_rows))
        mixed = [bucket for bucket in widest_first if bucket.prefill_rows]
        decode_only = [bucket for bucket in widest_first if not bucket.prefill_rows]
        timer.times_ms(widest_first[0], places, HEATING)
        num_done, num_timed = 0, depth.passes * len(mixed) + len(decode_only)

        def timed(bucket: Bucket) -> list[float]:
            nonlocal num_done
            progress(num_done, num_timed)
            num_done += 1
            return timer.times_ms(bucket, places, depth)

        # What has to do with prompts comes first, while the device is warm: what steps without them take depends on
        # the memory, hardly on the power.
        times = _medians(mixed, timed, depth.passes)
        per_pair, per_chunk_position = _prompt_slopes(timer, widest_first[0], far)
        times |= _medians(decode_only, timed, 1)
        per_position = _decode_slope(timer, buckets, places, times, depth)
        progress(num_timed, num_timed)
    return StepTimeTable(
        times=tuple(BucketTime(bucket, times[bucket]) for bucket in buckets),
        decode_context=places.decode_context,
        prompt_start=places.prompt_start,
        ms_per_decode_position=per_position,
        ms_per_prompt_pair=per_pair,
        ms_per_chunk_position=per_chunk_position,
    )


def with_step_times(
    ready: WorkerReady, runner: ModelRunner, config: LaunchConfig, report: Report, ranks: RankGroup | None = None
) -> WorkerReady:
    """`ready` and the step times that `config.step_times` asks for: stored ones, measured ones, or none. ranks: which
    measure together, unless all of them find stored ones; the first one stores what they find."""
    if config.step_times == "off":
        return ready
    key = StepTimesKey.of(config, ready)
    if config.step_times == "auto":
        stored = load_step_times(os.environ, key)
        if stored is not None and not stored.has(ready.captured):
            stored = None
        if ranks is not None and ranks.least(stored is not None) == 0.0:
            stored = None
        if stored is not None or not ready.graphs:
            return msgspec.structs.replace(ready, step_times=stored)
    begun_s = time.monotonic()
    depth = FULL if config.step_times == "measure" else QUICK
    table = measure_step_times(
        runner, config, depth, lambda done, total: report(Progress(TIMING_PHASE, done, total)), ranks
    )
    phase = Phase(TIMING_PHASE, time.monotonic() - begun_s)
    # Also a quick one is kept: the next start saves the time, and steps that run correct it.
    if ranks is None or ranks.shard.rank == 0:
        save_step_times(os.environ, key, table, THOROUGH_SOURCE if depth is FULL else QUICK_SOURCE)
    return msgspec.structs.replace(ready, step_times=table, phases=(*ready.phases, phase))


def _medians(cases: Sequence[_Case], timed: Callable[[_Case], list[float]], passes: int) -> dict[_Case, float]:
    """The lower median of what each case took in all passes."""
    times: dict[_Case, list[float]] = {case: [] for case in cases}
    for number in range(passes):
        for case in cases if number % 2 == 0 else reversed(cases):
            times[case] += timed(case)
    return {case: median_low(times[case]) for case in cases}


# --- slopes ----------------------------------------------------------------------------------------------------


def _decode_slope(
    timer: StepTimer, buckets: Sequence[Bucket], places: Places, times: dict[Bucket, float], depth: Depth
) -> float:
    """Milliseconds of one decode row for each further position: the median of the widest buckets without prompts.

    Each is timed at a second context. Of a single bucket, one of the two may lie where a cache of the device ends.
    """
    near = Places(max(1, places.decode_context // NEAR_SHARE), places.prompt_start)
    decode_only = sorted((bucket for bucket in buckets if not bucket.prefill_rows), key=lambda bucket: bucket.num_rows)
    slopes = []
    for bucket in decode_only[-SLOPE_BUCKETS:]:
        positions = bucket.decode_rows * (places.decode_context - near.decode_context)
        gained_ms = times[bucket] - median_low(timer.times_ms(bucket, near, depth))
        slopes.append(gained_ms / positions if positions else 0.0)
    return max(0.0, median_low(slopes))


def _prompt_slopes(timer: StepTimer, bucket: Bucket, reach: Places) -> tuple[float, float]:
    """Milliseconds of each further (row, position) pair, and of each further position that a chunk reads.

    By the widest chunk at two starts, and by a part of it at the second beside the beginning of another prompt; both
    are 0 where there is one start only, the second where a step holds one chunk. All have equally many rows.
    """
    if not reach.prompt_start:
        return 0.0, 0.0
    near, far = Places(reach.decode_context, 0), Places(reach.decode_context, reach.prompt_start)
    cases = list(dict.fromkeys((near, far, reach)))
    times = _medians(cases, lambda places: timer.times_ms(bucket, places, PROMPT_SLOPES), PROMPT_SLOPES.passes)
    attended = {places: timer.attended_by_chunks(bucket, places) for places in cases}

    def gained(places: Places) -> tuple[float, int, int]:
        """Milliseconds, pairs and positions, over the near chunk."""
        more, less = attended[places], attended[near]
        pairs, positions = more.prompt_pairs - less.prompt_pairs, more.chunk_positions - less.chunk_positions
        return times[places] - times[near], pairs, positions

    far_ms, far_pairs, far_positions = gained(far)
    met_ms, met_pairs, met_positions = gained(reach)
    # Two equations in two slopes; one where both places are the same.
    if determinant := far_pairs * met_positions - far_positions * met_pairs:
        per_pair = (far_ms * met_positions - met_ms * far_positions) / determinant
        per_position = (met_ms * far_pairs - far_ms * met_pairs) / determinant
        if per_pair >= 0.0 and per_position >= 0.0:
            return per_pair, per_position
    return max(0.0, far_ms / far_pairs) if far_pairs else 0.0, 0.0


def _owner_of(num_tokens: int) -> SlotInit:
    """A slot whose prompt has so many tokens."""
    return SlotInit(num_tokens, 0, (), SamplerParams())


# --- pages -----------------------------------------------------------------------------------------------------


def _deal_pages(
    config: LaunchConfig, ready: WorkerReady, reach: Places, widest_chunk: int, written: int | None = None
) -> list[int]:
    """Block table entries, as in a plan, that cover what the rows of every slot attend to in every page group.

    written: the page in the place of each that a step at `reach` writes; None: pages may be written.
    """
    entries: list[int] = []
    chunk_ends = {0: min(reach.prompt_start + widest_chunk, config.max_model_len)}
    if reach.prompts_meet:
        chunk_ends[1] = min(widest_chunk, config.max_model_len)
    last_decode = (reach.decode_context - 1) // config.page_size
    first_of_chunk = reach.prompt_start // config.page_size
    for slot in range(config.num_slots):
        positions = max(reach.decode_context, chunk_ends.get(slot, 0))
        for index in range(-(-positions // config.page_size)):
            is_written = index == last_decode or (not slot and index >= first_of_chunk)
            for group in range(len(ready.page_groups)):
                page = len(entries) // NEW_PAGE_WORDS % ready.num_pages
                entries += (group, slot, index, written if is_written and written is not None else page)
    return entries


def _enter_pages(runner: ModelRunner, config: LaunchConfig, ready: WorkerReady, entries: Sequence[int]) -> None:
    """Steps without a live row that put the pages into the block tables."""
    bucket = max(ready.captured, key=lambda bucket: (bucket.prefill_rows, -bucket.decode_rows))
    # As many as a step of this bucket may bring.
    of_chunk = sum(
        one.most_pages(config.max_model_len, config.page_size, bucket.prefill_rows) for one in ready.page_groups
    )
    words = NEW_PAGE_WORDS * ready.max_chunks * of_chunk
    for start in range(0, len(entries), words):
        new_pages = pack_int32(entries[start : start + words])
        plan = StepPlan(step_id=0, bucket=bucket, new_pages=new_pages, planned_s=0.0)
        runner.launch(plan, received_s=0.0).fetched.wait()


def _milliseconds(step: LaunchedStep) -> float:
    step.fetched.wait()
    return (step.finished.wait() - step.started.wait()) * 1000.0
