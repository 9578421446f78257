"""Streamed text is the tokenizer's own decoding, and stop strings are found wherever they lie."""

import functools
import itertools
import random
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from graphgen import RequestOutput, SamplingParams, StreamPiece
from graphgen.requests.text import Detokenizer, StopFinder
from graphgen.requests.tokenizer import Tokenizer
from tests.fakes import open_request
from tests.requests import tokenizers_for_tests

EMOJI_TEXT = "naïve 😀👩‍👩‍👧 — 你好, ROMEO:\n\tend"


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return tokenizers_for_tests.ALL[kind]()


def vocab_size(kind: str) -> int:
    return int(tokenizers_for_tests.backend_of(tokenizer_of(kind)).get_vocab_size())


def stream_pieces(tokenizer: Tokenizer, token_ids: list[int], skip_special_tokens: bool) -> list[str]:
    decode = functools.partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
    detokenizer = Detokenizer(decode, tokenizer.byte_token_ids)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", tokenizers_for_tests.ALL)
@pytest.mark.parametrize("skip_special_tokens", [True, False])
@settings(max_examples=150)
@given(data=st.data())
def test_joined_pieces_are_the_decoding_of_all_ids(kind: str, skip_special_tokens: bool, data: st.DataObject) -> None:
    token_ids = data.draw(st.lists(st.integers(0, vocab_size(kind) - 1), max_size=60))
    pieces = stream_pieces(tokenizer_of(kind), token_ids, skip_special_tokens)
    assert "".join(pieces) == tokenizer_of(kind).decode(token_ids, skip_special_tokens)


@pytest.mark.parametrize("kind", tokenizers_for_tests.ALL)
def test_joined_pieces_are_the_decoding_of_long_random_output(kind: str) -> None:
    chooser = random.Random(0)
    for _ in range(5):
        token_ids = [chooser.randrange(vocab_size(kind)) for _ in range(200)]
        for skip_special_tokens in (True, False):
            pieces = stream_pieces(tokenizer_of(kind), token_ids, skip_special_tokens)
            assert "".join(pieces) == tokenizer_of(kind).decode(token_ids, skip_special_tokens)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_characters_split_over_tokens_come_whole(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    token_ids = tokenizer.encode(EMOJI_TEXT)
    pieces = stream_pieces(tokenizer, token_ids, True)
    assert "".join(pieces) == tokenizer.decode(token_ids, True)
    assert len(token_ids) > len(EMOJI_TEXT), "the text must not be one token per character"
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("byte_level", ["the", "r", "e"]), ("sentencepiece", ["▁Hello", "▁the", "b", "!"]), ("word_piece", ["a", "##s"])],
)
def test_text_of_normal_tokens_is_not_held_back(kind: str, tokens: list[str]) -> None:
    tokenizer = tokenizer_of(kind)
    backend = tokenizers_for_tests.backend_of(tokenizer)
    pieces = stream_pieces(tokenizer, [backend.token_to_id(token) for token in tokens], True)
    assert all(pieces[:-1])
    assert pieces[-1] == ""


def test_hugging_face_agrees_with_the_decoding() -> None:
    tokenizer = tokenizer_of("byte_level")
    token_ids = [random.Random(1).randrange(vocab_size("byte_level")) for _ in range(300)]
    hugging_face = PreTrainedTokenizerFast(tokenizer_object=tokenizers_for_tests.backend_of(tokenizer))
    expected = hugging_face.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert tokenizer.decode(token_ids, True) == expected


def test_a_flood_of_broken_bytes_stays_linear_and_exact() -> None:
    """Half a character over and over ends no piece; the window must not grow with the output."""
    tokenizer = tokenizer_of("byte_level")
    half = tokenizer.encode("😀")[0]
    decoded: list[int] = []

    def decode(token_ids: list[int]) -> str:
        decoded.append(len(token_ids))
        return tokenizer.decode(token_ids, True)

    detokenizer = Detokenizer(decode)  # type: ignore[arg-type]  # a list is what it passes
    text = "".join(detokenizer.push(half) for _ in range(2000)) + detokenizer.finish()
    assert max(decoded) <= 512
    assert text == tokenizer.decode([half] * 2000, True)


# --- stop strings ----------------------------------------------------------------------------------------------


def brute_force(text: str, stops: list[str]) -> tuple[str, bool]:
    """The first stop to be complete cuts the text; of those that end together, the longest."""
    for end in range(1, len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)], True
    return text, False


def feed(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    finder = StopFinder(stops)
    released = ""
    for piece in pieces:
        text, found = finder.push(piece)
        released += text
        if found:
            return released, True
    return released + finder.finish(), False


def cut(text: str, borders: list[int]) -> list[str]:
    edges = [0, *sorted(border % (len(text) + 1) for border in borders), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


@settings(max_examples=500)
@given(
    text=st.text("ab\n", max_size=40),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=6), min_size=1, max_size=4),
    borders=st.lists(st.integers(0, 100), max_size=10),
)
def test_stops_are_found_across_any_borders(text: str, stops: list[str], borders: list[int]) -> None:
    assert feed(stops, cut(text, borders)) == brute_force(text, stops)


@settings(max_examples=300)
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_nothing_released_can_begin_a_stop_and_nothing_else_is_held(text: str, stops: list[str]) -> None:
    finder = StopFinder(stops)
    released = ""
    for end, character in enumerate(text, start=1):
        piece, found = finder.push(character)
        released += piece
        if found:
            return
        held = text[len(released) : end]
        longest = max(
            (n for stop in stops for n in range(len(stop)) if text[:end].endswith(stop[:n])),
            default=0,
        )
        assert len(held) == longest


def test_peek_leaves_no_trace() -> None:
    finder = StopFinder(["END"])
    assert finder.push("xE") == ("x", False)
    assert finder.peek("ND") == ("", True)
    assert finder.push("N!") == ("EN!", False)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("streams", [True, False])
def test_the_text_ends_before_a_stop_string_that_is_a_special_token(skip_special_tokens: bool, streams: bool) -> None:
    """The scheduler ends the request at its id; whether the text would show the token or not makes no difference."""
    tokenizer = tokenizer_of("byte_level")
    sampling = SamplingParams(stop="<|endoftext|>", skip_special_tokens=skip_special_tokens)
    request = open_request(1, lambda _: None, tokenizer, sampling, streams)
    token_ids = [*tokenizer.encode("To be"), tokenizer.encode("<|endoftext|>")[0]]
    pieces = [request.take([token_id], None, 0.0)[0] for token_id in token_ids[:-1]]
    last, reason = request.take(token_ids[-1:], "stop", 0.0)
    texts = [piece.text for piece in (*pieces, last) if isinstance(piece, (StreamPiece, RequestOutput))]
    assert ("".join(texts), reason) == ("To be", "stop")


def timed(call: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


@pytest.mark.alone
def test_a_long_stop_that_almost_matches_costs_no_more_than_the_text() -> None:
    """A naive search compares the whole stop at every character: 20 000 * 1000 comparisons."""
    stop = "a" * 999 + "b"
    finder = StopFinder([stop])
    assert min(timed(lambda: finder.push("a" * 20_000)) for _ in range(3)) < 0.25
