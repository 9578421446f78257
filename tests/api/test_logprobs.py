"""Log-probabilities as a program gets them: packed until looked at, with the bytes that texts are made of."""

from collections.abc import Iterator

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from graphgen import Choice, Engine, InvalidRequestError, Logprobs, SamplingParams, demo

PROMPT = "To be, or not to be: é, 語 and 😀"
GREEDY = SamplingParams(max_tokens=12, temperature=0, logprobs=2, prompt_logprobs=1, ignore_eos=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(device="cpu", dtype="float32", token_budget=16, num_pages=100, page_size=16, cpu_threads=1) as engine:
        yield engine


def test_they_are_those_of_transformers_and_their_bytes_are_the_text(engine: Engine) -> None:
    (output,) = engine.generate(PROMPT, GREEDY)
    ids = [*output.prompt_token_ids, *output.token_ids]
    model = AutoModelForCausalLM.from_pretrained(str(demo.model_folder()), dtype="float32")
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    of_prompt, of_output = output.prompt_logprobs, output.logprobs
    assert of_prompt is not None
    assert of_output is not None
    assert [one.token_id for one in (*of_prompt, *of_output)] == ids[1:]
    for row, one, num_top in zip(expected, (*of_prompt, *of_output), [1] * len(of_prompt) + [2] * 12, strict=False):
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-4)
        assert [top.logprob for top in one.top] == pytest.approx(row.topk(num_top).values.tolist(), abs=1e-4)
    assert of_prompt.before + b"".join(one.token for one in of_prompt) == PROMPT.encode()
    assert b"".join(one.token for one in of_output).decode() == output.text
    assert all(one.rank == 1 and one.top[0].token_id == one.token_id for one in of_output), "greedy"
    assert of_output[-1] == of_output[11]
    with pytest.raises(IndexError):
        of_output[12]


def test_a_stream_has_those_of_its_tokens_and_first_those_of_the_prompt(engine: Engine) -> None:
    (output,) = engine.generate(PROMPT, GREEDY)
    pieces = list(engine.stream(PROMPT, GREEDY))
    assert [piece.prompt_logprobs for piece in pieces] == [output.prompt_logprobs, *[None] * (len(pieces) - 1)]
    found = [one for piece in pieces for one in piece.logprobs or ()]
    assert output.logprobs is not None
    assert found == list(output.logprobs)
    assert all(len(piece.logprobs or ()) == len(piece.token_ids) for piece in pieces)


def test_each_of_n_outputs_has_its_own_and_the_first_those_of_the_prompt(engine: Engine) -> None:
    prompt = list(range(30, 110))
    sampling = SamplingParams(max_tokens=8, n=3, seed=7, temperature=1.0, logprobs=0, prompt_logprobs=0)
    outputs = engine.generate([prompt], sampling)
    assert [one.cached_tokens > 0 for one in outputs] == [False, True, True], "the prompt is computed once"
    assert [one.prompt_logprobs is not None for one in outputs] == [True, False, False]
    assert len({one.token_ids for one in outputs}) == 3
    for one in outputs:
        assert one.logprobs is not None
        assert one.logprobs.token_ids == one.token_ids
    alone = engine.generate([prompt] * 3, [msgspec.structs.replace(sampling, n=1, seed=7 + i) for i in range(3)])
    assert [one.token_ids for one in alone] == [one.token_ids for one in outputs]
    for one, other in zip(outputs, alone, strict=True):
        assert isinstance(one.logprobs, Logprobs)
        assert other.prompt_logprobs is not None
        expected = [row.logprob for row in other.logprobs or ()]
        assert [row.logprob for row in one.logprobs] == pytest.approx(expected, abs=1e-4)
    plain = engine.generate([prompt], SamplingParams(max_tokens=8, n=3, seed=7, temperature=1.0))
    assert [one.token_ids for one in plain] == [one.token_ids for one in outputs], "asking changes no token"
    assert plain[0].logprobs is plain[0].prompt_logprobs is None


def test_a_stop_string_takes_no_log_probability_of_what_it_kept(engine: Engine) -> None:
    (whole,) = engine.generate("ROMEO:\n", GREEDY)
    stop = whole.text[5:8]
    (output,) = engine.generate("ROMEO:\n", msgspec.structs.replace(GREEDY, stop=stop))
    assert output.finish_reason == "stop"
    assert output.logprobs is not None
    assert len(output.logprobs) == len(output.token_ids) < 12


def test_a_prompt_of_one_token_has_none_and_a_cached_one_has_all(engine: Engine) -> None:
    (output,) = engine.generate([[5]], GREEDY)
    assert output.prompt_logprobs is not None
    assert (len(output.prompt_logprobs), output.prompt_logprobs.before) == (0, engine.tokenizer.decode([5]).encode())
    prompt = list(range(200, 280))
    first, second = (engine.generate([prompt], GREEDY)[0] for _ in range(2))
    assert second.cached_tokens == 0
    assert second.prompt_logprobs == first.prompt_logprobs
    assert engine.generate([prompt], SamplingParams(max_tokens=1))[0].cached_tokens > 0, "others still share its pages"


def test_of_a_constrained_output_they_are_those_without_the_grammar(engine: Engine) -> None:
    prompt = "To be, or not to be"
    sampling = SamplingParams(max_tokens=12, temperature=0, logprobs=1, structured=Choice(["yes!", "zounds"]))
    (output,) = engine.generate(prompt, sampling)
    assert output.text in ("yes!", "zounds")
    found = output.logprobs
    assert found is not None
    assert found.token_ids == output.token_ids
    ids = [*output.prompt_token_ids, *output.token_ids]
    (free,) = engine.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=1))
    assert free.prompt_logprobs is not None
    expected = list(free.prompt_logprobs)[-len(found) :]
    assert [one.rank for one in found] == [one.rank for one in expected]
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected], abs=1e-4)
    assert found[0].rank > 1, "the grammar made it draw another token than the likeliest"


def test_more_than_the_limit_is_refused_with_the_limit() -> None:
    with pytest.raises(InvalidRequestError, match="logprobs is 21: use a value from 0 to 20"):
        SamplingParams(logprobs=21)
