"""The engine end to end on the embedded model: real processes, real tokenizer, real text."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from graphgen import Engine, EngineClosedError, InvalidRequestError, RequestOutput, SamplingParams, StreamPiece, demo
from graphgen.calls.prompts import Prompt

GREEDY = SamplingParams(max_tokens=24, temperature=0)
PROMPTS = ["ROMEO:\n", "To be, or", "What, ho! My lord of Gloucester, come away", "A"]
SMALL = {"device": "cpu", "token_budget": 32, "num_pages": 160, "cpu_threads": 1}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(**SMALL) as engine:  # type: ignore[arg-type]  # a plain dict of settings
        yield engine


@pytest.fixture(scope="module")
def tokenizer() -> Any:  # transformers publishes no types
    return AutoTokenizer.from_pretrained(str(demo.model_folder()))


@pytest.fixture(scope="module")
def greedy(engine: Engine) -> list[RequestOutput]:
    return engine.generate(PROMPTS, GREEDY)


def wait_until_free(engine: Engine, within_s: float = 2.0) -> None:
    """Every page is free and nothing runs or waits, soon."""
    deadline = time.monotonic() + within_s
    while (stats := engine.stats()).pages_free < stats.pages_total or stats.running or stats.waiting:
        assert time.monotonic() < deadline, stats
        time.sleep(0.01)


def test_greedy_tokens_and_text_are_hugging_faces(tokenizer: Any, greedy: list[RequestOutput]) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(demo.model_folder()), dtype="float32")
    for prompt, output in zip(PROMPTS[:2], greedy, strict=False):
        inputs = tokenizer(prompt, return_tensors="pt")
        expected = model.generate(**inputs, max_new_tokens=24, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ].tolist()
        assert list(output.prompt_token_ids) == inputs["input_ids"][0].tolist()
        assert list(output.token_ids) == expected
        assert output.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_text_ids_and_mixed_prompts_give_the_same_outputs(engine: Engine, greedy: list[RequestOutput]) -> None:
    ids: list[Prompt] = [list(output.prompt_token_ids) for output in greedy]
    expected = [output.token_ids for output in greedy]
    assert [output.token_ids for output in engine.generate(ids, GREEDY)] == expected
    assert [output.token_ids for output in engine.generate([PROMPTS[0], ids[1]], GREEDY)] == expected[:2]


def test_a_single_prompt_gives_a_list_of_one(engine: Engine, greedy: list[RequestOutput]) -> None:
    for prompt in (PROMPTS[1], list(greedy[1].prompt_token_ids), tuple(greedy[1].prompt_token_ids)):
        (output,) = engine.generate(prompt, GREEDY)
        assert output.token_ids == greedy[1].token_ids
    assert engine.generate([]) == []


def test_each_prompt_may_have_its_own_sampling(engine: Engine, greedy: list[RequestOutput]) -> None:
    lengths = [SamplingParams(max_tokens=number, temperature=0) for number in (1, 5, 9, 13)]
    outputs = engine.generate(PROMPTS, lengths)
    assert [output.token_ids for output in outputs] == [
        output.token_ids[:number] for output, number in zip(greedy, (1, 5, 9, 13), strict=True)
    ]
    assert {output.finish_reason for output in outputs} == {"length"}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_streamed_text_is_the_text_of_the_whole_output(engine: Engine, tokenizer: Any, temperature: float) -> None:
    sampling = SamplingParams(max_tokens=60, temperature=temperature, seed=7, ignore_eos=True)
    (output,) = engine.generate(PROMPTS[0], sampling)
    pieces = list(engine.stream(PROMPTS[0], sampling))
    assert "".join(piece.text for piece in pieces) == output.text == tokenizer.decode(output.token_ids)
    assert tuple(token_id for piece in pieces for token_id in piece.token_ids) == output.token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_a_seed_gives_its_tokens_whatever_else_runs(engine: Engine) -> None:
    seeded = SamplingParams(max_tokens=20, seed=11)
    (alone,) = engine.generate(PROMPTS[0], seeded)
    others = [SamplingParams(max_tokens=20, seed=number, temperature=2.0) for number in range(3)]
    together = engine.generate([*PROMPTS[1:], PROMPTS[0]], [*others, seeded])
    assert together[-1].token_ids == alone.token_ids


def test_without_a_seed_each_request_draws_its_own(engine: Engine) -> None:
    outputs = engine.generate([PROMPTS[0]] * 4, SamplingParams(max_tokens=20))
    assert len({output.token_ids for output in outputs}) > 1


def test_a_stop_string_cuts_the_text_wherever_its_tokens_lie(engine: Engine, greedy: list[RequestOutput]) -> None:
    whole = greedy[2].text
    for start in range(4, len(whole) - 4, 5):
        stop = whole[start : start + 3]
        cut = whole[: whole.index(stop)]
        sampling = SamplingParams(max_tokens=24, temperature=0, stop=["never there", stop])
        (output,) = engine.generate(PROMPTS[2], sampling)
        assert (output.text, output.finish_reason) == (cut, "stop")
        assert "".join(piece.text for piece in engine.stream(PROMPTS[2], sampling)) == cut
    wait_until_free(engine)


def test_stop_strings_leave_the_end_of_sequence_on(engine: Engine, greedy: list[RequestOutput]) -> None:
    """And may be many tokens long: both were otherwise in DeepSpeed-MII."""
    eos = engine.resolved.eos_token_ids
    assert eos
    assert SamplingParams(stop=["never"], stop_token_ids=[5]).resolve_stop_token_ids(eos) == (*eos, 5)
    stop = greedy[0].text[10:22]
    (cut,) = engine.generate(PROMPTS[0], SamplingParams(max_tokens=24, temperature=0, stop=stop))
    assert (cut.text, cut.finish_reason) == (greedy[0].text[: greedy[0].text.index(stop)], "stop")
    assert len(engine.generate(stop, SamplingParams(max_tokens=1))[0].prompt_token_ids) > 1


def test_a_stop_token_ends_and_is_the_last_token(engine: Engine, greedy: list[RequestOutput]) -> None:
    token_ids = greedy[2].token_ids
    stop_id = token_ids[10]
    first = token_ids.index(stop_id)
    (output,) = engine.generate(PROMPTS[2], SamplingParams(max_tokens=24, temperature=0, stop_token_ids=[stop_id]))
    assert (output.token_ids, output.finish_reason) == (token_ids[: first + 1], "stop")
    sampling = SamplingParams(max_tokens=24, temperature=0, stop_token_ids=[stop_id], min_tokens=20)
    (output,) = engine.generate(PROMPTS[2], sampling)
    assert len(output.token_ids) >= 20


def test_the_output_ends_with_the_context(engine: Engine) -> None:
    prompt = [5] * 1020
    for max_tokens in (None, 500):
        (output,) = engine.generate(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        assert (len(output.token_ids), output.finish_reason) == (4, "length")


def test_timing_is_ordered(greedy: list[RequestOutput]) -> None:
    for output in greedy:
        timing = output.timing
        assert 0 <= timing.queued_s <= timing.first_token_s <= timing.total_s
        assert list(timing.token_times_s) == sorted(timing.token_times_s)
        assert len(timing.token_times_s) == len(output.token_ids)


BAD_PROMPTS: list[tuple[Any, str]] = [
    ("", "empty"),
    ([[]], "empty"),
    ([["x"]], "plain ints"),
    ([[True]], "plain ints"),
    ([[1.5]], "plain ints"),
    ([[-1]], "vocabulary"),
    ([[5, 1024]], "vocabulary"),
    ([[2**40]], "vocabulary"),
    ([[5] * 1024], "max_model_len is 1024"),
    (["fine", ""], "prompt 1 is empty"),
    ([None], "NoneType"),
    ([b"bytes"], "bytes"),
    (None, "NoneType"),
    (7, "int"),
    ({"prompt": "x"}, "dict"),
    ("\ud800", "Unicode"),
]


@pytest.mark.parametrize(("prompts", "words"), BAD_PROMPTS)
def test_bad_prompts_are_refused_before_any_is_sent(engine: Engine, prompts: Any, words: str) -> None:
    before = engine.stats()
    with pytest.raises(InvalidRequestError, match=words):
        engine.generate(prompts, GREEDY)
    after = engine.stats()
    assert (after.steps, after.finished, after.running) == (before.steps, before.finished, 0)


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ([GREEDY], "1 SamplingParams for 2 prompts"),
        ([GREEDY, None], "one for each prompt"),
        ({"temperature": 1}, "one SamplingParams"),
        (SamplingParams(stop_token_ids=[1024]), "outside the vocabulary"),
        (SamplingParams(max_tokens=None, min_tokens=2000), "min_tokens"),
    ],
)
def test_bad_sampling_is_refused_before_any_is_sent(engine: Engine, sampling: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        engine.generate(PROMPTS[:2], sampling)


def test_bad_prompts_leave_others_untouched(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=80, temperature=0, ignore_eos=True)
    (expected,) = engine.generate(PROMPTS[0], sampling)
    pieces: list[StreamPiece] = []
    for number, piece in enumerate(engine.stream(PROMPTS[0], sampling)):
        pieces.append(piece)
        if number % 10 == 0:
            with pytest.raises(ValueError, match="empty"):
                engine.generate(["fine", ""])
    assert tuple(token_id for piece in pieces for token_id in piece.token_ids) == expected.token_ids


def test_a_prompt_that_the_pages_cannot_hold_is_refused_with_the_numbers() -> None:
    with Engine(**{**SMALL, "num_pages": 4, "token_budget": 8}) as small:  # type: ignore[arg-type]  # settings
        with pytest.raises(InvalidRequestError, match=r"70 tokens .* 64 positions .*\(4 pages of 16\)"):
            small.generate([5] * 70, SamplingParams(max_tokens=1))
        with pytest.raises(InvalidRequestError, match="raise num_pages"):
            small.generate([5] * 10, SamplingParams(max_tokens=128))
        (output,) = small.generate([5] * 10, SamplingParams(max_tokens=None, ignore_eos=True))
        assert len(output.token_ids) == 64 - 10 + 1


def test_several_threads_generate_and_stream_at_once(engine: Engine, greedy: list[RequestOutput]) -> None:
    def streamed(number: int) -> tuple[int, ...]:
        return tuple(token_id for piece in engine.stream(PROMPTS[number], GREEDY) for token_id in piece.token_ids)

    def generated(number: int) -> tuple[int, ...]:
        return engine.generate(PROMPTS, GREEDY)[number].token_ids

    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(call, number) for number in range(4) for call in (streamed, generated)]
        for number, result in enumerate(results):
            assert result.result(30) == greedy[number // 2].token_ids


def test_leaving_a_stream_frees_its_pages(engine: Engine) -> None:
    endless = SamplingParams(max_tokens=None, ignore_eos=True)
    for _ in engine.stream(PROMPTS[0], endless):
        break
    wait_until_free(engine)
    stream = engine.stream(PROMPTS[0], endless)
    next(stream)
    assert engine.stats().running == 1
    stream.close()
    assert list(stream) == []
    wait_until_free(engine)
    with engine.stream(PROMPTS[0], endless) as stream:
        next(stream)
    wait_until_free(engine)
    engine.stream(PROMPTS[0], endless)  # never read
    wait_until_free(engine)


def test_stats_count(engine: Engine) -> None:
    before = engine.stats()
    engine.generate(PROMPTS, GREEDY)
    after = engine.stats()
    assert after.finished - before.finished == len(PROMPTS)
    assert after.steps - before.steps >= 24
    assert (after.pages_total, after.eager_steps) == (160, 0)
    assert 0 < after.step_ms_p50 <= after.step_ms_p95 <= after.step_ms_p99 <= after.step_ms_max
    assert 0 <= after.padding_share < 1


def test_info_says_what_was_decided(engine: Engine) -> None:
    assert engine.info.worker.device == "cpu"
    assert max(bucket.num_rows for bucket in engine.info.worker.buckets) == engine.info.token_budget == 32
    assert engine.info.num_slots == 24
    assert {phase.name for phase in engine.info.worker.phases} >= {"load", "capture"}


def test_closing_ends_waiting_calls_and_later_ones_and_may_be_repeated() -> None:
    engine = Engine(**{**SMALL, "token_budget": 8})  # type: ignore[arg-type]  # settings
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            engine.generate(PROMPTS * 20, SamplingParams(max_tokens=900, ignore_eos=True))
        except BaseException as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while engine.stats().running == 0:
        time.sleep(0.01)
    engine.close()
    waiting.join(2.0)
    assert [type(error) for error in errors] == [EngineClosedError]
    with pytest.raises(EngineClosedError):
        engine.generate("x")
    with pytest.raises(EngineClosedError):
        engine.stats()
    engine.close()


def test_requests_with_different_numbers_of_stop_strings_run_in_one_batch(engine: Engine) -> None:
    """Each ends by its own strings and by no other's."""
    plain = engine.generate(PROMPTS[0], SamplingParams(max_tokens=24, temperature=0))[0].text
    middle = plain[len(plain) // 2 : len(plain) // 2 + 3]
    stops: list[list[str]] = [[], [middle], ["never there", middle, "nor there"]]
    sampling = [SamplingParams(max_tokens=24, temperature=0, stop=stop) for stop in stops]
    outputs = engine.generate([PROMPTS[0]] * 3, sampling)
    assert [output.finish_reason for output in outputs] == ["length", "stop", "stop"]
    assert outputs[0].text == plain
    assert outputs[1].text == outputs[2].text == plain[: plain.index(middle)]


def test_what_a_request_passes_has_run_before_the_first_one_and_left_no_trace() -> None:
    with Engine(**SMALL) as engine:  # type: ignore[arg-type]  # a plain dict of settings
        stats = engine.stats()
        assert [phase.name for phase in engine.info.worker.phases][-1] == "warm-up"
        assert (stats.steps, stats.finished, stats.graph_replays, stats.prefix_queries) == (0, 0, 0, 0)
        assert (stats.pages_free, stats.pages_cached, stats.step_ms_max) == (stats.pages_total, 0, 0.0)
        (output,) = engine.generate([[0] * 12], GREEDY)
        assert output.cached_tokens == 0, "the warm-up's prompt of zeros is not shared"
