"""Log-probabilities of a server: over its own protocol those of an engine, over HTTP in OpenAI's two forms."""

from collections.abc import Iterator

import pytest

from graphgen import Client, Engine, InvalidRequestError, RequestOutput, SamplingParams
from graphgen.ipc.ggp.messages import Generate, Sampling
from graphgen.server.frontend.prepare import check_frame

PROMPT = "To be, or not to be: é, 語 and 😀"
SAMPLING = SamplingParams(max_tokens=12, temperature=0.9, seed=5, n=2, logprobs=2, prompt_logprobs=1, ignore_eos=True)


@pytest.fixture(scope="module")
def expected() -> Iterator[list[RequestOutput]]:
    """What an engine in this program says of it."""
    with Engine(device="cpu", token_budget=64, num_pages=100, cpu_threads=1) as engine:
        yield engine.generate(PROMPT, SAMPLING)


def same(found: RequestOutput, expected: RequestOutput) -> None:
    """Numbers may differ in their last bits, where steps were of other sizes."""
    for name in ("logprobs", "prompt_logprobs"):
        own, other = getattr(found, name), getattr(expected, name)
        assert (own is None) == (other is None)
        if own is None:
            continue
        assert (own.token_ids, own.before) == (other.token_ids, other.before)
        for one, another in zip(own, other, strict=True):
            assert (one.token, one.rank, len(one.top)) == (another.token, another.rank, len(another.top))
            assert one.logprob == pytest.approx(another.logprob, abs=1e-3)


def test_a_client_gets_what_an_engine_gives(ours: Client, expected: list[RequestOutput]) -> None:
    outputs = ours.generate(PROMPT, SAMPLING)
    assert [one.token_ids for one in outputs] == [one.token_ids for one in expected]
    for output, one in zip(outputs, expected, strict=True):
        same(output, one)
    pieces = [piece for piece in ours.stream(PROMPT, SAMPLING) if piece.sample_index == 0]
    found = [one for piece in pieces for one in piece.logprobs or ()]
    assert outputs[0].logprobs is not None
    assert [one.token for one in found] == [one.token for one in outputs[0].logprobs]
    assert pieces[0].prompt_logprobs == outputs[0].prompt_logprobs
    assert all(piece.prompt_logprobs is None for piece in pieces[1:])


def test_who_asks_for_none_gets_none(ours: Client) -> None:
    (output,) = ours.generate(PROMPT, SamplingParams(max_tokens=2))
    assert output.logprobs is output.prompt_logprobs is None


@pytest.mark.parametrize(
    ("sampling", "stream", "fits"),
    [
        (Sampling(prompt_logprobs=20, max_tokens=4), True, False),
        (Sampling(prompt_logprobs=0, logprobs=20, max_tokens=None), True, True),
        (Sampling(logprobs=20, max_tokens=None), False, False),
        (Sampling(logprobs=20, max_tokens=20_000), False, True),
    ],
)
def test_what_comes_in_one_message_must_fit_its_frame(sampling: Sampling, stream: bool, fits: bool) -> None:
    message = Generate(id=1, text="x", sampling=sampling, stream=stream)
    if fits:
        check_frame(message, 100_000)
        return
    with pytest.raises(InvalidRequestError, match="the limit is 524288"):
        check_frame(message, 100_000)
