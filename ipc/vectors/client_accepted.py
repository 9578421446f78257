"""Messages of a client that every server takes, and those that decode but ask for what cannot be.

Written by hand from PROTOCOL.md. Read by make.py.
"""

from graphgen.ipc.vectors.wire import (
    FALSE,
    NIL,
    TRUE,
    Repeat,
    Value,
    Vector,
    array,
    array16,
    array32,
    bin8,
    bin16,
    bin32,
    f32,
    f64,
    header,
    i8,
    i16,
    i32,
    i64,
    integer,
    map16,
    map32,
    mapping,
    str8,
    str16,
    str32,
    text,
    u8,
    u16,
    u32,
    u64,
)

MAX_INT = 2**53 - 1
MAX_TOKEN = 2**31 - 1
PROMPT = ("text", text("Hi"))
PACKED = bytes.fromhex("01000000c8000000")
ROUTED = (
    ("seed", u64(2**63 - 1)),
    ("age_ms", f64(12.5)),
    ("output_u32", bin8(PACKED)),
    ("first_token_ms", f64(7.5)),
    ("moves", integer(1)),
    ("deaths", integer(2)),
)
ROUTED_VALUES: dict[str, Value] = {
    "seed": 2**63 - 1,
    "age_ms": 12.5,
    "output_u32": {"bin": PACKED.hex()},
    "first_token_ms": 7.5,
    "moves": 1,
    "deaths": 2,
}


def taken(name: str, kind: str, body: bytes, meaning: str, **value: Value) -> Vector:
    return Vector(name, (header(kind), body), meaning, "ok", value)


def prompted(name: str, meaning: str, *pairs: tuple[str, bytes], **value: Value) -> Vector:
    """A generate of id 1 and text Hi, and what else it carries."""
    body = mapping(("id", integer(1)), PROMPT, *pairs)
    return taken(name, "G", body, meaning, id=1, text="Hi", **value)


def sampled(name: str, meaning: str, field: str, encoded: bytes, value: Value) -> Vector:
    return prompted(name, meaning, ("sampling", mapping((field, encoded))), sampling={field: value})


def impossible(name: str, body: bytes, code: str, meaning: str, **value: Value) -> Vector:
    """Decodes, and is refused by what the server knows: its vocabulary, its limits, the other fields."""
    return Vector(name, (header("G"), body), meaning, code, value, error_id=1)


HELLO = [
    taken("hello-empty", "H", mapping(), "every field has its default"),
    taken("hello-client", "H", mapping(("client", text("example/1.0"))), "the name of a client", client="example/1.0"),
    taken("hello-versions", "H", mapping(("versions", array(integer(1), integer(3)))), "1 to 3", versions=[1, 3]),
    taken("hello-client-256", "H", mapping(("client", str16(b"c" * 256))), "the longest name", client="c" * 256),
    taken("hello-notices", "H", mapping(("notices", TRUE)), "a client that wants to be told", notices=True),
    taken("hello-batches", "H", mapping(("batches", TRUE)), "a client that takes many deltas at once", batches=True),
    taken("hello-map16", "H", map16(("client", text("c"))), "a map with a 2-byte length", client="c"),
    taken("hello-map32", "H", map32(("client", text("c"))), "a map with a 4-byte length", client="c"),
]

ID_WIDTHS = [
    taken(f"cancel-id-{name}", "X", mapping(("id", encoded)), "an integer in any width is the same integer", id=value)
    for name, encoded, value in [
        ("fixint-0", integer(0), 0),
        ("fixint-127", integer(127), 127),
        ("uint8-1", u8(1), 1),
        ("uint8-255", u8(255), 255),
        ("uint16-1", u16(1), 1),
        ("uint16-65535", u16(65535), 65535),
        ("uint32-1", u32(1), 1),
        ("uint32-max", u32(2**32 - 1), 2**32 - 1),
        ("uint64-1", u64(1), 1),
        ("uint64-2^32", u64(2**32), 2**32),
        ("uint64-max", u64(MAX_INT), MAX_INT),
        ("int8-5", i8(5), 5),
        ("int16-5", i16(5), 5),
        ("int32-5", i32(5), 5),
        ("int64-5", i64(5), 5),
        ("int64-max", i64(MAX_INT), MAX_INT),
    ]
]

