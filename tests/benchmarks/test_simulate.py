"""The simulator: exact where it can be computed by hand, equal to a brute-force reading of its own plans elsewhere."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import scenarios, simulate, simulated_machine
from benchmarks.metrics import ServiceLevel
from benchmarks.policy_costs import WAITING_EDGES, group_of, range_of
from benchmarks.scenarios import Scenario, parse_load, requests_of
from benchmarks.step_log import Step, attended
from benchmarks.virtual_engine import VirtualEngine, VirtualRequest
from benchmarks.workload import RequestShape, Workload
from graphgen.ipc.engine_messages import Outputs, Submit
from graphgen.ipc.worker_messages import Bucket, BucketTime, StepPlan, StepTimeTable
from graphgen.launch.step_times_store import StepTimesFile
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.plan import StepDescription
from graphgen.scheduler.policy import Scheduler

LEVELS = [ServiceLevel(0.020)]
BUCKETS = (Bucket(0, 1), Bucket(0, 2), Bucket(4, 2))
FLAT = StepTimeTable(tuple(map(BucketTime, BUCKETS, (10.0, 12.0, 20.0))), 100, 0, 0.0, 0.0, 0.0)
SLOPED = StepTimeTable(FLAT.times, 8, 0, 0.05, 0.02, 0.1)


def make_limits(num_pages: int = 64) -> SchedulerLimits:
    return SchedulerLimits(BUCKETS, num_pages, 4, num_slots=2, max_chunks=2, token_budget=6, max_model_len=64)


def make_requests(*shapes: tuple[float, int, int]) -> list[VirtualRequest]:
    return [VirtualRequest(RequestShape(*shape), "all") for shape in shapes]


# --- by hand -----------------------------------------------------------------------------------------------------


def test_one_client_gets_every_token_when_the_table_says() -> None:
    """A prompt of 6 tokens is two chunks (20 ms each), and each further token a decode step of one row (10 ms).

    The first step waits for the host (1 ms), the next ones only for the step before them: their plans were made while
    it ran. The next request is sent 1 ms after the last token and its first step begins 1 ms later.
    """
    engine = VirtualEngine(Scheduler(make_limits()), CostModel(FLAT), make_requests((0, 6, 3), (0, 4, 2)), clients=1)
    first, second = engine.run()
    assert first.sent_s == 0.0
    assert first.token_times_s == pytest.approx((0.041, 0.051, 0.061))
    assert second.sent_s == pytest.approx(0.062)
    assert second.token_times_s == pytest.approx((0.021, 0.031))
    assert list(engine.steps.started_s) == pytest.approx([0.001, 0.021, 0.041, 0.051, 0.063, 0.083])
    assert list(engine.steps.rows) == [6, 6, 1, 1, 6, 1]
    assert list(engine.steps.live_rows) == [4, 2, 1, 1, 4, 1]
    figures = engine.steps.figures()
    assert figures["padding_share"] == pytest.approx(1.0 - 13 / 21)
    assert figures["device_idle_share"] == pytest.approx(0.002 / 0.092)


def test_a_request_that_arrives_between_two_steps_waits_for_the_next_free_plan() -> None:
    """Two plans are in flight at any time, so an arrival is planned when a step ends and runs after the other one."""
    engine = VirtualEngine(Scheduler(make_limits()), CostModel(FLAT), make_requests((0, 4, 5), (0.022, 2, 2)), None)
    first, second = engine.run()
    # Steps: prompt 1-21, decode 21-31, decode 31-41, then the prompt beside a decode 41-61, both decode 61-73.
    assert first.token_times_s == pytest.approx((0.021, 0.031, 0.041, 0.061, 0.073))
    assert second.token_times_s == pytest.approx((0.061 - 0.022, 0.073 - 0.022))


def test_longer_contexts_take_longer_as_the_table_says() -> None:
    engine = VirtualEngine(Scheduler(make_limits()), CostModel(SLOPED), make_requests((0, 3, 3)), clients=1)
    (served,) = engine.run()
    prompt_ms = 20.0 - 0.05 * 16 + 0.02 * (1 + 2 + 3 - (1 + 2 + 3 + 4)) + 0.1 * (3 - 4)
    decodes_ms = [10.0 + 0.05 * (4 - 8), 10.0 + 0.05 * (5 - 8)]
    ends_ms = [1.0 + prompt_ms, 1.0 + prompt_ms + decodes_ms[0], 1.0 + prompt_ms + sum(decodes_ms)]
    assert served.token_times_s == pytest.approx([end / 1000.0 for end in ends_ms])


# --- against brute force -------------------------------------------------------------------------------------------


class RecordingScheduler(Scheduler):
    """Keeps what it planned, in terms of requests."""

    def __init__(self, limits: SchedulerLimits) -> None:
        super().__init__(limits)
        self.planned: list[tuple[float, StepPlan, StepDescription]] = []
        self.most_in_flight = 0

    def schedule(self, now_s: float) -> StepPlan | None:
        plan = super().schedule(now_s)
        if plan is not None:
            self.planned.append((now_s, plan, self.describe_step(plan.step_id)))
        self.most_in_flight = max(self.most_in_flight, self.steps_in_flight)
        return plan


def times_by_brute_force(
    planned: Sequence[tuple[float, StepPlan, StepDescription]], table: StepTimeTable, host_delay_s: float
) -> tuple[dict[int, list[float]], list[float]]:
    """When each request gets its tokens, row by row: every position that a row attends to is counted one by one."""
    milliseconds = {time.bucket: time.milliseconds for time in table.times}
    tokens: dict[int, list[float]] = {}
    computed: dict[int, int] = {}
    end_s, ends = 0.0, []
    for planned_s, plan, description in planned:
        pairs, positions, read = 0, 0, 0
        for request, start, length in description.chunks:
            pairs += sum(position + 1 for position in range(start, start + length))
            read += start + length
            computed[request] = start + length
        for request in description.decode_request_ids:
            computed[request] += 1
            positions += computed[request]
        bucket = plan.bucket
        full_pairs = sum(table.prompt_start + row + 1 for row in range(bucket.prefill_rows))
        grown = table.ms_per_decode_position * (positions - bucket.decode_rows * table.decode_context)
        grown += table.ms_per_prompt_pair * (pairs - full_pairs)
        full_read = table.prompt_start + bucket.prefill_rows if bucket.prefill_rows else 0
        grown += table.ms_per_chunk_position * (read - full_read)
        end_s = (
            max(planned_s + host_delay_s, end_s) + max(milliseconds[bucket] + grown, 0.2 * milliseconds[bucket]) / 1e3
        )
        ends.append(end_s)
        drawing = [chunk[0] for chunk, sent in zip(description.chunks, plan.chunks, strict=True) if sent.draws] + list(
            description.decode_request_ids
        )
        for request in drawing:
            tokens.setdefault(request, []).append(end_s)
    return tokens, ends


SHAPES = st.lists(st.tuples(st.floats(0.0, 0.3), st.integers(1, 20), st.integers(1, 8)), min_size=1, max_size=8)


@settings(max_examples=60)
@given(SHAPES, st.sampled_from([FLAT, SLOPED]), st.sampled_from([None, 1, 2, 3]), st.sampled_from([7, 64]))
def test_every_token_comes_at_the_end_of_the_step_that_drew_it(
    shapes: list[tuple[float, int, int]], table: StepTimeTable, clients: int | None, num_pages: int
) -> None:
    requests = make_requests(*((0.0 if clients else at_s, prompt, output) for at_s, prompt, output in shapes))
    scheduler = RecordingScheduler(make_limits(num_pages))
    engine = VirtualEngine(scheduler, CostModel(table), requests, clients, host_delay_s=0.003)
    served = engine.run()
    tokens, ends = times_by_brute_force(scheduler.planned, table, 0.003)
    assert list(engine.steps.finished_s) == pytest.approx(ends)
    assert scheduler.most_in_flight <= 2
    for index, (request, one) in enumerate(zip(requests, served, strict=True)):
        assert len(one.token_times_s) == request.shape.output_len
        assert [one.sent_s + after for after in one.token_times_s] == pytest.approx(tokens[index])
        if clients is None:
            assert one.sent_s == request.shape.arrival_s
    if clients is not None:
        sent, ended = sorted(one.sent_s for one in served), sorted(one.ended_s for one in served)
        assert sent[:clients] == [0.0] * len(sent[:clients])
        assert sent[clients:] == pytest.approx([end + 0.003 for end in ended][: len(sent[clients:])])


def test_figures_are_those_of_a_plain_reading() -> None:
    """Gaps, throughput and the service level, computed here with nothing but sums over a sorted list."""
    on = make_machine(token_budget=512)
    (row,) = simulate.simulate(on, "fcfs", Workload.parse("300/40:8x60", None), 3, LEVELS).rows
    requests = requests_of(Workload.parse("300/40:8x60", None), 3, on.max_model_len)
    device = CostModel(on.table.table)
    engine = VirtualEngine(
        on.scheduler(simulated_machine.Policy()), device, requests, 8, on.host_delay_s, on.step_noise
    )
    served = engine.run()
    gaps = sorted(
        after - before
        for one in served
        for before, after in zip(one.token_times_s, one.token_times_s[1:], strict=False)
    )
    last_s = max(one.sent_s + one.token_times_s[-1] for one in served)
    in_time = 0
    for one in served:
        averages = []
        for count in range(1, len(one.token_times_s)):
            own = [one.token_times_s[i] - one.token_times_s[i - 1] for i in range(1, count + 1)]
            weights = [(15 / 17) ** (len(own) - 1 - i) for i in range(len(own))]
            averages.append(sum(w * gap for w, gap in zip(weights, own, strict=True)) / sum(weights))
        in_time += one.token_times_s[0] <= one.prompt_len / 512 and max(averages, default=0.0) <= 0.020
    assert row["request_throughput"] == pytest.approx(60 / last_s)
    assert row["request_goodput"] == pytest.approx(in_time / last_s)
    assert row["output_throughput"] == pytest.approx(sum(one.shape.output_len for one in requests) / last_s)
    assert row["max_itl_ms"] == pytest.approx(gaps[-1] * 1000.0)
    assert float(str(row["median_itl_ms"])) == pytest.approx(gaps[len(gaps) // 2] * 1000.0, rel=0.01)


# --- whole runs ----------------------------------------------------------------------------------------------------


def make_machine(token_budget: int, num_pages: int = 12_800) -> simulated_machine.Machine:
    table = StepTimesFile.read(simulated_machine.H200_STEP_TIMES)
    return simulated_machine.Machine(table, token_budget, num_pages, 256, 40_960, 0.001)


def test_two_thousand_requests_are_served_in_every_scenario() -> None:
    on = make_machine(token_budget=512)
    for text in ("256/64:64x2000", "bursts@20x2000", "mix@8x300"):
        load = parse_load(text, None)
        run = simulate.simulate(on, "fcfs", load, 0, LEVELS, clock_ns=time.monotonic_ns)
        whole, *kinds = run.rows
        assert whole["completed"] == whole["num_requests"] == load.num_requests
        assert sum(int(str(row["completed"])) for row in kinds) in (0, load.num_requests)
        assert len(run.steps.cpu_us) == len(run.steps.running) == len(run.steps.waiting)
        assert 0.9 * len(run.steps.rows) < len(run.steps.cpu_us) <= len(run.steps.rows)


def test_pages_that_run_out_cost_preemptions_and_no_tokens() -> None:
    (row,) = simulate.simulate(
        make_machine(512, num_pages=40), "fcfs", Workload.parse("256/256:16x100", None), 0, LEVELS
    ).rows
    assert row["completed"] == 100
    assert int(str(row["preemptions"])) > 0


def test_a_refused_request_is_a_failed_one_and_its_client_goes_on() -> None:
    on = msgspec.structs.replace(make_machine(512), num_pages=64)
    load = Workload.parse("4000/8:1x10", None)
    (row,) = simulate.simulate(on, "fcfs", load, 0, LEVELS).rows
    too_long = [
        shape for shape in load.shapes(0, on.max_model_len) if shape.prompt_len + shape.output_len - 1 > 64 * 64
    ]
    assert 0 < len(too_long) < 10
    assert (row["failed"], row["completed"]) == (len(too_long), 10 - len(too_long))


def test_a_policy_that_forgets_a_request_is_found_out() -> None:
    class Forgetful(Scheduler):
        def schedule(self, now_s: float) -> StepPlan | None:
            return None

    with pytest.raises(RuntimeError, match="1 requests are left"):
        VirtualEngine(Forgetful(make_limits()), CostModel(FLAT), make_requests((0, 3, 3)), 1).run()


def test_a_bucket_without_a_time_is_an_error() -> None:
    table = msgspec.structs.replace(FLAT, times=FLAT.times[:1])
    with pytest.raises(ValueError, match=r"bucket 4\+2 has no time"):
        VirtualEngine(Scheduler(make_limits()), CostModel(table), make_requests((0, 3, 3)), 1).run()


def test_no_two_prompts_share_a_prefix() -> None:
    prompts: list[bytes] = []

    class Reader(Scheduler):
        def add(self, submit: Submit) -> None:
            prompts.append(submit.prompt_token_ids)
            super().add(submit)

        def update(
            self,
            step_id: int,
            token_ids: Sequence[int],
            logprobs: bytes = b"",
            prompt_logprobs: bytes = b"",
            refused: Sequence[int] = (),
        ) -> Outputs:
            return super().update(step_id, token_ids)

    VirtualEngine(Reader(make_limits()), CostModel(FLAT), make_requests(*[(0, 5, 1)] * 4), 2).run()
    assert [len(prompt) for prompt in prompts] == [20] * 4
    assert len({prompt[:4] for prompt in prompts}) == 4


def test_the_command_writes_rows_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    loads = ("--load", "300/30:8x40", "--load", "mix:8x60", "--load", "256/8@2000x3000")
    rows = simulate.main([*loads, "--policy", "fcfs", "--json", str(out), "--plot", str(picture)])
    document = json.loads(out.read_text())
    assert [(row["workload"], row["kind"]) for row in rows] == [
        ("300/30:8", "all"),
        ("mix:8", "all"),
        ("mix:8", "chat"),
        ("mix:8", "document"),
        ("256/8@2000", "all"),
    ]
    assert document["rows"][: len(rows)] == [dict(row) | {"itl_curve_ms": curve_of(row)} for row in rows]
    costs = document["rows"][len(rows) :]
    assert sum(row["steps"] for row in costs) > 1000
    assert {row["waiting"] for row in costs} >= {"0", "1001-10000"}
    assert "measured by `graphgen tune`" in document["about"]["step_times"]
    assert 10_000 < picture.stat().st_size < 200_000


def curve_of(row: Any) -> list[list[float]]:
    return [list(point) for point in row["itl_curve_ms"]]


def test_a_real_run_that_went_as_simulated_is_met_exactly(tmp_path: Path) -> None:
    """The file of a real run has the keys of `benchmarks.serving`, which the simulator's rows have as well."""
    load = Workload.parse("2600/60:4x20", None)
    on = make_machine(1024)
    (row,) = simulate.simulate(on, "fcfs", load, 5, LEVELS).rows
    real = tmp_path / "serving.json"
    real.write_bytes(msgspec.json.encode({"about": {}, "rows": [row, row | {"request_throughput": 1.0}]}))
    compared = list(simulate.compare(make_machine(512), real, LEVELS))
    assert [one["figure"] for one in compared] == [*simulate.COMPARED] * 2
    offs = [one["off"] for one in compared]
    assert offs.count("+0.0%") == 2 * len(simulate.COMPARED) - 1
    (other,) = (one for one in compared if one["off"] != "+0.0%")
    assert other["off"] == f"{float(str(row['request_throughput'])) - 1.0:+.1%}"


