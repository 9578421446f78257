"""Messages of a server that every client takes.

Written by hand from PROTOCOL.md. Read by make.py and, for the whole messages, by server_refused.py.
"""

from graphgen.ipc.vectors.wire import (
    FALSE,
    NIL,
    TRUE,
    Value,
    Vector,
    array,
    array32,
    bin8,
    f32,
    f64,
    header,
    i16,
    integer,
    map16,
    map32,
    mapping,
    str32,
    text,
    u8,
    u16,
    u32,
    u64,
    without,
)

MAX_INT = 2**53 - 1

LIMITS = mapping(
    ("frame_bytes", u32(2**24)),
    ("prompt_tokens", u16(8192)),
    ("text_bytes", u32(2**20)),
    ("open_requests", u16(256)),
    ("open_prompt_tokens", u32(2**20)),
)
LIMITS_VALUE: dict[str, Value] = {
    "frame_bytes": 2**24,
    "prompt_tokens": 8192,
    "text_bytes": 2**20,
    "open_requests": 256,
    "open_prompt_tokens": 2**20,
}
WELCOME = (
    ("version", integer(1)),
    ("session", text("5f3a")),
    ("instance", text("a1")),
    ("server", text("graphgen 0.1")),
    ("model", text("demo")),
    ("vocab_size", u16(8192)),
    ("eos_token_ids", array(integer(2))),
    ("features", array(text("text"), text("chat"))),
    ("limits", LIMITS),
    ("heartbeat_ms", u16(1000)),
    ("slow_consumer_ms", u16(60000)),
    ("control", text("tcp://127.0.0.1:5756")),
)
WELCOME_VALUE: dict[str, Value] = {
    "version": 1,
    "session": "5f3a",
    "instance": "a1",
    "server": "graphgen 0.1",
    "model": "demo",
    "vocab_size": 8192,
    "eos_token_ids": [2],
    "features": ["text", "chat"],
    "limits": dict(LIMITS_VALUE),
    "heartbeat_ms": 1000,
    "slow_consumer_ms": 60000,
    "control": "tcp://127.0.0.1:5756",
}
# Log-probability -0.5, rank 1, token 5 at -0.5; then -2, rank 3, token 5 at -0.5.
VALUES_OF_TWO = "000000bf0100000005000000000000bf000000c00300000005000000000000bf"
USAGE = mapping(("prompt_tokens", integer(3)), ("output_tokens", integer(2)))
USAGE_VALUE: dict[str, Value] = {"prompt_tokens": 3, "output_tokens": 2}
TIMING = mapping(("queued_ms", f64(0.5)), ("first_token_ms", f32(12.0)), ("total_ms", integer(20)))
TIMING_VALUE: dict[str, Value] = {"queued_ms": 0.5, "first_token_ms": 12.0, "total_ms": 20.0}
DONE = (("id", integer(7)), ("finish", array(text("stop"))), ("usage", USAGE), ("timing", TIMING))

