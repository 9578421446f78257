"""Several engines in virtual time: the model against the scheduler, and the router against simpler ways."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import router as router_costs
from benchmarks import simulate
from benchmarks.conversations import Client
from benchmarks.metrics import Figures
from benchmarks.modelled_engine import StepCosts
from benchmarks.replica_rows import run_replicas
from benchmarks.routings import ROUTINGS, make_routing
from benchmarks.scheduled_engine import ScheduledEngine
from benchmarks.simulated_machine import Policy
from benchmarks.simulated_replicas import ReplicaRun, Setting
from graphgen.ipc.attended import Attended
from graphgen.ipc.worker_messages import Bucket, BucketTime, StepTimeTable
from graphgen.router.records import Capacity
from graphgen.scheduler.cost_model import CostModel
from tests.benchmarks.test_simulate import make_machine

ON = make_machine(1024, num_pages=4000)
CAPACITY = Capacity(256, 4000, 64, 1024)


def figure(row: Figures, name: str) -> float:
    return float(str(row[name]))


@pytest.mark.parametrize("load", ["conversations", "uncached"])
def test_a_modelled_engine_does_what_the_scheduler_does(load: str) -> None:
    setting = Setting(load, 1, CAPACITY, seconds=30.0)
    real, model = (run_replicas(ON, setting, "router", are_scheduled) for are_scheduled in (True, False))
    assert figure(model, "request_throughput") == pytest.approx(figure(real, "request_throughput"), rel=0.05)
    assert figure(model, "hit_rate") == pytest.approx(figure(real, "hit_rate"), abs=0.03)
    assert figure(model, "p50_ttft_ms") == pytest.approx(figure(real, "p50_ttft_ms"), rel=0.4)


def test_replicas_give_what_so_many_engines_alone_give_and_more_than_by_simpler_ways() -> None:
    """Twelve engines; the simpler ways find fewer prefixes, however long the run."""
    for load, least, most_of_others in (("conversations", 0.98, 0.96), ("uncached", 0.97, 1.02)):
        alone = figure(
            run_replicas(ON, Setting(load, 1, CAPACITY, seconds=80.0), "router", False), "request_throughput"
        )
        setting = Setting(load, 12, CAPACITY, seconds=16.0)
        of_n = {
            routing: figure(run_replicas(ON, setting, routing, False), "request_throughput") / 12 / alone
            for routing in ROUTINGS
        }
        assert of_n["router"] >= least
        assert of_n["least open"] < most_of_others
        assert of_n["round robin"] <= of_n["least open"] + 0.01


def test_routers_that_know_of_each_other_by_reports_alone_do_nearly_as_well_as_one() -> None:
    one, four = (
        run_replicas(ON, Setting("conversations", 12, CAPACITY, seconds=12.0, num_routers=count), "router", False)
        for count in (1, 4)
    )
    # Each has to learn for itself who keeps what, for which this run is short.
    assert figure(four, "request_throughput") > 0.93 * figure(one, "request_throughput")


@pytest.mark.parametrize("are_scheduled", [True, False])
def test_a_death_loses_no_token_and_its_requests_go_on(are_scheduled: bool) -> None:
    """A run raises where a request gets a token too few or too many."""
    row = run_replicas(ON, Setting("death", 4, CAPACITY, seconds=6.0), "router", are_scheduled)
    assert 8 <= figure(row, "moves") <= 24, "those of one engine of four, each once"
    assert figure(row, "max_ttft_ms") < 1000.0
    calm = run_replicas(ON, Setting("conversations", 4, CAPACITY, seconds=6.0), "router", are_scheduled)
    assert figure(row, "request_throughput") > 0.7 * figure(calm, "request_throughput")


def test_a_slow_engine_costs_what_it_is_slower_and_not_more() -> None:
    rows = {
        (load, routing): run_replicas(ON, Setting(load, 8, CAPACITY, seconds=24.0), routing, False)
        for load in ("conversations", "slow")
        for routing in ("router", "round robin")
    }
    kept = {
        routing: figure(rows["slow", routing], "request_throughput")
        / figure(rows["conversations", routing], "request_throughput")
        for routing in ("router", "round robin")
    }
    assert kept["router"] > 1.0 - 1.3 * (2 / 3) / 8
    assert kept["round robin"] < kept["router"] - 0.1
    assert figure(rows["slow", "router"], "p99_ttft_ms") < 200.0


def test_a_greedy_tenant_leaves_a_modest_one_its_half_of_every_engine() -> None:
    """Each engine is saturated by a quarter of the clients; three quarters are the greedy tenant's."""
    engines = [ScheduledEngine(lambda: ON.scheduler(Policy()), CostModel(ON.table.table)) for _ in range(3)]
    router = make_routing("router", 0)
    for number in range(3):
        router.joined(f"engine {number}", CAPACITY, 0.0)
    setting = Setting("uncached", 3, CAPACITY, clients=64, seconds=24.0)
    run = ReplicaRun(setting, engines, [router], tenant_of=lambda client: "greedy" if client % 4 else "modest")
    run.run()
    counted = np.frombuffer(run.served.ended_s) >= setting.middle_s
    clients = np.frombuffer(run.served.client, np.int64)[counted]
    share = float((clients % 4 == 0).mean())
    assert 0.5 * 0.75 <= share <= 0.6