PROMPTS = [
    prompted("generate-text", "a text, all else by default"),
    taken("generate-key-order", "G", mapping(PROMPT, ("id", integer(1))), "the id behind the text", id=1, text="Hi"),
    taken(
        "generate-duplicate-key",
        "G",
        mapping(("id", integer(9)), PROMPT, ("id", integer(1))),
        "of a key that occurs twice the last one counts",
        id=1,
        text="Hi",
    ),
    prompted("generate-nil-is-absent", "nil where the table has nil is the default", ("messages", NIL), messages=None),
    taken(
        "generate-unicode",
        "G",
        mapping(("id", integer(1)), ("text", text("é€😀\0"))),
        "UTF-8 of 2, 3, 4 and 1 bytes, the last one NUL",
        id=1,
        text="é€😀\0",
    ),
    taken("generate-str8", "G", mapping(("id", integer(1)), ("text", str8(b"a"))), "str 8 of length 1", id=1, text="a"),
    taken("generate-str16", "G", mapping(("id", integer(1)), ("text", str16(b"a"))), "str 16", id=1, text="a"),
    taken("generate-str32", "G", mapping(("id", integer(1)), ("text", str32(b"a"))), "str 32", id=1, text="a"),
    taken(
        "generate-chat",
        "G",
        mapping(
            ("id", integer(1)),
            (
                "messages",
                array(
                    mapping(("role", text("system")), ("content", text(""))),
                    mapping(("content", text("Hi!")), ("role", text("user")), ("mood", text("gay"))),
                ),
            ),
        ),
        "two chat messages: an empty content, an unknown key",
        id=1,
        messages=[{"role": "system", "content": ""}, {"role": "user", "content": "Hi!"}],
    ),
    taken(
        "generate-chat-of-tools",
        "G",
        mapping(
            ("id", integer(1)),
            (
                "messages",
                array(
                    mapping(("role", text("user")), ("content", text("2+2?")), ("name", text("Ann"))),
                    mapping(
                        ("role", text("assistant")),
                        ("content", text("")),
                        ("reasoning_content", text("Hm.")),
                        (
                            "tool_calls",
                            array(
                                mapping(
                                    ("id", text("c1")),
                                    (
                                        "function",
                                        mapping(("name", text("add")), ("arguments", mapping(("a", integer(2))))),
                                    ),
                                )
                            ),
                        ),
                    ),
                    mapping(("role", text("tool")), ("content", text("4")), ("tool_call_id", text("c1"))),
                ),
            ),
            (
                "tools",
                array(
                    mapping(("type", text("function")), ("strict", FALSE), ("depth", array(NIL, integer(-1), f64(0.5))))
                ),
            ),
        ),
        "a chat with a tool, its call and its result; values of every kind",
        id=1,
        messages=[
            {"role": "user", "content": "2+2?", "name": "Ann"},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "Hm.",
                "tool_calls": [{"id": "c1", "function": {"name": "add", "arguments": {"a": 2}}}],
            },
            {"role": "tool", "content": "4", "tool_call_id": "c1"},
        ],
        tools=[{"type": "function", "strict": False, "depth": [None, -1, 0.5]}],
    ),
    taken(
        "generate-chat-of-documents",
        "G",
        mapping(
            ("id", integer(1)),
            ("messages", array(mapping(("role", text("user")), ("content", text("Who?"))))),
            ("documents", array(mapping(("title", text("é"))))),
            (
                "chat_template_kwargs",
                mapping(("enable_thinking", FALSE), ("effort", text("low")), ("budget", integer(-1)), ("none", NIL)),
            ),
        ),
        "a chat with a document and switches of every type",
        id=1,
        messages=[{"role": "user", "content": "Who?"}],
        documents=[{"title": "é"}],
        chat_template_kwargs={"enable_thinking": False, "effort": "low", "budget": -1, "none": None},
    ),
    taken(
        "generate-ids",
        "G",
        mapping(("id", integer(1)), ("prompt_ids", array(integer(1), integer(200), integer(70)))),
        "token ids in a list",
        id=1,
        prompt_ids=[1, 200, 70],
    ),
    taken(
        "generate-ids-array16",
        "G",
        mapping(("id", integer(1)), ("prompt_ids", array16(u64(7)))),
        "array 16 of length 1, its id in 8 bytes",
        id=1,
        prompt_ids=[7],
    ),
    taken(
        "generate-ids-array32",
        "G",
        mapping(("id", integer(1)), ("prompt_ids", array32(integer(7)))),
        "array 32 of length 1",
        id=1,
        prompt_ids=[7],
    ),
    *(
        taken(
            f"generate-u32-{name}",
            "G",
            mapping(("id", integer(1)), ("prompt_u32", encoded)),
            f"token ids 1 and 200, packed, as {name}",
            id=1,
            prompt_u32={"bin": "01000000c8000000"},
        )
        for name, encoded in [
            ("bin8", bin8(bytes.fromhex("01000000c8000000"))),
            ("bin16", bin16(bytes.fromhex("01000000c8000000"))),
            ("bin32", bin32(bytes.fromhex("01000000c8000000"))),
        ]
    ),
    prompted("generate-not-streamed", "one delta for each sample", ("stream", FALSE), stream=False),
    prompted("generate-echo-ids", "accepted carries the prompt", ("echo_ids", TRUE), echo_ids=True),
    prompted("generate-tenant-256", "on behalf of another", ("tenant", str16("é".encode() * 256)), tenant="é" * 256),
    prompted("generate-empty-sampling", "an empty map is all defaults", ("sampling", mapping()), sampling={}),
    prompted("unknown-key", "an unknown key is ignored", ("tomorrow", integer(1))),
    prompted(
        "unknown-key-nested",
        "an unknown key with a value of every kind",
        ("tomorrow", array(mapping(("deep", array(NIL, TRUE, f64(0.5), integer(-1)))), bin8(b"\xff"), text("x"))),
    ),
    prompted("unknown-key-deep", "a value 24 arrays deep", ("tomorrow", b"\x91" * 24 + NIL)),
    prompted("unknown-key-empty", "a key of no characters", ("", integer(1))),
    prompted("unknown-key-of-javascript", "__proto__ is a key like any other", ("__proto__", mapping())),
    prompted(
        "unknown-sampling-key",
        "an unknown key within sampling is ignored",
        ("sampling", mapping(("beam_width", integer(4)), ("top_k", integer(4)))),
        sampling={"top_k": 4},
    ),
]

