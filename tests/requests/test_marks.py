"""Where special tokens are in the text of an output."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from graphgen import SamplingParams
from graphgen.calls.outputs import Delivery, StreamPiece
from graphgen.requests.tokenizer import Tokenizer
from tests.fakes import open_request
from tests.requests.tokenizers_for_tests import backend_of, byte_level, sentencepiece_style, word_piece_style

SPECIAL, ADDED = "<|channel|>", "<think>"


def with_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """A special token, and one that is only whole, as `<think>` is to most models."""
    backend = backend_of(tokenizer)
    backend.add_special_tokens([AddedToken(SPECIAL, special=True)])
    backend.add_tokens([AddedToken(ADDED, special=False)])
    return Tokenizer(backend, {})


TOKENIZERS = [with_tokens(make()) for make in (byte_level, sentencepiece_style, word_piece_style)]


def pieces_of(tokenizer: Tokenizer, steps: Sequence[Sequence[int]], sampling: SamplingParams) -> list[StreamPiece]:
    ids = tokenizer.added_tokens
    heard: list[Delivery] = []
    request = open_request(0, heard.append, tokenizer, sampling, marked_ids=frozenset({ids[SPECIAL], ids[ADDED]}))
    for number, step in enumerate(steps):
        piece, reason = request.take(step, "length" if number == len(steps) - 1 else None, 0.0)
        assert isinstance(piece, StreamPiece)
        heard.append(piece)
        if reason == "stop":
            break
    return [piece for piece in heard if isinstance(piece, StreamPiece)]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte level", "sentencepiece", "word piece"])
@given(data=st.data())
def test_a_mark_is_where_its_token_is_in_the_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Whatever the text holds back: halves of characters, and what may become a stop string."""
    marked = [tokenizer.added_tokens[SPECIAL], tokenizer.added_tokens[ADDED]]
    token = st.sampled_from(marked) | st.integers(0, min(marked) - 1)
    steps = data.draw(st.lists(st.lists(token, min_size=1, max_size=4), min_size=1, max_size=8))
    shown, stop = data.draw(st.booleans()), data.draw(st.sampled_from([[], ["<th"], ["e"]]))
    pieces = pieces_of(tokenizer, steps, SamplingParams(skip_special_tokens=not shown, stop=stop))
    text = "".join(piece.text for piece in pieces)
    drawn = [token_id for piece in pieces for token_id in piece.token_ids]
    marks = [mark for piece in pieces for mark in piece.marks]
    assert [mark.token_id for mark in marks] == [token_id for token_id in drawn if token_id in marked]
    starts = [mark.start for mark in marks]
    assert starts == sorted(starts)
    for mark in marks:
        own = tokenizer.decode([mark.token_id], skip_special_tokens=not shown)
        if mark.end <= len(text) and mark.start < mark.end:
            assert text[mark.start : mark.end] == own
        assert mark.end - mark.start in (0, len(own))


def test_marks_are_between_the_texts_that_they_part() -> None:
    tokenizer = TOKENIZERS[0]
    channel, think = tokenizer.added_tokens[SPECIAL], tokenizer.added_tokens[ADDED]
    hello = tokenizer.encode_bare("é!")
    (piece,) = pieces_of(tokenizer, [[channel, *hello, think, *hello, channel]], SamplingParams())
    assert piece.text == "é!<think>é!"
    assert [(mark.token_id, mark.start, mark.end) for mark in piece.marks] == [
        (channel, 0, 0),
        (think, 2, 9),
        (channel, 11, 11),
    ]
