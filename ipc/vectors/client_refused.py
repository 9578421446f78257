"""Messages of a client that no server takes, each with the error that answers it.

What is no message at all is a bad_frame, and its error has no id. What is a message with a field outside its table is a
bad_request; where it is a generate whose id can be read, the error carries the id and ends that request.

Written by hand from PROTOCOL.md. Read by make.py.
"""

from graphgen.ipc.vectors.wire import (
    NIL,
    TRUE,
    Frame,
    Repeat,
    Vector,
    array,
    array16,
    array32,
    bin8,
    f32,
    f64,
    header,
    i8,
    i64,
    integer,
    map32,
    mapping,
    negative_fixint,
    str16,
    text,
    u32,
    u64,
)

BAD_FRAME, BAD_REQUEST = "bad_frame", "bad_request"
BEYOND_INT = 2**53
BEYOND_TOKEN = 2**31
PROMPT = ("text", text("Hi"))
GENERATE = header("G")
CHAT = array(mapping(("role", text("user")), ("content", text("a"))))
GOOD = mapping(("id", integer(1)), PROMPT)
HEAD = b"\x82\xa2id\x01"
"""A map of two pairs, the first of them id 1."""


def no_message(name: str, meaning: str, *frames: Frame) -> Vector:
    return Vector(name, frames, meaning, BAD_FRAME)


def refused(name: str, meaning: str, kind: str, *pairs: tuple[str, bytes]) -> Vector:
    """A message of which no request can be named."""
    return Vector(name, (header(kind), mapping(*pairs)), meaning, BAD_REQUEST)


def refused_request(name: str, meaning: str, *pairs: tuple[str, bytes]) -> Vector:
    """A generate of id 1 whose error carries the id."""
    return Vector(name, (GENERATE, mapping(("id", integer(1)), *pairs)), meaning, BAD_REQUEST, error_id=1)


def refused_sampling(name: str, meaning: str, field: str, encoded: bytes) -> Vector:
    return refused_request(name, meaning, PROMPT, ("sampling", mapping((field, encoded))))


FRAMES = [
    no_message("frames-one", "a header without its map", GENERATE),
    no_message("frames-three", "a frame behind the map", GENERATE, GOOD, b""),
    no_message("frames-empty-delimiter", "the empty frame that REQ sockets put first", b"", GENERATE, GOOD),
    no_message("header-empty", "an empty header", b"", GOOD),
    no_message("header-of-3-bytes", "a header without its kind", b"GG\x01", GOOD),
    no_message("header-of-5-bytes", "a header with a byte behind the kind", b"GG\x01GG", GOOD),
    no_message("header-lower-case", "other letters than GG", b"gg\x01G", GOOD),
    no_message("header-long", "a header of a megabyte", [Repeat(b"G", 2**20)], GOOD),
    no_message("kind-nul", "a kind that does not exist", b"GG\x01\x00", GOOD),
    no_message("kind-lower-case", "g is not G", b"GG\x01g", GOOD),
    no_message("kind-of-servers", "a welcome from a client", header("W"), mapping()),
    *(
        Vector(f"major-{major}", (header("G", major), GOOD), "a version that no server speaks", "unsupported_version")
        for major in (0, 2, 255)
    ),
    Vector(
        "major-2-unknown-layout",
        (header("G", 2), b"\xc1not msgpack"),
        "the version is looked at before the map",
        "unsupported_version",
    ),
]