SAMPLING = [
    sampled("max-tokens-1", "the fewest", "max_tokens", integer(1), 1),
    sampled("max-tokens-most", "the most", "max_tokens", u32(MAX_TOKEN), MAX_TOKEN),
    sampled("max-tokens-nil", "nil is not absent here: to the end of the context", "max_tokens", NIL, None),
    sampled("temperature-int", "an int where a float is expected", "temperature", integer(0), 0.0),
    sampled("temperature-uint64", "an int of 8 bytes where a float is expected", "temperature", u64(2), 2.0),
    sampled("temperature-float32", "a float in 4 bytes", "temperature", f32(0.5), 0.5),
    sampled("temperature-float64", "a float in 8 bytes", "temperature", f64(0.7), 0.7),
    sampled("temperature-100", "the highest", "temperature", f64(100.0), 100.0),
    sampled("temperature-minus-zero", "-0.0 is 0", "temperature", f64(-0.0), 0.0),
    sampled("top-p-tiny", "above 0, however little", "top_p", f64(5e-324), 5e-324),
    sampled("top-p-one", "the highest, as an int", "top_p", integer(1), 1.0),
    sampled("top-k-most", "the most", "top_k", u64(MAX_TOKEN), MAX_TOKEN),
    sampled("min-p-one", "the highest", "min_p", f64(1.0), 1.0),
    sampled("repetition-penalty-100", "the highest", "repetition_penalty", f64(100.0), 100.0),
    sampled("presence-penalty-low", "the lowest, as a negative int", "presence_penalty", i8(-100), -100.0),
    sampled("frequency-penalty-high", "the highest, as an int", "frequency_penalty", integer(100), 100.0),
    sampled("seed-0", "the lowest is not nil", "seed", integer(0), 0),
    sampled("seed-most", "2^53-1: every language can write it", "seed", u64(MAX_INT), MAX_INT),
    sampled("seed-beyond-32-bits", "2^40+1", "seed", u64(2**40 + 1), 2**40 + 1),
    sampled("stop-empty-list", "no stop strings", "stop", array(), []),
    sampled("stop-16", "as many as there may be", "stop", array16(*[text("x")] * 16), ["x"] * 16),
    sampled(
        "stop-1024-characters",
        "the longest stop string, of 4096 bytes: characters count",
        "stop",
        array(str16("😀".encode() * 1024)),
        ["😀" * 1024],
    ),
    sampled("stop-token-ids-16", "as many as there may be", "stop_token_ids", array16(*[integer(5)] * 16), [5] * 16),
    sampled("logit-bias-nil", "nil where the table has nil", "logit_bias", NIL, None),
    sampled(
        "logit-bias",
        "of two tokens, the second as an int",
        "logit_bias",
        array(array(integer(5), f64(-1.5)), array(u8(200), integer(100))),
        [[5, -1.5], [200, 100.0]],
    ),
    sampled("flags", "go on after the end of sequence", "ignore_eos", TRUE, True),
    sampled("special-tokens", "special tokens in the text", "skip_special_tokens", FALSE, False),
    sampled("n-2", "two samples", "n", integer(2), 2),
    sampled("n-16", "as many as there may be", "n", u8(16), 16),
    sampled("priority-9", "the highest class", "priority", integer(9), 9),
    sampled("deadline-one-hour", "the longest, as an int", "deadline_ms", u32(3_600_000), 3_600_000.0),
    sampled("itl-target", "a fraction of a millisecond", "itl_target_ms", f64(0.5), 0.5),
    sampled("ttft-target-nil", "nil where the table has nil", "ttft_target_ms", NIL, None),
    sampled("tpot-target", "a mean gap, as an int", "tpot_target_ms", integer(30), 30.0),
    sampled("logprobs-0", "of the tokens themselves alone", "logprobs", integer(0), 0),
    sampled("logprobs-20", "as many as are told", "logprobs", u8(20), 20),
    sampled("logprobs-nil", "nil where the table has nil", "logprobs", NIL, None),
    sampled("prompt-logprobs-3", "of the prompt", "prompt_logprobs", integer(3), 3),
    sampled("cache-salt-256", "256 characters of 1024 bytes", "cache_salt", str16("😀".encode() * 256), "😀" * 256),
    sampled("structured-nil", "nil where the table has nil", "structured", NIL, None),
    sampled(
        "structured-schema",
        "a JSON schema, as text, and free text before it",
        "structured",
        mapping(("kind", text("json_schema")), ("text", text('{"type":"object"}')), ("after", text("</think>"))),
        {"kind": "json_schema", "text": '{"type":"object"}', "after": "</think>"},
    ),
    sampled(
        "structured-opening",
        "free text before it where the output begins with a text",
        "structured",
        mapping(
            ("kind", text("regex")),
            ("text", text("[0-9]+")),
            ("after", text("</think>")),
            ("opening", text("<think>")),
        ),
        {"kind": "regex", "text": "[0-9]+", "after": "</think>", "opening": "<think>"},
    ),
    sampled(
        "structured-choice",
        "one of two texts",
        "structured",
        mapping(("options", array(text("yes"), text("no"))), ("kind", text("choice"))),
        {"kind": "choice", "options": ["yes", "no"]},
    ),
    sampled(
        "structured-after-256",
        "256 characters of 1024 bytes",
        "structured",
        mapping(("kind", text("grammar")), ("text", text('root ::= "a"')), ("after", str16("😀".encode() * 256))),
        {"kind": "grammar", "text": 'root ::= "a"', "after": "😀" * 256},
    ),
    sampled("model-defaults", "what is absent is the model's", "model_defaults", TRUE, True),
    prompted(
        "model-defaults-and-a-default",
        "a key that is there is given, though its value is the default: the model's temperature does not count",
        ("sampling", mapping(("model_defaults", TRUE), ("temperature", f64(1.0)), ("top_k", integer(0)))),
        sampling={"model_defaults": True, "temperature": 1.0, "top_k": 0},
    ),
]

