"""Shared prompts, service classes and deadlines end to end, on the embedded model."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from graphgen import DeadlineError, Engine, InvalidRequestError, OverloadedError, SamplingParams
from tests import step_logs

PAGE_SIZE = 16
PREFIX = [(number * 37) % 1000 + 1 for number in range(300)]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "steps.jsonl"


@pytest.fixture(scope="module")
def engine(log: Path) -> Iterator[Engine]:
    with Engine(
        device="cpu", token_budget=64, num_pages=200, max_num_seqs=4, cpu_threads=1, page_size=16, step_log=str(log)
    ) as engine:
        yield engine


def with_(sampling: SamplingParams, **changes: object) -> SamplingParams:
    return msgspec.structs.replace(sampling, **changes)


def computed_tokens(engine: Engine, log: Path, request_id: int) -> int:
    engine.stats()  # the log is written out
    return sum(length for step in step_logs.read(log) for request, _, length in step.chunks if request == request_id)


def test_the_same_prefix_is_computed_once_and_gives_the_same_tokens(engine: Engine, log: Path) -> None:
    prompt = [*PREFIX, 5, 6, 7]
    before = engine.stats()
    (first,) = engine.generate([prompt], GREEDY)
    (second,) = engine.generate([prompt], GREEDY)
    assert first.token_ids == second.token_ids
    assert (first.cached_tokens, second.cached_tokens) == (0, 302)
    assert computed_tokens(engine, log, first.request_id) == len(prompt)
    assert computed_tokens(engine, log, second.request_id) == 1
    after = engine.stats()
    assert after.prefix_queries - before.prefix_queries == 2 * len(prompt)
    assert after.prefix_hits - before.prefix_hits == 302
    assert after.pages_cached > 0


def test_tokens_do_not_depend_on_what_was_cached(engine: Engine) -> None:
    prompts = [[*PREFIX[:length], 500 + length] for length in (15, 16, 17, 31, 32, 33, 200)]
    fresh = [engine.generate([prompt], with_(GREEDY, cache_salt=f"{prompt[-1]}"))[0] for prompt in prompts]
    cached = engine.generate(prompts, GREEDY)
    assert [one.token_ids for one in cached] == [one.token_ids for one in fresh]
    assert all(one.cached_tokens == 0 for one in fresh)
    assert cached[-1].cached_tokens >= 192


def test_two_tenants_never_share(engine: Engine) -> None:
    prompt = [11, *PREFIX]
    outputs = [engine.generate([prompt], with_(GREEDY, cache_salt=salt))[0] for salt in ("a", "b", "a")]
    assert [output.cached_tokens for output in outputs] == [0, 0, 300]
    assert len({output.token_ids for output in outputs}) == 1


def test_n_samples_share_the_prompt_and_differ_by_their_seeds(engine: Engine, log: Path) -> None:
    prompt = [12, *PREFIX[:100]]
    sampling = SamplingParams(max_tokens=16, temperature=1.0, seed=7, n=4, ignore_eos=True)
    outputs = engine.generate([prompt, [1, 2, 3]], [sampling, GREEDY])
    assert [output.sample_index for output in outputs] == [0, 1, 2, 3, 0]
    assert [computed_tokens(engine, log, output.request_id) for output in outputs[:4]] == [101, 1, 1, 1]
    assert len({output.token_ids for output in outputs[:4]}) == 4
    alone = [engine.generate([prompt], with_(sampling, n=1, seed=7 + number))[0] for number in range(4)]
    assert [output.token_ids for output in alone] == [output.token_ids for output in outputs[:4]]


def test_a_stream_of_n_samples_is_the_samples_mixed(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=10, temperature=1.0, seed=3, n=3, ignore_eos=True)
    want = [output.text for output in engine.generate("ROMEO:\n", sampling)]
    texts = ["", "", ""]
    for piece in engine.stream("ROMEO:\n", sampling):
        texts[piece.sample_index] += piece.text
    assert texts == want


def test_a_higher_class_overtakes_and_no_token_is_lost(engine: Engine) -> None:
    """Four slots are taken by long requests of the lowest class; a fifth request does not wait for one to end."""
    long = SamplingParams(max_tokens=250, temperature=0, ignore_eos=True)
    ended: dict[str, float] = {}
    tokens: dict[str, int] = {}

    def serve(name: str, sampling: SamplingParams) -> None:
        outputs = engine.generate([[21, 22]] * (4 if name == "low" else 1), sampling)
        ended[name] = time.monotonic()
        tokens[name] = sum(len(output.token_ids) for output in outputs)

    before = engine.stats().preemptions
    low = threading.Thread(target=serve, args=("low", long))
    low.start()
    while engine.stats().running < 4:
        time.sleep(0.005)
    serve("high", with_(GREEDY, priority=5))
    low.join(60)
    assert ended["high"] < ended["low"]
    assert tokens == {"high": 12, "low": 1000}
    assert engine.stats().preemptions > before


def test_what_cannot_meet_its_deadline_is_refused_at_once(engine: Engine) -> None:
    engine.generate([[1, 2, 3]], GREEDY)  # steps were timed
    before = engine.stats()
    with pytest.raises(DeadlineError, match="deadline_ms is 5"):
        engine.generate([[31, 32]], SamplingParams(max_tokens=900, ignore_eos=True, deadline_ms=5.0))
    with pytest.raises(DeadlineError):
        for _ in engine.stream([31, 32], SamplingParams(max_tokens=900, ignore_eos=True, deadline_ms=5.0)):
            pass
    after = engine.stats()
    assert after.refused - before.refused == 2
    assert after.deadline_misses == before.deadline_misses, "before the deadline has passed"
    assert (after.running, after.waiting) == (0, 0)
    (output,) = engine.generate([[31, 32]], with_(GREEDY, deadline_ms=60_000.0))
    assert len(output.token_ids) == 12


def test_cancelling_one_sample_of_a_shared_prompt_leaves_the_others(engine: Engine) -> None:
    prompt = [13, *PREFIX[:64]]
    sampling = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    (want,) = engine.generate([prompt], sampling)
    streams = [engine.stream(prompt, sampling) for _ in range(3)]
    for stream in streams:
        next(stream)
    streams[1].close()
    rest = [tuple(token for piece in streams[number] for token in piece.token_ids) for number in (0, 2)]
    assert rest == [want.token_ids[1:]] * 2
    deadline_s = time.monotonic() + 2.0
    while (stats := engine.stats()).pages_free < stats.pages_total:
        assert time.monotonic() < deadline_s, stats
        time.sleep(0.01)


def test_a_deadline_that_passes_ends_the_request_and_a_full_queue_refuses() -> None:
    with Engine(device="cpu", token_budget=16, num_pages=80, max_num_seqs=1, max_waiting=2, cpu_threads=1) as small:
        # No step was ever timed, so this one is accepted.
        with pytest.raises(DeadlineError, match="of at most 900 tokens of output"):
            small.generate([[1, 2]], SamplingParams(max_tokens=900, ignore_eos=True, deadline_ms=150.0))
        stats = small.stats()
        assert (stats.deadline_misses, stats.running, stats.waiting) == (1, 0, 0)
        assert stats.pages_free == stats.pages_total
        with pytest.raises(OverloadedError, match="max_waiting is 2") as caught:
            small.generate([[1, 2]] * 8, SamplingParams(max_tokens=200, ignore_eos=True))
        assert caught.value.retry_after_s > 0
        small.generate([[1, 2]] * 2, GREEDY)


@pytest.mark.parametrize(
    ("name", "value"),
    [("priority", 10), ("priority", -1), ("deadline_ms", 0.0), ("itl_target_ms", -5.0), ("n", 17), ("n", 0)],
)
def test_bad_service_parameters_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} is {value}"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]  # bad on purpose