NO_MAP = [
    no_message("map-missing", "an empty second frame", GENERATE, b""),
    no_message("map-is-nil", "nil is no map", header("S"), NIL),
    no_message("map-is-array", "an array is no map", GENERATE, array(integer(1), text("Hi"))),
    no_message("map-is-str", "a str is no map", GENERATE, text('{"id":1}')),
    no_message("map-is-json", "JSON is not msgpack", GENERATE, b'{"id":1,"text":"Hi"}'),
    no_message("map-reserved-byte", "c1 is never used", GENERATE, HEAD + b"\xa4text\xc1"),
    no_message("map-trailing-byte", "a byte behind the map", GENERATE, GOOD + b"\x00"),
    no_message("map-trailing-map", "a second map behind the map", GENERATE, GOOD + GOOD),
    no_message("truncated-value", "the last byte of a str is missing", GENERATE, GOOD[:-1]),
    no_message("truncated-key", "ends within a key", GENERATE, b"\x82\xa2id\x01\xa4te"),
    no_message("truncated-pair", "a key without its value", GENERATE, HEAD + b"\xa4text"),
    no_message("truncated-length", "ends within the length of a str", GENERATE, HEAD + b"\xa4text\xda\x00"),
    no_message("truncated-integer", "8 bytes are said, 3 are there", header("X"), b"\x81\xa2id\xcf\x00\x00\x00"),
    no_message("lying-map", "says 15 pairs, has 1", GENERATE, b"\x8f\xa2id\x01"),
    no_message("lying-map32", "says 2^32-1 pairs, has 1", GENERATE, b"\xdf\xff\xff\xff\xff\xa2id\x01"),
    no_message("lying-str32", "says 2^32-1 bytes, has 2", GENERATE, HEAD + b"\xa4text\xdb\xff\xff\xff\xffHi"),
    no_message(
        "lying-unknown-array", "an unknown key, 2^32-1 items said", GENERATE, HEAD + b"\xa1x\xdd\xff\xff\xff\xff"
    ),
    no_message(
        "nesting-bomb", "10^6 arrays within each other", GENERATE, [Repeat(HEAD + b"\xa1x", 1), Repeat(b"\x91", 10**6)]
    ),
    no_message(
        "nesting-bomb-closed",
        "10^6 arrays within each other, complete",
        GENERATE,
        [Repeat(HEAD + b"\xa1x", 1), Repeat(b"\x91", 10**6), Repeat(NIL, 1)],
    ),
    no_message(
        "nesting-bomb-of-maps",
        "10^6 maps within each other, complete",
        GENERATE,
        [Repeat(HEAD + b"\xa1x", 1), Repeat(b"\x81\xa1x", 10**6), Repeat(NIL, 1)],
    ),
    *(
        no_message(
            f"utf8-{name}",
            f"a str that is no UTF-8: {why}",
            GENERATE,
            mapping(("id", integer(1)), ("text", text(data))),
        )
        for name, data, why in [
            ("lone-continuation", b"\x80", "a continuation byte alone"),
            ("truncated", b"a\xe2\x82", "a character cut off"),
            ("overlong", b"\xc0\xaf", "a slash in two bytes"),
            ("surrogate", b"\xed\xa0\x80", "half a surrogate pair"),
            ("beyond-unicode", b"\xf4\x90\x80\x80", "a code point above 10ffff"),
            ("5-bytes", b"\xf8\x88\x80\x80\x80", "a character of 5 bytes"),
            ("latin-1", "é".encode("latin-1"), "Latin-1"),
        ]
    ),
]

KEYS_AND_IDS = [
    Vector("key-int", (header("X"), b"\x82\xa2id\x01\x01\x02"), "a key that is an int", BAD_REQUEST),
    Vector("key-bin", (header("X"), b"\x82\xa2id\x01" + bin8(b"x") + b"\x02"), "a key that is a bin", BAD_REQUEST),
    refused("id-missing", "no id, so the error has none", "G", PROMPT),
    refused("id-nil", "nil where the table has no nil", "G", ("id", NIL), PROMPT),
    refused("id-negative", "below 0", "G", ("id", negative_fixint(-1)), PROMPT),
    refused("id-int64-negative", "below 0, in 8 bytes", "G", ("id", i64(-(2**63))), PROMPT),
    refused("id-2^53", "one above the largest integer", "G", ("id", u64(BEYOND_INT)), PROMPT),
    refused("id-2^53+1", "a double would lose its last digit", "G", ("id", u64(BEYOND_INT + 1)), PROMPT),
    refused("id-2^64-1", "the largest integer of msgpack", "G", ("id", u64(2**64 - 1)), PROMPT),
    refused("id-float", "a float where an int is expected", "G", ("id", f64(1.0)), PROMPT),
    refused("id-bool", "true is not 1", "G", ("id", TRUE), PROMPT),
    refused("id-str", "a number in letters", "G", ("id", text("1")), PROMPT),
    refused("cancel-without-id", "a cancel of nothing", "X"),
    refused(
        "cancel-session-65", "a name longer than any session's", "X", ("id", integer(7)), ("session", text("s" * 65))
    ),
    refused(
        "cancel-session-int", "an error for a cancel ends no request", "X", ("id", integer(7)), ("session", integer(1))
    ),
    refused("ping-negative", "below 0", "P", ("t", negative_fixint(-1))),
    refused("ping-float", "a float where an int is expected", "P", ("t", f32(1.0))),
    refused("hello-one-version", "an array of 1 where 2 are expected", "H", ("versions", array(integer(1)))),
    refused("hello-versions-float", "versions are ints", "H", ("versions", array(f64(1.0), f64(1.0)))),
    refused("hello-versions-negative", "below 0", "H", ("versions", array(negative_fixint(-1), integer(2)))),
    refused("hello-client-257", "a name of 257 characters", "H", ("client", text("c" * 257))),
    refused("hello-notices-int", "1 is not true", "H", ("notices", integer(1))),
    refused("hello-batches-nil", "nil is no bool", "H", ("batches", NIL)),
    refused("hello-client-nil", "nil where the table has no nil", "H", ("client", NIL)),
]