OTHERS = [
    taken(
        "cancel-on-control",
        "X",
        mapping(("session", text("5f3a")), ("id", integer(7))),
        "a cancel that names its session",
        id=7,
        session="5f3a",
    ),
    taken(
        "cancel-session-64",
        "X",
        mapping(("id", integer(7)), ("session", str8(b"s" * 64))),
        "the longest name of a session",
        id=7,
        session="s" * 64,
    ),
    taken("stats-request", "S", mapping(), "an empty map"),
    taken("stats-request-metrics", "S", mapping(("metrics", TRUE)), "with counts, where they are served", metrics=True),
    taken("stats-request-live", "S", mapping(("live_after", integer(7))), "with later steps", live_after=7),
    taken("hello-routes", "H", mapping(("routes", TRUE)), "of a frontend that routes requests of others", routes=True),
    taken(
        "generate-routed",
        "G",
        mapping(("id", integer(1)), ("prompt_u32", bin8(PACKED)), ("routed", mapping(*ROUTED))),
        "a request of another's client, which goes on behind two tokens",
        id=1,
        prompt_u32={"bin": PACKED.hex()},
        routed=ROUTED_VALUES,
    ),
    taken(
        "report",
        "R",
        mapping(("http_answers", mapping(("/v1/models 200", integer(3))))),
        "a gateway's answers, read over where the connection is nobody's gateway",
        http_answers={"/v1/models 200": 3},
    ),
    taken("stats-request-unknown-key", "S", mapping(("since", integer(1))), "unknown keys, in an empty message too"),
    taken("health-request", "L", mapping(), "an empty map"),
    taken("bye", "B", mapping(), "an empty map"),
    taken("client-ping", "P", mapping(("t", u64(MAX_INT))), "the largest number", t=MAX_INT),
    taken("client-ping-empty", "P", mapping(), "a ping need not carry a number"),
    taken("client-pong", "Q", mapping(("t", integer(4))), "a pong repeats the number", t=4),
]