def test_a_run_is_the_same_again() -> None:
    setting = Setting("bursts", 10, CAPACITY, seconds=4.0)
    one, other = (run_replicas(ON, setting, "router", False) for _ in range(2))
    for name in ("request_throughput", "max_ttft_ms", "per_second", "hit_rate"):
        assert one[name] == other[name]


def test_turns_of_a_conversation_go_on_where_the_last_answer_ended() -> None:
    client = Client(3, 0, 64, shares=True, has_tokens=True)
    before = client.next_turn()
    for _ in range(40):
        turn = client.next_turn()
        assert len(turn.digests) == turn.prompt_len // 64 == len(turn.tokens) // 4 // 64
        if turn.tokens.startswith(before.tokens):
            assert turn.digests[: len(before.digests)] == before.digests
            assert turn.prompt_len > before.prompt_len + before.output_len
        else:
            assert len(set(turn.digests) & set(before.digests)) in (0, 16), "the system prompt, if it is the same"
        before = turn


def test_the_command_writes_rows_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    asked = ["--replicas", "2", "17", "--load", "conversations", "--load", "death", "--seconds", "2"]
    rows = simulate.main([*asked, "--json", str(out), "--plot", str(picture)])
    assert [(row["engines"], row["load"], row["routing"]) for row in rows] == [
        (count, load, routing) for count in (2, 17) for load in ("conversations", "death") for routing in ROUTINGS
    ]
    assert json.loads(out.read_text())["rows"] == rows
    assert 10_000 < picture.stat().st_size < 200_000


@pytest.mark.parametrize(
    "wrong", [["--replicas", "0"], ["--replicas", "2000"], ["--replicas", "2", "--load", "2600/60:16"]]
)
def test_replicas_that_make_no_sense_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        simulate.main(wrong)
    assert "choose from" in (said := capsys.readouterr().err) or "from 1 to 1000" in said


def test_the_cost_of_a_decision_is_that_of_each_of_its_parts() -> None:
    (row,) = router_costs.main(["--engines", "20", "--repeats", "40"])
    assert row["engines"] == 20
    for part in ("digests", "choice", "sent", "served", "refusal"):
        assert 0.5 < figure(row, f"{part} p50") <= figure(row, f"{part} p99")


def test_what_chunks_read_costs_a_modelled_step_as_it_costs_a_real_one() -> None:
    """With a table whose times are linear in rows, as the modelled engine has them."""
    buckets = [Bucket(prefill, decode) for prefill in (0, 256, 512) for decode in (0, 16, 64) if prefill + decode]
    times = tuple(
        BucketTime(bucket, 4.0 + 0.02 * bucket.prefill_rows + 0.03 * bucket.decode_rows) for bucket in buckets
    )
    table = StepTimeTable(times, 1024, 512, 3e-5, 1e-6, 4e-4)
    costs, model = StepCosts.of(table, 1024), CostModel(table)
    for chunks in (((512, 512),), ((0, 512),), ((3000, 100), (0, 412)), ((3000, 100), (2000, 200), (700, 212))):
        attended = Attended(16 * 2000)
        for start, length in chunks:
            attended = attended.with_chunk(start, length)
        real_ms = model.predict_ms(Bucket(512, 16), attended)
        assert 1000.0 * costs.step_s(512, 16, attended) == pytest.approx(real_ms, rel=0.03), chunks
    assert 1000.0 * costs.step_s(0, 64, Attended(64 * 1024)) == pytest.approx(4.0 + 0.03 * 64)