STATS_INTS = [
    "sessions",
    "open_requests",
    "held_requests",
    "running",
    "waiting",
    "pages_free",
    "pages_total",
    "steps",
    "finished",
    "preemptions",
    "deltas_sent",
    "deltas_merged",
    "messages_refused",
    "frontend_rss_bytes",
]
STATS_FLOATS = ["step_ms_p50", "step_ms_p95", "step_ms_p99", "step_ms_max", "frontend_cpu_s"]
STATS = (
    *((name, integer(place)) for place, name in enumerate(STATS_INTS)),
    *((name, f64(place + 0.5)) for place, name in enumerate(STATS_FLOATS)),
)
ENGINE_VALUES: dict[str, Value] = {
    "serves": True,
    "running": 3,
    "waiting": 0,
    "pages_free": 300,
    "pages_total": 400,
    "steps": 70000,
    "finished": 12,
    "preemptions": 0,
    "worker_restarts": 1,
}
ENGINE = [(name, integer(value) if type(value) is int else TRUE) for name, value in ENGINE_VALUES.items()]
ENGINE_AWAY_VALUES: dict[str, Value] = {name: False if name == "serves" else 0 for name in ENGINE_VALUES}
ENGINE_AWAY = [(name, FALSE if name == "serves" else integer(0)) for name in ENGINE_VALUES]
CAPACITY_VALUES: dict[str, Value] = {
    "engines": 2,
    "slots": 512,
    "pages": 7000,
    "page_size": 64,
    "step_rows": 1024,
    "chunk_rows": 768,
    "windows": [None, 4096],
}
CAPACITY = (
    *((name, integer(value)) for name, value in CAPACITY_VALUES.items() if type(value) is int),
    ("windows", array(NIL, u16(4096))),
)
LOAD_VALUES: dict[str, Value] = {
    "epoch": 3,
    "serves": True,
    "engines": 2,
    "open": 40,
    "tenants": 2,
    "prompt_tokens": 90000,
    "output_tokens": 5000,
    "steps": 70000,
    "pages_free": 300,
    "prompt_token_s": 0.5,
    "output_token_s": 0.25,
    "step_s": 0.125,
}
LOAD = [
    (name, TRUE if value is True else integer(value) if type(value) is int else f64(float(str(value))))
    for name, value in LOAD_VALUES.items()
]
COLUMNS = [
    *((name, array(integer(1), u16(300))) for name in ("ids", "chunk_rows", "decode_rows", "padding_rows")),
    *((name, array(f64(4.5), f64(9.25))) for name in ("ms", "ended_ms")),
]
COLUMN_VALUES: dict[str, Value] = {
    **{name: [1, 300] for name in ("ids", "chunk_rows", "decode_rows", "padding_rows")},
    **{name: [4.5, 9.25] for name in ("ms", "ended_ms")},
}
STATS_VALUE: dict[str, Value] = {
    **{name: place for place, name in enumerate(STATS_INTS)},
    **{name: place + 0.5 for place, name in enumerate(STATS_FLOATS)},
}


def sent(name: str, kind: str, meaning: str, *pairs: tuple[str, bytes], **value: Value) -> Vector:
    return Vector(name, (header(kind), mapping(*pairs)), meaning, "ok", value)


def delta(name: str, meaning: str, *pairs: tuple[str, bytes], **value: Value) -> Vector:
    return sent(name, "D", meaning, ("id", integer(7)), *pairs, id=7, **value)