def test_real_steps_are_held_against_the_table(tmp_path: Path) -> None:
    """A log whose steps take twice as long as the table says: every bucket is off by -50 %."""
    scheduler = RecordingScheduler(make_limits(num_pages=6))
    requests = make_requests((0, 9, 6), (0, 5, 8), (0.01, 12, 3))
    engine = VirtualEngine(scheduler, CostModel(SLOPED), requests, None)
    engine.run()
    steps = [
        Step(
            step=plan.step_id,
            bucket=(plan.bucket.prefill_rows, plan.bucket.decode_rows),
            chunks=description.chunks,
            decodes=description.decode_request_ids,
            padding=description.padding_rows,
            planned_s=planned_s,
            received_s=0.0,
            launched_s=0.0,
            started_s=2 * started_s,
            finished_s=2 * finished_s,
        )
        for (planned_s, plan, description), started_s, finished_s in zip(
            scheduler.planned, engine.steps.started_s, engine.steps.finished_s, strict=True
        )
    ]
    assert scheduler.counters.preemptions > 0
    for (positions, pairs, read), (_, plan, _) in zip(attended(steps), scheduler.planned, strict=True):
        own = memoryview(plan.decode_positions).cast("i")
        assert positions == sum(position + 1 for position in own)
        assert pairs == sum(p + 1 for chunk in plan.chunks for p in range(chunk.start, chunk.start + chunk.length))
        assert read == sum(chunk.start + chunk.length for chunk in plan.chunks)
    path = tmp_path / "steps.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(step) + b"\n" for step in steps))
    table = StepTimesFile.read(simulated_machine.H200_STEP_TIMES)
    ms = {str(time.bucket): time.milliseconds for time in SLOPED.times}
    slopes = {"ms_per_decode_position": 0.05, "ms_per_prompt_pair": 0.02, "ms_per_chunk_position": 0.1}
    own_table = msgspec.structs.replace(table, ms=ms, decode_context=8, prompt_start=0, **slopes)
    rows = simulate.compare_steps(own_table, path)
    assert sum(int(str(row["steps"])) for row in rows) == len(steps)
    assert {row["off"] for row in rows} == {"-50.0%"}