PROMPTS = [
    refused_request("text-bin", "bin is not str", ("text", bin8(b"Hi"))),
    refused_request("text-int", "an int where a str is expected", ("text", integer(5))),
    refused_request("packed-str", "str is not bin", ("prompt_u32", text("abcd"))),
    refused_request("packed-empty", "a prompt of no tokens", ("prompt_u32", bin8(b""))),
    refused_request("packed-3-bytes", "less than one token", ("prompt_u32", bin8(bytes(3)))),
    refused_request("ids-empty", "a prompt of no tokens", ("prompt_ids", array())),
    refused_request("ids-negative", "no token is below 0", ("prompt_ids", array(integer(1), negative_fixint(-1)))),
    refused_request("ids-2^31", "no token is so large", ("prompt_ids", array(u32(BEYOND_TOKEN)))),
    refused_request("ids-float", "a float where an int is expected", ("prompt_ids", array(f64(5.0)))),
    refused_request("ids-nil-item", "nil within the list", ("prompt_ids", array(integer(1), NIL))),
    refused_request("ids-in-bin", "packed ids belong into prompt_u32", ("prompt_ids", bin8(bytes(4)))),
    Vector(
        "ids-one-too-many",
        (GENERATE, [Repeat(HEAD + b"\xaaprompt_ids\xdd\x00\x10\x00\x01", 1), Repeat(b"\x01", 2**20 + 1)]),
        "2^20+1 token ids",
        BAD_REQUEST,
        error_id=1,
    ),
    refused_request("chat-empty", "a chat of no messages", ("messages", array())),
    refused_request("chat-no-role", "a message without a role", ("messages", array(mapping(("content", text("a")))))),
    refused_request(
        "chat-no-content", "a message without content", ("messages", array(mapping(("role", text("user")))))
    ),
    refused_request(
        "chat-role-empty",
        "a role of no characters",
        ("messages", array(mapping(("role", text("")), ("content", text("a"))))),
    ),
    refused_request(
        "chat-role-65",
        "a role of 65 characters",
        ("messages", array(mapping(("role", text("r" * 65)), ("content", text("a"))))),
    ),
    refused_request(
        "chat-content-nil", "nil is no text", ("messages", array(mapping(("role", text("user")), ("content", NIL))))
    ),
    refused_request(
        "chat-content-parts",
        "content is one str, not a list of parts",
        ("messages", array(mapping(("role", text("user")), ("content", array(text("a")))))),
    ),
    refused_request("tenant-257", "one character too many", PROMPT, ("tenant", str16(b"t" * 257))),
    refused_request("tools-of-strs", "a tool is a map", ("messages", CHAT), ("tools", array(text("add")))),
    refused_request("tools-129", "one too many", ("messages", CHAT), ("tools", array16(*[mapping()] * 129))),
    refused_request("tools-key-int", "a key is a str", ("messages", CHAT), ("tools", array(b"\x81\x01\x02"))),
    refused_request(
        "switch-array", "switches are no arrays", ("messages", CHAT), ("chat_template_kwargs", mapping(("a", array())))
    ),
    refused_request(
        "switch-1025",
        "a text of 1025 characters",
        ("messages", CHAT),
        ("chat_template_kwargs", mapping(("a", str16(b"x" * 1025)))),
    ),
    refused_request(
        "chat-name-int",
        "a number is no name",
        ("messages", array(mapping(("role", text("user")), ("content", text("a")), ("name", integer(1))))),
    ),
    refused_request("chat-of-strs", "a message is a map", ("messages", array(text("Hi")))),
    Vector(
        "chat-1025",
        (
            GENERATE,
            [
                Repeat(HEAD + b"\xa8messages\xdc\x04\x01", 1),
                Repeat(mapping(("role", text("user")), ("content", text("a"))), 1025),
            ],
        ),
        "1025 messages",
        BAD_REQUEST,
        error_id=1,
    ),
    refused_request("stream-int", "1 is not true", PROMPT, ("stream", integer(1))),
    refused_request("echo-ids-str", "a str is no bool", PROMPT, ("echo_ids", text("yes"))),
    refused_request("sampling-nil", "nil where the table has no nil", PROMPT, ("sampling", NIL)),
    refused_request("sampling-array", "an array where a map is expected", PROMPT, ("sampling", array(integer(5)))),
]

