"""The public protocol's types, frames and document: what decodes, what is refused with which error, what is written."""

import contextlib
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

import graphgen.ipc
from graphgen.calls.sampling_params import SamplingParams
from graphgen.ipc.errors import InvalidRequestError
from graphgen.ipc.ggp.codes import CODES
from graphgen.ipc.ggp.framing import FrameError, client_framing, make_error, server_framing
from graphgen.ipc.ggp.messages import (
    CLIENT_KINDS,
    NAMES,
    SERVER_KINDS,
    Delta,
    Error,
    Generate,
    Hello,
    Sampling,
    SamplingDefaults,
)
from graphgen.ipc.ggp.reference import update

DOCUMENT = Path(graphgen.ipc.__file__).parent / "PROTOCOL.md"
GENERATE = b"GG\x01G"


def refused(*frames: bytes) -> Error:
    with pytest.raises(FrameError) as caught:
        server_framing().decode(frames)
    return caught.value.error


def packed(**fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


def test_the_document_says_what_the_types_say() -> None:
    text = DOCUMENT.read_text()
    assert update(text) == text, "run `python -m graphgen.ipc.ggp.reference ipc/PROTOCOL.md`"


def test_a_changed_type_would_change_the_document() -> None:
    text = DOCUMENT.read_text()
    assert update(text.replace("| code | str | required |", "| code | int | required |")) == text


def test_every_kind_has_a_name_and_a_letter_of_its_own() -> None:
    kinds = {*CLIENT_KINDS.values(), *SERVER_KINDS.values()}
    assert kinds == set(NAMES)
    for letter in CLIENT_KINDS.keys() & SERVER_KINDS.keys():
        assert CLIENT_KINDS[letter] is SERVER_KINDS[letter], "one letter, one meaning"


messages = st.one_of(
    st.builds(
        Generate,
        id=st.integers(0, 2**53 - 1),
        text=st.none() | st.text(),
        prompt_ids=st.none() | st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4),
        prompt_u32=st.none() | st.binary(min_size=4, max_size=12),
        sampling=st.builds(
            Sampling,
            temperature=st.just(UNSET) | st.floats(0, 100),
            top_p=st.floats(0, 1, exclude_min=True),
            seed=st.none() | st.integers(0, 2**53 - 1),
            stop=st.lists(st.text(min_size=1, max_size=4), max_size=4),
        ),
        stream=st.booleans(),
    ),
    st.builds(Hello, client=st.text(max_size=256)),
)


@given(messages)
def test_messages_survive_the_wire(message: Generate | Hello) -> None:
    assert server_framing().decode(client_framing().encode(message)) == message


@pytest.mark.parametrize("number", [0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**53 - 1])
def test_an_id_is_the_same_in_any_width(number: int) -> None:
    wide = b"\x81\xa2id\xcf" + number.to_bytes(8, "big")
    decoded = server_framing().decode((b"GG\x01X", wide))
    assert decoded.id == number  # type: ignore[union-attr]  # the kind says that it is a cancel


def test_unknown_keys_are_ignored_and_absent_ones_are_the_default() -> None:
    decoded = server_framing().decode((GENERATE, packed(id=1, text="a", future={"x": [1, {"y": None}]})))
    assert decoded == Generate(id=1, text="a")


def test_an_int_is_taken_for_a_float_and_no_float_for_an_int() -> None:
    decoded = server_framing().decode((GENERATE, packed(id=1, sampling={"temperature": 1})))
    assert decoded.sampling.temperature == 1.0  # type: ignore[union-attr]  # it is a generate
    assert refused(GENERATE, packed(id=1.0)).code == "bad_request"


@pytest.mark.parametrize(
    "frames",
    [
        (),
        (GENERATE,),
        (GENERATE, packed(id=1), b""),
        (b"", packed(id=1)),
        (b"GG\x01", packed(id=1)),
        (b"GG\x01GG", packed(id=1)),
        (b"gg\x01G", packed(id=1)),
        (b"GG\x01\x00", packed(id=1)),
        (b"GG\x01W", packed(id=1)),  # a kind that only servers send
        (GENERATE, b""),
        (GENERATE, b"\xc1"),
        (GENERATE, packed(id=1)[:-1]),
        (GENERATE, packed(id=1) + b"\x00"),
        (GENERATE, b"\x93\x01\x02\x03"),
        (GENERATE, b"\x81\xa4text\xa1\xff"),  # no UTF-8
        (GENERATE, b"\x81\xa1x" + b"\x91" * 1_000_000),
        (GENERATE, b"\x81\xaaprompt_ids\xdd\xff\xff\xff\xff"),  # says that it has 2**32 - 1 items
        (GENERATE, b"\x81\xaaprompt_u32\xc6\xff\xff\xff\xff"),
    ],
)
def test_what_is_no_message_is_a_bad_frame_or_refused(frames: tuple[bytes, ...]) -> None:
    assert refused(*frames).code in ("bad_frame", "bad_request")