# --- what arrives --------------------------------------------------------------------------------------------------


def test_a_simulated_workload_has_the_lengths_of_the_real_one() -> None:
    for text in ("2600/60:16x30", "300/20@5x30"):
        load = Workload.parse(text, None)
        real = load.requests(7, 1000, 4096)
        assert load.shapes(7, 4096) == [
            RequestShape(request.arrival_s, len(request.prompt_token_ids), request.output_len) for request in real
        ]


def test_bursts_come_at_once_beside_a_steady_stream() -> None:
    requests = Scenario.parse("bursts@20x1000", None).requests(0, 4096)
    arrivals = [request.shape.arrival_s for request in requests]
    assert len(requests) == 1000
    assert arrivals == sorted(arrivals)
    bursts = [request.shape.arrival_s for request in requests if request.kind == "burst"]
    assert len(bursts) % scenarios.BURST_SIZE == 0
    for number in range(len(bursts) // scenarios.BURST_SIZE):
        assert bursts.count((number + 1) * scenarios.BURST_EVERY_S) == scenarios.BURST_SIZE
    steady = [request.shape.arrival_s for request in requests if request.kind == "steady"]
    assert len(steady) / steady[-1] == pytest.approx(20.0, rel=0.1)
    assert bursts[-1] <= steady[-1] + scenarios.BURST_EVERY_S, "no burst long after the stream has ended"


def test_one_request_in_fifty_of_a_mix_is_a_document() -> None:
    requests = Scenario.parse("mix@8x1000", None).requests(1, 40_960)
    documents = [request for request in requests if request.kind == "document"]
    assert len(documents) == 20
    assert {request.shape.prompt_len for request in documents} == {scenarios.DOCUMENT_LEN}
    with pytest.raises(ValueError, match="max_model_len is 4096"):
        Scenario.parse("mix@8x1000", None).requests(1, 4096)


@pytest.mark.parametrize("text", ["mix", "mix@0", "mix:0", "bursts:4", "mix@8x0", "burst@4", "storm@4", "300/20"])
def test_loads_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"write|give|above"):
        parse_load(text, None)