SAMPLING = [
    refused_sampling(name, meaning, field, encoded)
    for name, meaning, field, encoded in [
        ("max-tokens-0", "below the least", "max_tokens", integer(0)),
        ("max-tokens-2^31", "above the most", "max_tokens", u32(BEYOND_TOKEN)),
        ("max-tokens-float", "a float where an int is expected", "max_tokens", f64(16.0)),
        ("max-tokens-str", "a number in letters", "max_tokens", text("16")),
        ("min-tokens-nil", "nil where the table has no nil", "min_tokens", NIL),
        ("temperature-negative", "below 0, as an int", "temperature", i8(-1)),
        ("temperature-101", "above 100, as an int", "temperature", integer(101)),
        ("temperature-nan", "NaN is outside every range", "temperature", f64(float("nan"))),
        ("temperature-nan32", "NaN in 4 bytes", "temperature", f32(float("nan"))),
        ("temperature-inf", "infinity is outside every range", "temperature", f64(float("inf"))),
        ("temperature-str", "a number in letters", "temperature", text("0.7")),
        ("temperature-bool", "true is not 1.0", "temperature", TRUE),
        ("temperature-nil", "nil where the table has no nil", "temperature", NIL),
        ("top-k-negative", "-1 does not mean off", "top_k", negative_fixint(-1)),
        ("top-p-zero", "above 0 is asked for", "top_p", integer(0)),
        ("top-p-above-one", "the next double above 1", "top_p", f64(1.0000000000000002)),
        ("top-p-minus-inf", "minus infinity", "top_p", f64(float("-inf"))),
        ("min-p-above-one", "above 1", "min_p", f64(1.5)),
        ("repetition-penalty-zero", "above 0 is asked for", "repetition_penalty", f64(0.0)),
        ("presence-penalty-nan", "NaN is outside every range", "presence_penalty", f32(float("nan"))),
        ("frequency-penalty-low", "below -100", "frequency_penalty", i8(-101)),
        ("seed-negative", "below 0", "seed", negative_fixint(-1)),
        ("seed-2^53", "one above the largest integer", "seed", u64(BEYOND_INT)),
        ("seed-2^64-1", "a seed of 64 bits", "seed", u64(2**64 - 1)),
        ("seed-float", "a float where an int is expected", "seed", f64(1.0)),
        ("stop-str", "one stop string is a list of one", "stop", text("END")),
        ("stop-empty-str", "a stop string of no characters", "stop", array(text(""))),
        ("stop-17", "one more than there may be", "stop", array16(*[text("x")] * 17)),
        ("stop-1025-characters", "one character too long", "stop", array(str16(b"x" * 1025))),
        ("stop-bin", "bin is not str", "stop", array(bin8(b"END"))),
        ("stop-nil", "nil where the table has no nil", "stop", NIL),
        ("stop-token-ids-17", "one more than there may be", "stop_token_ids", array16(*[integer(5)] * 17)),
        ("stop-token-id-negative", "no token is below 0", "stop_token_ids", array(negative_fixint(-1))),
        ("logit-bias-map", "pairs are asked for", "logit_bias", mapping(("5", integer(1)))),
        ("logit-bias-alone", "a token without its bias", "logit_bias", array(array(integer(5)))),
        ("logit-bias-101", "above the largest", "logit_bias", array(array(integer(5), integer(101)))),
        ("logit-bias-nan", "NaN is outside every range", "logit_bias", array(array(integer(5), f64(float("nan"))))),
        ("logit-bias-negative", "no token is below 0", "logit_bias", array(array(negative_fixint(-1), integer(1)))),
        (
            "logit-bias-1025",
            "one more than there may be",
            "logit_bias",
            array16(*[array(integer(5), integer(1))] * 1025),
        ),
        ("ignore-eos-int", "1 is not true", "ignore_eos", integer(1)),
        ("logprobs-21", "more than anybody tells", "logprobs", integer(21)),
        ("logprobs-negative", "below 0", "logprobs", negative_fixint(-1)),
        ("logprobs-bool", "true is not 1", "logprobs", TRUE),
        ("prompt-logprobs-21", "more than anybody tells", "prompt_logprobs", integer(21)),
        ("n-0", "no samples", "n", integer(0)),
        ("n-17", "one more than there may be", "n", integer(17)),
        ("n-2^32", "a flood of samples", "n", u64(2**32)),
        ("priority-10", "above the highest class", "priority", integer(10)),
        ("deadline-0", "above 0 is asked for", "deadline_ms", integer(0)),
        ("deadline-above-an-hour", "above the longest", "deadline_ms", f64(3_600_000.5)),
        ("itl-target-inf", "infinity is outside every range", "itl_target_ms", f64(float("inf"))),
        ("ttft-target-negative", "below 0", "ttft_target_ms", f64(-1.0)),
        ("tpot-target-0", "above 0 is asked for", "tpot_target_ms", integer(0)),
        ("cache-salt-257", "257 characters", "cache_salt", str16("😀".encode() * 257)),
        ("cache-salt-nil", "nil where the table has no nil", "cache_salt", NIL),
        ("structured-without-kind", "what the text means is not said", "structured", mapping(("text", text("a")))),
        ("structured-kind", "a kind that there is not", "structured", mapping(("kind", text("xml")))),
        ("structured-str", "a map is asked for", "structured", text("[a-z]+")),
        (
            "structured-after-257",
            "one character too long",
            "structured",
            mapping(("kind", text("regex")), ("text", text("a")), ("after", str16(b"a" * 257))),
        ),
        (
            "structured-empty-option",
            "an option of no characters",
            "structured",
            mapping(("kind", text("choice")), ("options", array(text("")))),
        ),
        (
            "structured-1001",
            "one option more than there may be",
            "structured",
            mapping(("kind", text("choice")), ("options", array16(*[text("a")] * 1001))),
        ),
        ("model-defaults-int", "1 is not true", "model_defaults", integer(1)),
    ]
]