SERVER_ACCEPTED = [
    Vector("welcome", (header("W"), mapping(*WELCOME)), "a session is open", "ok", WELCOME_VALUE),
    Vector(
        "welcome-sampling-defaults",
        (
            header("W"),
            mapping(
                *WELCOME,
                (
                    "sampling_defaults",
                    mapping(("temperature", f32(0.5)), ("top_k", integer(20)), ("min_p", integer(0))),
                ),
            ),
        ),
        "a model with a temperature and top-k of its own; what is absent is off",
        "ok",
        {**WELCOME_VALUE, "sampling_defaults": {"temperature": 0.5, "top_k": 20}},
    ),
    Vector(
        "welcome-frontends",
        (header("W"), mapping(*WELCOME, ("frontends", array(text("tcp://*:5755"), text("tcp://*:5757"))))),
        "a server of several frontends",
        "ok",
        {**WELCOME_VALUE, "frontends": ["tcp://*:5755", "tcp://*:5757"]},
    ),
    Vector(
        "welcome-draining",
        (header("W"), mapping(*WELCOME, ("draining", TRUE))),
        "a session with a server that is about to end",
        "ok",
        {**WELCOME_VALUE, "draining": True},
    ),
    Vector(
        "welcome-any-order",
        (header("W"), map32(*reversed(WELCOME), ("motd", text("hello")))),
        "keys in another order, an unknown one, a map with a 4-byte length",
        "ok",
        WELCOME_VALUE,
    ),
    Vector(
        "welcome-limits-unknown-key",
        (
            header("W"),
            mapping(*without(WELCOME, "limits"), ("limits", b"\x86" + LIMITS[1:] + text("images") + integer(4))),
        ),
        "an unknown limit is ignored",
        "ok",
        WELCOME_VALUE,
    ),
    sent(
        "accepted",
        "A",
        "a prompt of 3 tokens",
        ("id", integer(7)),
        ("prompt_tokens", integer(3)),
        id=7,
        prompt_tokens=3,
    ),
    sent(
        "accepted-echo",
        "A",
        "the prompt's ids, in every width",
        ("id", u64(MAX_INT)),
        ("prompt_tokens", u64(3)),
        ("prompt_ids", array(u8(1), u32(300), u64(70000))),
        id=MAX_INT,
        prompt_tokens=3,
        prompt_ids=[1, 300, 70000],
    ),
    sent(
        "accepted-echo-nil",
        "A",
        "nil where the table has nil",
        ("id", integer(7)),
        ("prompt_tokens", integer(3)),
        ("prompt_ids", NIL),
        id=7,
        prompt_tokens=3,
        prompt_ids=None,
    ),
    delta(
        "delta-first",
        "two tokens; seq and sample by default",
        ("ids", array(u16(418), integer(11))),
        ("text", text(" But,")),
        ids=[418, 11],
        text=" But,",
    ),
    delta("delta-empty", "nothing but its id"),
    delta(
        "delta-last",
        "the last token, without text",
        ("finish", text("stop")),
        ("ids", array(integer(2))),
        ("seq", integer(2)),
        seq=2,
        ids=[2],
        finish="stop",
    ),
    delta("delta-cached", "a prompt that was computed before", ("cached_tokens", u16(300)), cached_tokens=300),
    delta("delta-sample-15", "the last of 16 samples", ("sample", integer(15)), sample=15),
    delta("delta-int64-seq", "a signed integer that is not negative", ("seq", i16(300)), seq=300),
    delta("delta-finish-nil", "nil where the table has nil", ("finish", NIL), finish=None),
    delta(
        "delta-finish-of-the-future", "a way to end that is not known yet", ("finish", text("paused")), finish="paused"
    ),
    delta("delta-unicode", "UTF-8 of 1 to 4 bytes", ("text", text("aé€😀")), text="aé€😀"),
    delta("delta-nul", "a NUL within the text", ("text", text("a\0b")), text="a\0b"),
    delta("delta-replacement", "the replacement character is a character", ("text", text("\ufffd")), text="\ufffd"),
    delta("delta-str32", "a str with a 4-byte length", ("text", str32(b"abc")), text="abc"),
    delta("delta-long-text", "300 characters", ("text", text("é" * 300)), text="é" * 300),
    delta("delta-array32", "an array with a 4-byte length", ("ids", array32(integer(5))), ids=[5]),
    delta(
        "delta-duplicate-key",
        "of a key that occurs twice the last one counts",
        ("text", text("a")),
        ("text", text("b")),
        text="b",
    ),
    delta("delta-unknown-key", "an unknown key is ignored", ("emotions", array(mapping(("token", integer(5)))))),
    delta(
        "delta-logprobs",
        "two tokens, the likeliest token of each, and a token that is half a character",
        ("ids", array(integer(5), integer(9))),
        (
            "logprobs",
            mapping(
                ("top", integer(1)),
                ("values", bin8(bytes.fromhex(VALUES_OF_TWO))),
                ("tokens", array(bin8(b" a"), bin8(b" a"), bin8(b"\xc3"), bin8(b""))),
            ),
        ),
        ids=[5, 9],
        logprobs={
            "top": 1,
            "values": {"bin": VALUES_OF_TWO},
            "tokens": [{"bin": "2061"}, {"bin": "2061"}, {"bin": "c3"}, {"bin": ""}],
        },
    ),
    delta(
        "delta-prompt-logprobs",
        "of a prompt of two tokens, one of which has one",
        ("ids", array(integer(5))),
        (
            "prompt_logprobs",
            mapping(
                ("values", bin8(bytes.fromhex("000080bf01000000"))),
                ("tokens", array(bin8(b"b"))),
                ("ids", array(integer(7))),
                ("before", bin8(b"<s>")),
            ),
        ),
        ids=[5],
        prompt_logprobs={
            "values": {"bin": "000080bf01000000"},
            "tokens": [{"bin": "62"}],
            "ids": [7],
            "before": {"bin": "3c733e"},
        },
    ),
    delta("delta-logprobs-nil", "nil where the table has nil", ("logprobs", NIL), logprobs=None),
    delta("delta-logprobs-empty", "an empty map: of no token", ("logprobs", mapping()), logprobs={}),
    delta("delta-unknown-bin", "an unknown key whose bytes are no UTF-8", ("blob", bin8(b"\xff\xfe"))),
    delta("delta-unknown-proto", "__proto__ is a key like any other", ("__proto__", mapping(("text", text("no"))))),
    delta("delta-text-proto", "and a text like any other", ("text", text("__proto__")), text="__proto__"),
    delta("delta-unknown-deep", "an unknown value 24 arrays deep", ("x", b"\x91" * 24 + NIL)),
    Vector("delta-map16", (header("D"), map16(("id", u8(7)))), "a map with a 2-byte length", "ok", {"id": 7}),
    Vector(
        "done",
        (header("F"), mapping(*DONE)),
        "an int and a 4-byte float where floats are expected",
        "ok",
        {"id": 7, "finish": ["stop"], "usage": USAGE_VALUE, "timing": TIMING_VALUE},
    ),
    Vector(
        "done-two-samples",
        (
            header("F"),
            mapping(
                ("id", integer(7)),
                ("finish", array(text("length"), text("aborted"))),
                (
                    "usage",
                    mapping(
                        ("prompt_tokens", integer(3)), ("output_tokens", integer(2)), ("cached_tokens", integer(1))
                    ),
                ),
                ("timing", TIMING),
            ),
        ),
        "how each of two samples ended, and a cached token",
        "ok",
        {
            "id": 7,
            "finish": ["length", "aborted"],
            "usage": {**USAGE_VALUE, "cached_tokens": 1},
            "timing": TIMING_VALUE,
        },
    ),
    sent(
        "error-of-a-request",
        "E",
        "ends request 8; may be tried again after 1.5 s",
        ("code", text("overloaded")),
        ("message", text("the queue is full")),
        ("retryable", TRUE),
        ("retry_after_ms", u16(1500)),
        ("id", integer(8)),
        ("about", text("generate")),
        code="overloaded",
        message="the queue is full",
        retryable=True,
        retry_after_ms=1500,
        id=8,
        about="generate",
    ),
    sent(
        "error-bare",
        "E",
        "ends no request",
        ("code", text("internal")),
        ("message", text("")),
        code="internal",
        message="",
    ),
    sent(
        "error-id-nil",
        "E",
        "a nil id is an absent one, and 0 is an id",
        ("code", text("bad_frame")),
        ("message", text("x")),
        ("id", NIL),
        ("retry_after_ms", integer(0)),
        code="bad_frame",
        message="x",
        id=None,
        retry_after_ms=0,
    ),
    sent(
        "error-versions",
        "E",
        "what the server speaks",
        ("code", text("unsupported_version")),
        ("message", text("x")),
        ("versions", array(integer(1), integer(2))),
        code="unsupported_version",
        message="x",
        versions=[1, 2],
    ),
    sent(
        "error-code-of-the-future",
        "E",
        "a code that is not known yet still ends its request",
        ("code", text("quota_exceeded")),
        ("message", text("x")),
        ("id", integer(8)),
        code="quota_exceeded",
        message="x",
        id=8,
    ),
    sent(
        "deltas",
        "U",
        "of two requests, and two samples of the second",
        (
            "items",
            array(
                mapping(("id", integer(7)), ("seq", integer(2)), ("ids", array(integer(5))), ("text", text("a"))),
                mapping(("id", integer(8)), ("ids", array(u16(300), integer(1))), ("text", text("é"))),
                mapping(("id", integer(8)), ("sample", integer(1)), ("finish", text("stop")), ("x", integer(1))),
            ),
        ),
        items=[
            {"id": 7, "seq": 2, "ids": [5], "text": "a"},
            {"id": 8, "ids": [300, 1], "text": "é"},
            {"id": 8, "sample": 1, "finish": "stop"},
        ],
    ),
    sent("deltas-none", "U", "an empty list, with a 4-byte length", ("items", array32()), items=[]),
    sent("draining", "N", "10 s for open requests", ("grace_ms", u16(10000)), grace_ms=10000),
    sent("notice", "I", "a line for people", ("text", text("a new worker serves")), text="a new worker serves"),
    Vector("stats", (header("T"), mapping(*STATS)), "a snapshot", "ok", STATS_VALUE),
    Vector(
        "stats-live",
        (
            header("T"),
            mapping(
                *STATS,
                (
                    "live",
                    mapping(
                        ("requests", array()),
                        ("steps", mapping(*COLUMNS)),
                    ),
                ),
            ),
        ),
        "of a server that somebody watches: two steps",
        "ok",
        {**STATS_VALUE, "live": {"requests": [], "steps": COLUMN_VALUES}},
    ),
    Vector(
        "stats-faults",
        (
            header("T"),
            mapping(
                *STATS,
                ("worker_restarts", integer(2)),
                ("worker_loss", text("the worker hung")),
                ("poisoned", integer(1)),
                ("numerical_errors", u16(300)),
            ),
        ),
        "of a server whose worker was lost",
        "ok",
        {
            **STATS_VALUE,
            "worker_restarts": 2,
            "worker_loss": "the worker hung",
            "poisoned": 1,
            "numerical_errors": 300,
        },
    ),
    Vector(
        "stats-engines",
        (header("T"), mapping(*STATS, ("engines", array(mapping(*ENGINE), mapping(*ENGINE_AWAY))))),
        "of a server with two engines, one of which is being started",
        "ok",
        {**STATS_VALUE, "engines": [ENGINE_VALUES, ENGINE_AWAY_VALUES]},
    ),
    Vector(
        "welcome-capacity",
        (header("W"), mapping(*WELCOME, ("capacity", mapping(*CAPACITY)))),
        "to a frontend that routes requests here",
        "ok",
        {**WELCOME_VALUE, "capacity": CAPACITY_VALUES},
    ),
    delta(
        "delta-routed",
        "to such a frontend, the first one of a request",
        ("ids", array(integer(5))),
        ("queued_ms", f64(2.5)),
        ids=[5],
        queued_ms=2.5,
    ),
    delta("delta-deaths", "a worker ended that computed it", ("deaths", integer(2)), deaths=2),
    Vector("load", (header("O"), mapping(*LOAD)), "what the engines have to do", "ok", LOAD_VALUES),
    sent(
        "health",
        "M",
        "all is well",
        ("status", text("ok")),
        ("ready", TRUE),
        ("worker_ms", f64(1.25)),
        status="ok",
        ready=True,
        worker_ms=1.25,
    ),
    sent(
        "health-stalled",
        "M",
        "the worker does not answer; an int for a float",
        ("status", text("stalled")),
        ("ready", FALSE),
        ("worker_ms", u16(5000)),
        status="stalled",
        ready=False,
        worker_ms=5000.0,
    ),
    sent("server-ping", "P", "the server asks", ("t", integer(4)), ("instance", text("a1")), t=4, instance="a1"),
    sent("server-ping-empty", "P", "every field has its default"),
    sent(
        "server-pong",
        "Q",
        "the server answers",
        ("t", u64(MAX_INT)),
        ("instance", text("a1")),
        t=MAX_INT,
        instance="a1",
    ),
]