def test_costs_are_grouped_by_what_ran_and_waited() -> None:
    edges = WAITING_EDGES
    named = [range_of(edges, group_of(count, edges)) for count in (0, 1, 100, 101, 10_000, 200_000)]
    assert named == ["0", "1-100", "1-100", "101-1000", "1001-10000", "10001-100000"]


def test_a_budget_by_target_and_classes_keep_what_a_fixed_one_does_not() -> None:
    """Documents make large steps long: without a target readers wait for them, and without classes first tokens do."""
    on, load = make_machine(1024), parse_load("mix@14x500", None)
    rows = {
        (name, str(row["kind"])): row
        for name in simulate.DRAWN_POLICIES
        for row in simulate.simulate(on, name, load, 0, LEVELS, clock_ns=time.monotonic_ns).rows
    }

    def figure(policy: str, kind: str, name: str) -> float:
        return float(str(rows[policy, kind][name]))

    assert all(row["failed"] == 0 for row in rows.values())
    assert figure("fcfs", "all", "p99_itl_ms") > 1.1 * simulate.ITL_TARGET_MS
    for policy in ("dynamic", "classes"):
        assert figure(policy, "all", "p99_itl_ms") < 1.05 * simulate.ITL_TARGET_MS
        assert figure(policy, "all", "request_goodput") > 1.1 * figure("fcfs", "all", "request_goodput")
    assert figure("classes", "chat", "p95_ttft_ms") < 0.8 * figure("dynamic", "chat", "p95_ttft_ms")
