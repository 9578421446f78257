"""What users print is short, and says what it is of."""

import msgspec
from msgspec import convert

from graphgen import Engine, EngineStats, SamplingParams
from graphgen.calls.outputs import RequestOutput, StreamPiece, Timing
from graphgen.ipc.ggp.messages import Health, Welcome
from graphgen.ipc.short import MAX_ITEMS, short
from graphgen.ipc.vectors.server_accepted import WELCOME_VALUE
from tests.fakes import READY, STATS

LONG = 4096
OUTPUT = RequestOutput(
    request_id=7,
    prompt_token_ids=tuple(range(LONG)),
    token_ids=tuple(range(LONG)),
    text="To be, or not to be. " * LONG,
    finish_reason="length",
    timing=Timing(0.001234567, 0.0234567, 12.3456789, tuple(float(number) for number in range(LONG))),
)


def test_an_output_of_thousands_of_tokens_is_a_few_lines() -> None:
    shown = repr(OUTPUT)
    assert len(shown) < 500
    for words in ("request_id=7", "<4096 items>", "To be, or not to be", "finish_reason='length'", "12.35"):
        assert words in shown
    assert repr([OUTPUT]) == f"[{shown}]"


def test_short_values_are_shown_whole_and_defaults_left_out() -> None:
    assert repr(StreamPiece(" to", (284,), None)) == "StreamPiece(text=' to', token_ids=(284,), finish_reason=None)"
    assert (
        repr(Health(status="ok", ready=True, worker_ms=0.5778)) == "Health(status='ok', ready=True, worker_ms=0.5778)"
    )


def test_floats_in_short_lists_have_four_digits_too() -> None:
    timing = Timing(0.0003656, 0.01923, 0.05655, (0.01922580000000593, 0.0395511839997198))
    assert "token_times_s=(0.01923, 0.03955)" in repr(timing)
    assert [short(value) for value in ((1.23456,), [], [("a", 0.1234567)])] == ["(1.235,)", "[]", "[('a', 0.1235)]"]


def test_stats_and_info_are_short() -> None:
    stats = msgspec.structs.replace(STATS, step_ms_p50=16.31418799979656)
    assert isinstance(stats, EngineStats)
    assert "step_ms_p50=16.31," in repr(stats)
    assert len(repr(stats)) < 500
    many = msgspec.structs.replace(READY.worker, buckets=READY.worker.buckets * 50)
    assert len(repr(msgspec.structs.replace(READY, worker=many))) < 1000


def test_lists_and_texts_are_cut_at_their_limits() -> None:
    assert short(list(range(MAX_ITEMS))) == repr(list(range(MAX_ITEMS)))
    assert short(tuple(range(MAX_ITEMS + 1))) == f"<{MAX_ITEMS + 1} items>"
    assert short("x" * 80) == repr("x" * 80)
    assert short("a" * 500 + "b").startswith("<501 characters: 'aaa")
    assert short("a" * 500 + "b").endswith("ab'>")


def test_an_engine_says_what_runs_where() -> None:
    with Engine(device="cpu", token_budget=8, num_pages=64) as engine:
        assert repr(engine) == ("<Engine of the demo model on cpu, float32, max_model_len 1024, 64 pages of 16>")
        engine.generate([1], SamplingParams(max_tokens=1))


def test_what_is_printed_of_a_server_keeps_the_sessions_name_secret() -> None:
    """Who knows it may cancel the session's requests, and what is printed ends in logs."""
    info = convert(WELCOME_VALUE, Welcome)
    assert info.session == WELCOME_VALUE["session"] == "5f3a"
    assert "5f3a" not in repr(info)
    assert "model='demo'" in repr(info)
