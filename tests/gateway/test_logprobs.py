"""Log-probabilities of a server: over its own protocol those of an engine, over HTTP in OpenAI's two forms."""

import struct
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from graphgen import Client, Engine, InvalidRequestError, RequestOutput, SamplingParams
from graphgen.calls.logprobs import Logprobs
from graphgen.calls.outputs import StreamPiece
from graphgen.gateway.logprobs import LOWEST, Columns, Told, of_chat
from graphgen.ipc.ggp.messages import Generate, Sampling
from graphgen.server.frontend.prepare import check_frame
from tests.serving import ServerProcess

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


def test_responses_tell_those_of_chats(client: openai.OpenAI) -> None:
    asked: Any = {"model": "play", "temperature": 0, "top_logprobs": 2}
    message: Any = {"role": "user", "content": PROMPT}
    chat = client.chat.completions.create(messages=[message], logprobs=True, max_tokens=9, **asked)
    assert chat.choices[0].logprobs is not None
    expected = [one.model_dump() for one in chat.choices[0].logprobs.content or ()]
    responses: Any = {**asked, "input": [message], "max_output_tokens": 9, "include": ["message.output_text.logprobs"]}
    whole = client.responses.create(**responses).model_dump()
    assert [near(one) for one in whole["output"][0]["content"][0]["logprobs"]] == [near(one) for one in expected]
    assert whole["top_logprobs"] == 2
    events = [event.model_dump() for event in client.responses.create(stream=True, **responses)]
    told = [one for event in events if event["type"] == "response.output_text.delta" for one in event["logprobs"]]
    assert [one["token"] for one in told] == [one["token"] for one in expected]
    done = next(event for event in events if event["type"] == "response.output_text.done")
    assert [one["token"] for one in done["logprobs"]] == [one["token"] for one in expected]
    without = client.responses.create(**{**responses, "include": [], "top_logprobs": 0}).model_dump()
    assert not without["output"][0]["content"][0]["logprobs"]


def near(one: dict[str, Any]) -> dict[str, Any]:
    """Last bits may differ where steps were of other sizes."""
    tops = {"top_logprobs": [near(top) for top in one["top_logprobs"]]} if "top_logprobs" in one else {}
    return {**one, "logprob": round(one["logprob"], 2), **tops}


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


# --- OpenAI's two forms ----------------------------------------------------------------------------------------

HELLO: Any = [{"role": "user", "content": "Good morrow"}]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60.0)


def test_a_chat_tells_each_token_with_its_bytes_streamed_or_not(client: openai.OpenAI, ours: Client) -> None:
    (want,) = ours.chat(HELLO, SamplingParams(max_tokens=12, temperature=0, logprobs=2))
    asked: Any = {"messages": HELLO, "max_tokens": 12, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    (choice,) = client.chat.completions.create(model="play", **asked).choices
    found = choice.logprobs and choice.logprobs.content
    assert found
    assert want.logprobs is not None
    assert bytes(byte for one in found for byte in one.bytes or ()) == want.text.encode()
    for one, other in zip(found, want.logprobs, strict=False):
        assert one.token == other.token.decode(errors="replace")
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [top.bytes for top in one.top_logprobs] == [list(top.token) for top in other.top]
        assert one.top_logprobs[0].logprob == one.logprob, "greedy"
    text, told = "", ""
    for chunk in client.chat.completions.create(model="play", stream=True, **asked):
        for part in chunk.choices:
            text += part.delta.content or ""
            told += "".join(one.token for one in (part.logprobs and part.logprobs.content) or ())
            assert text == told, "a chunk tells the tokens of its text"
    assert text == want.text


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_echo_is_the_log_likelihood_that_lm_eval_reads(client: openai.OpenAI, ours: Client, max_tokens: int) -> None:
    texts = ("To be, or", "ROMEO:\nWhat ho")
    prompts = [list(one.prompt_token_ids) for one in ours.generate(list(texts), SamplingParams(max_tokens=1))]
    want = ours.generate(prompts, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1))
    asked: Any = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0}
    got = client.completions.create(model="play", **asked)
    assert got.usage is not None
    assert got.usage.completion_tokens == max_tokens * len(prompts)
    for choice, output, text in zip(got.choices, want, texts, strict=True):
        found: Any = choice.logprobs
        expected = output.prompt_logprobs
        assert expected is not None
        assert (choice.text, choice.finish_reason) == (text + output.text * max_tokens, "length")
        assert "".join(found.tokens) == choice.text
        assert found.text_offset[:2] == [0, len(found.tokens[0])]
        assert found.token_logprobs[0] is found.top_logprobs[0] is None
        values = found.token_logprobs[1 : len(expected) + 1]
        assert values == pytest.approx([one.logprob for one in expected], abs=1e-3)
        greedy = [value == max(top.values()) for value, top in zip(values, found.top_logprobs[1:], strict=False)]
        assert greedy == [one.rank == 1 for one in expected]
        assert len(found.tokens) == len(found.top_logprobs) == 1 + len(expected) + max_tokens


def test_an_echo_of_several_outputs_and_of_a_stream_has_the_prompt_too(client: openai.OpenAI) -> None:
    asked: Any = {"prompt": "To be, or", "echo": True, "logprobs": 0, "max_tokens": 3, "temperature": 0}
    got = client.completions.create(model="play", n=2, **asked)
    first, second = (choice.logprobs for choice in got.choices)
    assert first is not None
    assert second is not None
    assert first.tokens == second.tokens
    assert first.token_logprobs is not None
    assert len(first.token_logprobs) == len(second.token_logprobs or ())
    tokens: list[str] = []
    for chunk in client.completions.create(model="play", stream=True, **asked):
        for part in chunk.choices:
            tokens += (part.logprobs and part.logprobs.tokens) or []
    assert tokens == first.tokens


def piece(text: str, tokens: list[bytes], finish: Any = None, logprob: float = -1.0) -> StreamPiece:
    """Of tokens 0, 1, ..., each of rank 1."""
    values = struct.pack("<fI", logprob, 1) * len(tokens)
    token_ids = tuple(range(len(tokens)))
    return StreamPiece(text, token_ids, finish, logprobs=Logprobs(0, token_ids, values, tuple(tokens)))


def test_tokens_wait_for_their_text_and_go_with_it() -> None:
    told = Told()
    assert [one.token for one in told.take([piece("", [b"\xc3"])])] == [], "half a character"
    assert [one.token for one in told.take([piece("é", [b"\xa9"])])] == [b"\xc3", b"\xa9"]
    assert [one.token for one in told.take([piece("a", [b"a"]), piece("", [b" STO"])])] == [b"a"]
    assert [one.token for one in told.take([piece("", [b"P"], "stop")])] == [], "a stop string took them away"
    ended = Told()
    assert len(ended.take([piece("", [b"\xc3"], "length")])) == 1


def test_parts_of_characters_have_their_place_and_minus_infinity_a_number() -> None:
    (one,) = of_chat(Told().take([piece("x", [b"x"], logprob=float("-inf"))])).content
    assert one.logprob == LOWEST
    columns = Columns().of(Told().take([piece("aéb", [b"a", b"\xc3", b"\xa9", b"b"], "length")]))
    assert columns.tokens == ["a", "\ufffd", "\ufffd", "b"]
    assert columns.text_offset == [0, 1, 1, 2]