LYING = [
    Vector(f"lying-{name}", (GENERATE, HEAD + tail), meaning, BAD_FRAME)
    for name, tail, meaning in [
        ("bin32", b"\xaaprompt_u32\xc6\x00\x01\x00\x00abcd", "says 65536 bytes, has 4"),
        ("array16", b"\xaaprompt_ids\xdc\x01\x00\x01", "says 256 items, has 1"),
        ("sampling", b"\xa8sampling\x82\xa1n\x01", "says 2 pairs, has 1"),
    ]
]

WIDE = [
    Vector(
        "wide-and-wrong",
        (GENERATE, map32(("sampling", map32(("n", u64(17)))), ("text", str16(b"Hi")), ("id", u64(1)))),
        "the id is found behind the fault, whatever the widths",
        BAD_REQUEST,
        error_id=1,
    ),
    Vector(
        "stop-array32",
        (GENERATE, mapping(("id", integer(1)), PROMPT, ("sampling", mapping(("stop", array32(text(""))))))),
        "an empty stop string in an array with a 4-byte length",
        BAD_REQUEST,
        error_id=1,
    ),
]

CLIENT_REFUSED = [*FRAMES, *NO_MAP, *LYING, *KEYS_AND_IDS, *PROMPTS, *SAMPLING, *WIDE]
