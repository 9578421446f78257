"""Messages of a server that a client ignores, and those that no server may send.

A client that meets one of the second kind has lost track of its session; the code says what is wrong with the message.

Written by hand from PROTOCOL.md. Read by make.py.
"""

from graphgen.ipc.vectors.server_accepted import DONE, STATS, WELCOME
from graphgen.ipc.vectors.wire import (
    NIL,
    TRUE,
    Frame,
    Repeat,
    Vector,
    array,
    bin8,
    f32,
    f64,
    header,
    integer,
    mapping,
    negative_fixint,
    text,
    u16,
    u32,
    u64,
    without,
)

BAD_FRAME, BAD_REQUEST = "bad_frame", "bad_request"


def wrong(name: str, kind: str, meaning: str, *pairs: tuple[str, bytes]) -> Vector:
    """A field of a wrong type or outside its range."""
    return Vector(name, (header(kind), mapping(*pairs)), meaning, BAD_REQUEST)


def wrong_delta(name: str, meaning: str, *pairs: tuple[str, bytes]) -> Vector:
    return wrong(name, "D", meaning, ("id", integer(7)), *pairs)


def no_message(name: str, meaning: str, *frames: Frame) -> Vector:
    return Vector(name, frames, meaning, BAD_FRAME)


SERVER_IGNORED = [
    Vector("kind-of-the-future", (header("z"), mapping(("x", integer(1)))), "a kind that is not known yet", "ignore"),
    Vector("kind-of-the-future-any-map", (header("\x7f"), b"\xc1"), "whatever its second frame is", "ignore"),
]