@pytest.mark.parametrize("major", [0, 2, 255])
def test_another_version_is_told_which_one_would_do(major: int) -> None:
    error = refused(b"GG" + bytes([major]) + b"G", b"whatever that version puts here")
    assert error.code == "unsupported_version"
    assert error.versions == (1, 1)


def test_a_refused_request_is_named_where_its_id_can_be_read() -> None:
    assert refused(GENERATE, packed(sampling={"top_p": 2.0}, id=41)).id == 41
    assert refused(GENERATE, packed(sampling={"top_p": 2.0})).id is None
    assert refused(GENERATE, packed(sampling={"top_p": 2.0}, id=41)).message.startswith("sampling.top_p: ")


ABSURD: list[object] = [math.nan, math.inf, -math.inf, -1e9, 2**63, "\u0000" * 2000, b"1", {}, [None], [{}] * 20]
BAD_SAMPLING = [{field.name: value} for field in msgspec.structs.fields(Sampling) for value in ABSURD]


@pytest.mark.parametrize("sampling", BAD_SAMPLING, ids=lambda sampling: repr(sampling)[:40])
def test_no_absurd_sampling_value_decodes(sampling: dict[str, object]) -> None:
    error = refused(GENERATE, packed(id=1, sampling=sampling))
    assert error.code == "bad_request"
    assert error.id == 1


WIDER_IN_THE_ENGINE = ("seed", "deadline_ms", "itl_target_ms", "ttft_target_ms", "tpot_target_ms")
"""Not every language can write seeds above 2**53, and no client waits longer than an hour."""


def test_sampling_on_the_wire_is_the_sampling_of_the_engine() -> None:
    """Same fields, same defaults, same ranges: a value at an end of its range is taken by both."""
    public = {field.name: field for field in msgspec.structs.fields(Sampling)}
    for field in msgspec.structs.fields(SamplingParams):
        default: Any = getattr(SamplingParams(), field.name)
        if field.name in SamplingDefaults.__struct_fields__:
            assert (getattr(Sampling(), field.name), default) == (UNSET, None), "the model decides"
        else:
            expected = list(default) if isinstance(default, tuple) else default
            assert getattr(Sampling(), field.name) == expected, field.name
        for value in range_ends(public[field.name].type):
            if field.name == "seed" and value > 2**53:
                continue
            extra = {"max_tokens": None} if field.name == "min_tokens" else {}
            SamplingParams(**{**extra, field.name: value})
        for value in beyond_range(public[field.name].type):
            if field.name not in WIDER_IN_THE_ENGINE and (field.name, value) != ("top_k", -1):
                with pytest.raises(InvalidRequestError):
                    SamplingParams(**{field.name: value})


def range_ends(annotation: object) -> list[Any]:
    number = number_type(annotation)
    return [] if number is None else [end for end in (number.ge, number.le) if end is not None]


def beyond_range(annotation: object) -> list[Any]:
    number = number_type(annotation)
    if number is None or number.le is None:
        return []
    return [number.le + 1, number.gt if number.gt is not None else number.ge - 1]


def number_type(annotation: object) -> Any:  # msgspec.inspect.IntType or FloatType
    kind: Any = msgspec.inspect.type_info(annotation)
    while isinstance(kind, msgspec.inspect.Metadata):
        kind = kind.type
    if isinstance(kind, msgspec.inspect.UnionType):
        kind = next(one for one in kind.types if not isinstance(one, msgspec.inspect.NoneType))
    while isinstance(kind, msgspec.inspect.Metadata):
        kind = kind.type
    return kind if isinstance(kind, (msgspec.inspect.IntType, msgspec.inspect.FloatType)) else None


def test_an_error_says_whether_to_try_again() -> None:
    for code, info in CODES.items():
        assert make_error(code, "").retryable == info.retryable


def test_defaults_are_not_sent() -> None:
    _, body = server_framing().encode(Delta(id=1, ids=[5]))
    assert msgspec.msgpack.decode(body) == {"id": 1, "ids": [5]}


@given(st.binary(max_size=200))
def test_random_bytes_give_an_error_and_nothing_else(body: bytes) -> None:
    for letter in CLIENT_KINDS:
        with contextlib.suppress(FrameError):  # any other exception fails the test
            decoded = server_framing().decode((b"GG\x01" + letter, body))
            assert type(decoded) is CLIENT_KINDS[letter]
