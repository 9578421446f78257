"""Step logs and their timelines: what is read is what was written, and the trace is one that Perfetto can show."""

import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import timeline
from benchmarks.step_log import Step, StepLogReader, idle_share, summarize_steps


def make_step(number: int, begin_s: float, length_s: float = 0.010, **changes: Any) -> Step:
    """Planned while the step before it ran, so that two plans are on their way at once."""
    step = Step(
        step=number,
        bucket=(8, 4),
        chunks=((7, 16 * number, 5), (8, 0, 1)),
        decodes=(1, 2, 3),
        padding=3,
        planned_s=begin_s - 0.012,
        received_s=begin_s - 0.001,
        launched_s=begin_s - 0.0005,
        started_s=begin_s,
        finished_s=begin_s + length_s,
    )
    return msgspec.structs.replace(step, **changes)


STEPS = [make_step(number, 100.0 + number * 0.010) for number in range(300)]


def write_log(path: Path, steps: list[Step]) -> Path:
    path.write_bytes(b"".join(msgspec.json.encode(step) + b"\n" for step in steps))
    return path


def test_a_growing_log_is_read_once_and_never_half_a_line(tmp_path: Path) -> None:
    path = write_log(tmp_path / "steps.jsonl", STEPS[:2])
    reader = StepLogReader(path)
    assert reader.read_new() == STEPS[:2]
    line = msgspec.json.encode(STEPS[2]) + b"\n"
    with path.open("ab") as file:
        file.write(line[:30])
    assert reader.read_new() == []
    with path.open("ab") as file:
        file.write(line[30:])
    assert reader.read_new() == [STEPS[2]]


def test_figures_of_steps() -> None:
    steps = [make_step(0, 1.0, 0.010), make_step(1, 1.020, 0.030, padding=9)]
    figures = summarize_steps(steps)
    assert figures["steps"] == 2
    assert figures["padding_share"] == pytest.approx(12 / 24)
    assert figures["device_idle_share"] == pytest.approx(0.010 / 0.050)
    assert figures["p50_step_ms"] == pytest.approx(20.0)
    assert summarize_steps([])["padding_share"] is None
    overlapping = [make_step(0, 1.0, 0.010), make_step(1, 1.009, 0.010)]
    assert idle_share(overlapping) == 0.0, "an overlap does not make up for a gap elsewhere"


def test_a_window_holds_the_steps_that_ran_in_it() -> None:
    assert [step.step for step in timeline.window(STEPS, 0.005, 0.020)] == [0, 1, 2]
    middle = timeline.window(STEPS, None, 1.0)
    assert middle[0].step == pytest.approx(100, abs=1)
    assert len(middle) == pytest.approx(100, abs=1)
    assert timeline.window(STEPS[:5], None, 1.0) == STEPS[:5]
    with pytest.raises(ValueError, match=r"the log goes from 0 to 3\.000 s: choose another --start-s"):
        timeline.window(STEPS, 50.0, 1.0)
    with pytest.raises(ValueError, match="empty"):
        timeline.window([], None, 1.0)


def slices_of(trace: dict[str, Any], track: int) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and event["tid"] == track]


def test_a_trace_shows_every_step_on_three_tracks_in_microseconds() -> None:
    trace: dict[str, Any] = timeline.chrome_trace(STEPS[:4])
    device = slices_of(trace, timeline.DEVICE)
    assert [event["name"] for event in device] == [f"step {n}: 6 prompt tokens + 3 decodes" for n in range(4)]
    assert [event["ts"] for event in device] == pytest.approx([12_000.0 + n * 10_000 for n in range(4)])
    assert [event["dur"] for event in device] == pytest.approx([10_000.0] * 4)
    assert device[1]["args"]["bucket"] == "8+4"
    assert device[1]["args"]["chunks"] == ["request 7: 16..21", "request 8: 0..1"]
    assert device[1]["args"]["ms from plan to start"] == pytest.approx(12.0)
    assert [event["ts"] for event in slices_of(trace, timeline.SCHEDULER)] == pytest.approx([0, 10_000, 20_000, 30_000])
    names = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert names == timeline.TRACK_NAMES


def test_slices_of_a_track_never_overlap_and_every_arrow_starts_and_ends_on_one() -> None:
    jittered = [make_step(n, 5.0 + n * 0.009, 0.0095, planned_s=4.98 + n * 0.001) for n in range(20)]
    trace: dict[str, Any] = timeline.chrome_trace(jittered)
    for track in timeline.TRACK_NAMES:
        slices = slices_of(trace, track)
        assert len(slices) == 20
        assert all(event["dur"] >= 0 for event in slices)
        for before, after in itertools.pairwise(slices):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-6
    begins = {(event["tid"], event["ts"]) for event in trace["traceEvents"] if event["ph"] == "X"}
    arrows = [event for event in trace["traceEvents"] if event["ph"] in "stf"]
    assert {(event["tid"], event["ts"]) for event in arrows} <= begins
    for step in jittered:
        assert [event["ph"] for event in arrows if event["id"] == step.step] == ["s", "t", "f"]


def test_the_script_writes_the_whole_log_or_a_part_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, out = write_log(tmp_path / "steps.jsonl", STEPS), tmp_path / "trace.json"
    timeline.main([str(log), "--out", str(out)])
    assert len(slices_of(json.loads(out.read_text()), timeline.DEVICE)) == 300, "the whole log"
    assert "600 prompt tokens and 300 decode tokens, device busy 100.0%" in capsys.readouterr().out
    timeline.main([str(log), "--out", str(out), "--start-s", "1", "--seconds", "0.5"])
    assert len(slices_of(json.loads(out.read_text()), timeline.DEVICE)) == pytest.approx(50, abs=1)


def test_a_file_that_is_no_step_log_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"hello": 1}\n')
    with pytest.raises(SystemExit):
        timeline.main([str(path)])
    assert "missing required field" in capsys.readouterr().err