SERVER_REFUSED = [
    no_message("server-frames-one", "a header without its map", header("D")),
    no_message("server-frames-three", "a frame behind the map", header("D"), mapping(("id", integer(7))), b""),
    no_message("server-header-short", "a header of 3 bytes", b"GG\x01", mapping(("id", integer(7)))),
    no_message("server-header-magic", "other letters than GG", b"HTTP", mapping(("id", integer(7)))),
    Vector(
        "server-major-2",
        (header("D", 2), mapping(("id", integer(7)))),
        "another version than the one agreed on",
        "unsupported_version",
    ),
    no_message("server-map-missing", "an empty second frame", header("D"), b""),
    no_message("server-map-is-array", "an array is no map", header("D"), array(integer(7))),
    no_message("server-map-reserved-byte", "c1 is never used", header("D"), b"\x81\xa2id\xc1"),
    no_message("server-trailing-byte", "a byte behind the map", header("D"), mapping(("id", integer(7))) + b"\x00"),
    no_message(
        "server-truncated",
        "the last byte is missing",
        header("D"),
        mapping(("id", integer(7)), ("text", text("ab")))[:-1],
    ),
    no_message(
        "server-lying-array", "2^32-1 items said, none there", header("D"), b"\x82\xa2id\x07\xa3ids\xdd\xff\xff\xff\xff"
    ),
    no_message("server-lying-map", "2^32-1 pairs said, 1 there", header("D"), b"\xdf\xff\xff\xff\xff\xa2id\x07"),
    no_message(
        "server-lying-str", "2^32-1 bytes said, none there", header("D"), b"\x82\xa2id\x07\xa4text\xdb\xff\xff\xff\xff"
    ),
    no_message(
        "server-nesting-bomb",
        "10^6 arrays within each other",
        header("D"),
        [Repeat(b"\x82\xa2id\x07\xa1x", 1), Repeat(b"\x91", 10**6)],
    ),
    no_message(
        "server-nesting-bomb-closed",
        "10^6 arrays within each other, complete",
        header("D"),
        [Repeat(b"\x82\xa2id\x07\xa1x", 1), Repeat(b"\x91", 10**6), Repeat(NIL, 1)],
    ),
    no_message(
        "server-utf8-truncated",
        "a text that ends within a character",
        header("D"),
        mapping(("id", integer(7)), ("text", text(b"a\xe2\x82"))),
    ),
    no_message(
        "server-utf8-surrogate",
        "half a surrogate pair",
        header("D"),
        mapping(("id", integer(7)), ("text", text(b"\xed\xa0\x80"))),
    ),
    no_message(
        "server-utf8-overlong",
        "a slash in two bytes",
        header("D"),
        mapping(("id", integer(7)), ("text", text(b"\xc0\xaf"))),
    ),
    no_message(
        "server-utf8-long",
        "300 characters, the last one cut off",
        header("D"),
        mapping(("id", integer(7)), ("text", text("é".encode() * 300 + b"\xc3"))),
    ),
    wrong("delta-without-id", "D", "whose tokens?", ("ids", array(integer(5)))),
    wrong("delta-id-nil", "D", "nil where the table has no nil", ("id", NIL)),
    wrong("delta-id-2^53", "D", "one above the largest integer", ("id", u64(2**53))),
    wrong("delta-id-2^53+1", "D", "a double would lose its last digit", ("id", u64(2**53 + 1))),
    wrong("delta-id-negative", "D", "below 0", ("id", negative_fixint(-1))),
    wrong("delta-id-float", "D", "a float where an int is expected", ("id", f64(7.0))),
    wrong("delta-id-bool", "D", "true is not 1", ("id", TRUE)),
    wrong_delta("delta-seq-negative", "below 0", ("seq", negative_fixint(-1))),
    wrong_delta("delta-seq-float", "a float where an int is expected", ("seq", f32(1.0))),
    wrong_delta("delta-seq-2^63", "above the largest integer", ("seq", u64(2**63))),
    wrong_delta("delta-ids-float", "token ids are ints", ("ids", array(f64(5.0)))),
    wrong_delta("delta-ids-2^31", "no token is so large", ("ids", array(u32(2**31)))),
    wrong_delta("delta-ids-str", "a str is no array", ("ids", text("abc"))),
    wrong_delta("delta-ids-nil", "nil where the table has no nil", ("ids", NIL)),
    wrong_delta("delta-text-bin", "bin is not str", ("text", bin8(b"ab"))),
    wrong_delta("delta-text-nil", "nil where the table has no nil", ("text", NIL)),
    wrong_delta("delta-cached-float", "a float where an int is expected", ("cached_tokens", f32(1.0))),
    wrong_delta("delta-logprobs-array", "an array is no map", ("logprobs", array())),
    wrong_delta("delta-logprobs-top-21", "more than anybody tells", ("logprobs", mapping(("top", integer(21))))),
    wrong_delta("delta-logprobs-str", "str is not bin", ("logprobs", mapping(("values", text("ab"))))),
    wrong_delta("delta-logprobs-tokens", "str is not bin", ("logprobs", mapping(("tokens", array(text("ab")))))),
    wrong_delta("delta-finish-int", "an int is no str", ("finish", integer(1))),
    Vector("delta-key-int", (header("D"), b"\x82\xa2id\x07\x01\x02"), "a key that is an int", BAD_REQUEST),
    wrong("deltas-empty", "U", "a required field is missing"),
    wrong("deltas-one", "U", "a map is no array", ("items", mapping(("id", integer(7))))),
    wrong(
        "deltas-without-id", "U", "whose tokens?", ("items", array(mapping(("id", integer(7))), mapping(("seq", NIL))))
    ),
    wrong("accepted-without-length", "A", "a required field is missing", ("id", integer(7))),
    wrong("done-without-usage", "F", "a required field is missing", *without(DONE, "usage")),
    wrong(
        "done-finish-str", "F", "one sample's end is a list of one", *without(DONE, "finish"), ("finish", text("stop"))
    ),
    wrong(
        "done-usage-empty", "F", "a required field of usage is missing", *without(DONE, "usage"), ("usage", mapping())
    ),
    wrong(
        "done-timing-nan",
        "F",
        "NaN is outside every range",
        *without(DONE, "timing"),
        ("timing", mapping(("queued_ms", f64(float("nan"))), ("first_token_ms", f64(1.0)), ("total_ms", f64(1.0)))),
    ),
    wrong(
        "health-worker-inf",
        "M",
        "infinity is outside every range",
        ("status", text("ok")),
        ("ready", TRUE),
        ("worker_ms", f64(float("inf"))),
    ),
    wrong(
        "stats-step-negative",
        "T",
        "no step took less than no time",
        *without(STATS, "step_ms_p50"),
        ("step_ms_p50", f64(-0.5)),
    ),
    wrong("error-without-code", "E", "a required field is missing", ("message", text("x"))),
    wrong("error-code-int", "E", "a number is no code", ("code", u16(500)), ("message", text("x"))),
    wrong(
        "error-retryable-int",
        "E",
        "1 is not true",
        ("code", text("internal")),
        ("message", text("x")),
        ("retryable", integer(1)),
    ),
    wrong("draining-empty", "N", "a required field is missing"),
    wrong("draining-negative", "N", "below 0", ("grace_ms", negative_fixint(-1))),
    wrong("notice-empty", "I", "a required field is missing"),
    wrong("stats-worker-loss-nil", "T", "nil where the table has no nil", *STATS, ("worker_loss", NIL)),
    wrong("welcome-without-limits", "W", "a required field is missing", *without(WELCOME, "limits")),
    wrong("welcome-limits-array", "W", "an array is no map", *without(WELCOME, "limits"), ("limits", array())),
    wrong(
        "welcome-features-nil", "W", "nil where the table has no nil", *without(WELCOME, "features"), ("features", NIL)
    ),
    wrong(
        "welcome-defaults-nan",
        "W",
        "NaN is outside every range",
        *WELCOME,
        ("sampling_defaults", mapping(("temperature", f64(float("nan"))))),
    ),
    wrong("welcome-defaults-array", "W", "an array is no map", *WELCOME, ("sampling_defaults", array())),
    wrong("welcome-draining-int", "W", "a number is no bool", *WELCOME, ("draining", integer(1))),
    wrong("welcome-version-str", "W", "a number in letters", *without(WELCOME, "version"), ("version", text("1"))),
    wrong(
        "health-ready-int", "M", "1 is not true", ("status", text("ok")), ("ready", integer(1)), ("worker_ms", f64(1.0))
    ),
    wrong("stats-without-steps", "T", "a required field is missing", *without(STATS, "steps")),
    wrong("server-pong-str", "Q", "a number in letters", ("t", text("4"))),
]