IMPOSSIBLE = [
    impossible("no-prompt", mapping(("id", integer(1))), "bad_request", "none of the four kinds of prompt", id=1),
    impossible(
        "two-prompts",
        mapping(("id", integer(1)), PROMPT, ("prompt_ids", array(integer(1)))),
        "bad_request",
        "exactly one kind of prompt is given",
        id=1,
        text="Hi",
        prompt_ids=[1],
    ),
    impossible(
        "tools-of-a-text",
        mapping(("id", integer(1)), PROMPT, ("tools", array(mapping()))),
        "bad_request",
        "tools belong to messages",
        id=1,
        text="Hi",
        tools=[{}],
    ),
    impossible(
        "id-beyond-vocabulary",
        mapping(("id", integer(1)), ("prompt_ids", array(u32(MAX_TOKEN)))),
        "bad_request",
        "no vocabulary has 2^31 tokens",
        id=1,
        prompt_ids=[MAX_TOKEN],
    ),
    impossible(
        "packed-id-beyond-vocabulary",
        mapping(("id", integer(1)), ("prompt_u32", bin8(b"\xff" * 4))),
        "bad_request",
        "2^32-1 is no token id",
        id=1,
        prompt_u32={"bin": "ffffffff"},
    ),
    impossible(
        "stop-id-beyond-vocabulary",
        mapping(("id", integer(1)), PROMPT, ("sampling", mapping(("stop_token_ids", array(u32(MAX_TOKEN)))))),
        "bad_request",
        "a stop token that is none",
        id=1,
        text="Hi",
        sampling={"stop_token_ids": [MAX_TOKEN]},
    ),
    *(
        impossible(
            f"packed-{size}-bytes",
            mapping(("id", integer(1)), ("prompt_u32", bin8(bytes(size)))),
            "bad_request",
            "packed ids come in fours",
            id=1,
            prompt_u32={"bin": "00" * size},
        )
        for size in (5, 6, 7)
    ),
    impossible(
        "min-tokens-above-max",
        mapping(
            ("id", integer(1)), PROMPT, ("sampling", mapping(("max_tokens", integer(4)), ("min_tokens", integer(5))))
        ),
        "bad_request",
        "a contradiction between two fields",
        id=1,
        text="Hi",
        sampling={"max_tokens": 4, "min_tokens": 5},
    ),
    Vector(
        "prompt-of-a-million",
        (header("G"), [Repeat(b"\x82\xa2id\x01\xaaprompt_ids\xdd\x00\x10\x00\x00", 1), Repeat(b"\x01", 2**20)]),
        "2^20 token ids: as many as a message may have, more than any context that is tested with these vectors",
        "never_fits",
        error_id=1,
    ),
    Vector(
        "hello-of-the-future",
        (header("H"), mapping(("versions", array(integer(2), integer(3))))),
        "no version in common",
        "unsupported_version",
        {"versions": [2, 3]},
    ),
]

CLIENT_ACCEPTED = [*HELLO, *ID_WIDTHS, *PROMPTS, *SAMPLING, *OTHERS]
CLIENT_IMPOSSIBLE = IMPOSSIBLE
