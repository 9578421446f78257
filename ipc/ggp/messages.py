"""Every message of GGP/1 and its one-byte kind.

Owns the types, their defaults and their ranges: a value outside them does not decode. The tables of PROTOCOL.md are
made from these Structs (`graphgen.ipc.ggp.reference`). On the wire a message is a map; unknown keys are ignored, an
absent key means the default, and a key never changes its meaning.

    client -> server   Hello Generate Cancel StatsRequest Report HealthRequest Bye      both ways   Ping Pong
    server -> client   Welcome Accepted Delta Deltas Done Error Draining Notice Load Stats Health
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from graphgen.ipc.ggp import limits
from graphgen.ipc.ggp.routing import Capacity, Load, Routed
from graphgen.ipc.ggp.statistics import Count, EngineCount, Live, Measured, Metrics
from graphgen.ipc.short import short_repr

MAJOR = 1
"""The version of the protocol: the third byte of every header."""

DEFAULT_ADDRESS = "tcp://127.0.0.1:5755"
DEFAULT_CONTROL_ADDRESS = "tcp://127.0.0.1:5756"

RequestId = Annotated[int, Meta(ge=0, le=limits.MAX_INT)]
NumLikeliest = Annotated[int, Meta(ge=0, le=limits.MAX_LOGPROBS)]
NumSamples = Annotated[int, Meta(ge=1, le=limits.MAX_SAMPLES)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Tenant = Annotated[str, Meta(max_length=limits.MAX_TENANT_LEN)]
Milliseconds = Annotated[float, Meta(gt=0, le=limits.MAX_DURATION_MS)]
LogId = Annotated[str, Meta(max_length=limits.MAX_LOG_ID_LEN, pattern=r"\A[!-~]*\Z")]
SessionKey = Annotated[str, Meta(max_length=limits.MAX_SESSION_LEN)]

Temperature = Annotated[float, Meta(ge=0, le=100, description="0 is greedy.")]
TopK = Annotated[int, Meta(ge=0, le=2**31 - 1, description="Draw from the k likeliest tokens; 0 is off.")]
TopP = Annotated[
    float, Meta(gt=0, le=1, description="Draw from the fewest tokens that hold this probability; 1 is off.")
]
MinP = Annotated[
    float, Meta(ge=0, le=1, description="Draw from tokens at least so likely relative to the likeliest; 0 is off.")
]
RepetitionPenalty = Annotated[float, Meta(gt=0, le=100, description="On tokens of prompt and output; 1 is off.")]


class SamplingDefaults(Struct, frozen=True, kw_only=True):
    """How a model draws where a request says nothing: the value of `welcome.sampling_defaults`.

    The defaults here are those of a model that states none, and of a request without `sampling.model_defaults`.
    """

    temperature: Temperature = 1.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0


class Structured(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an output must follow: the value of `sampling.structured`."""

    kind: Annotated[
        Literal["json_schema", "regex", "choice", "grammar"],
        Meta(description="`json_schema`, `regex`, `choice` or `grammar`."),
    ]
    text: Annotated[
        str,
        Meta(
            max_length=limits.MAX_GRAMMAR_LEN,
            description="The JSON of the schema, the expression (of Rust's regex) or the grammar (Lark or GBNF).",
        ),
    ] = ""
    options: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=limits.MAX_GRAMMAR_LEN)]],
        Meta(max_length=limits.MAX_CHOICES, description="Of a choice: the texts, one of which is the output."),
    ] = []
    after: Annotated[
        str,
        Meta(
            max_length=limits.MAX_AFTER_LEN,
            description="The structure begins behind this text, as `</think>`; up to it the output is free.",
        ),
    ] = ""
    opening: Annotated[
        str,
        Meta(
            max_length=limits.MAX_AFTER_LEN,
            description="With `after`: only an output that begins with this text, as `<think>`, is free up to `after`;"
            " any other begins with the structure. Where `welcome.features` has `structured_opening`.",
        ),
    ] = ""


class Sampling(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a request draws its tokens, when it ends and how it is served: the value of `generate.sampling`."""

    # UNSET: the key was absent. Its default is that of SamplingDefaults, or, with `model_defaults`, the model's.

    max_tokens: Annotated[
        Annotated[int, Meta(ge=1, le=2**31 - 1)] | None,
        Meta(description="Most tokens of output of each sample; nil goes to the end of the context. See Lengths."),
    ] = 128
    min_tokens: Annotated[
        int, Meta(ge=0, le=2**31 - 1, description="No stop token and no stop string ends the output before so many.")
    ] = 0
    temperature: Temperature | UnsetType = UNSET
    top_k: TopK | UnsetType = UNSET
    top_p: TopP | UnsetType = UNSET
    min_p: MinP | UnsetType = UNSET
    repetition_penalty: RepetitionPenalty | UnsetType = UNSET
    presence_penalty: Annotated[
        float, Meta(ge=-100, le=100, description="On tokens of the output, once each; 0 is off.")
    ] = 0.0
    frequency_penalty: Annotated[
        float, Meta(ge=-100, le=100, description="On tokens of the output, each time; 0 is off.")
    ] = 0.0
    logit_bias: Annotated[
        Annotated[
            list[tuple[TokenId, Annotated[float, Meta(ge=-100, le=100)]]], Meta(max_length=limits.MAX_LOGIT_BIASES)
        ]
        | None,
        Meta(
            description="`[token id, bias]` each, no token twice: the bias is added to the token's logit, before the"
            " penalties."
        ),
    ] = None
    seed: Annotated[
        Annotated[int, Meta(ge=0, le=limits.MAX_INT)] | None,
        Meta(
            description="Equal seeds draw equal tokens from equal logits; nil draws a fresh one. Sample i has seed + i."
        ),
    ] = None
    stop: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=limits.MAX_STOP_STRING_LEN)]],
        Meta(
            max_length=limits.MAX_STOP_STRINGS,
            description="The text ends before the first of these strings. One that is exactly a special token also ends"
            " the output as that token's id does, since the text leaves special tokens out.",
        ),
    ] = []
    stop_token_ids: Annotated[
        list[TokenId],
        Meta(
            max_length=limits.MAX_STOP_TOKEN_IDS,
            description="Tokens that end the output; with the model's own end-of-sequence tokens at most 16.",
        ),
    ] = []
    ignore_eos: Annotated[bool, Meta(description="Go on after the tokens of `welcome.eos_token_ids`.")] = False
    skip_special_tokens: Annotated[bool, Meta(description="Leave special tokens out of the text.")] = True
    n: Annotated[NumSamples, Meta(description="Samples: outputs drawn independently for the one prompt.")] = 1
    logprobs: Annotated[
        NumLikeliest | None,
        Meta(description="Log-probabilities of the output: of each token, and of so many likeliest in its place."),
    ] = None
    prompt_logprobs: Annotated[
        NumLikeliest | None,
        Meta(
            description="The same of the prompt's tokens but the first, in the first `delta` of sample 0. Times the"
            " prompt's length at most 2^19, with each token itself."
        ),
    ] = None
    priority: Annotated[
        int, Meta(ge=0, le=limits.MAX_PRIORITY, description="Service class; the higher number is served first.")
    ] = 0
    deadline_ms: Annotated[
        Milliseconds | None, Meta(description="From the request's arrival to the end of its output.")
    ] = None
    itl_target_ms: Annotated[Milliseconds | None, Meta(description="Wanted time between two tokens.")] = None
    ttft_target_ms: Annotated[Milliseconds | None, Meta(description="Wanted time to the first token.")] = None
    tpot_target_ms: Annotated[Milliseconds | None, Meta(description="Wanted mean of the times between two tokens.")] = (
        None
    )
    cache_salt: Annotated[
        str,
        Meta(
            max_length=limits.MAX_CACHE_SALT_LEN,
            description="Prompts share cached pages only under equal salts, and never across clients' keys.",
        ),
    ] = ""
    structured: Annotated[
        Structured | None, Meta(description="What the output must follow. Contradicts `ignore_eos` and `min_tokens`.")
    ] = None
    model_defaults: Annotated[
        bool,
        Meta(description="true: keys of `welcome.sampling_defaults` that are absent here have the values given there."),
    ] = False


Described = dict[str, Any]
"""A tool, a document or a call, in whatever words: the model's chat template reads it."""
Switch = Annotated[str, Meta(max_length=limits.MAX_SWITCH_LEN)] | bool | int | float | None


class ChatMessage(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message of a chat prompt. What the model sees of its keys is its template's business."""

    role: Annotated[
        str, Meta(min_length=1, max_length=limits.MAX_ROLE_LEN, description="As the model's template knows it: `user`.")
    ]
    content: Annotated[str, Meta(description="Text.")]
    name: Annotated[str | None, Meta(description="Who speaks.")] = None
    tool_calls: Annotated[
        Annotated[list[Described], Meta(max_length=limits.MAX_TOOLS)] | None,
        Meta(
            description="Of the assistant: what it called, each `{id, type, function: {name, arguments}}`, where"
            " arguments are a map, or its JSON."
        ),
    ] = None
    tool_call_id: Annotated[str | None, Meta(description="Of a tool: whose result this is.")] = None
    reasoning_content: Annotated[str | None, Meta(description="Of the assistant: what it thought.")] = None


# --- client -> server ------------------------------------------------------------------------------------------


class Hello(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Opens a session on a data connection. Answered by `welcome`, or by an `error`; see Sessions.

    A second one on the same connection ends the session and opens a new one.
    """

    versions: Annotated[
        tuple[Count, Count], Meta(description="Lowest and highest major version that the client speaks.")
    ] = (MAJOR, MAJOR)
    client: Annotated[
        str, Meta(max_length=limits.MAX_CLIENT_LEN, description="Name and version of the client, for the server's log.")
    ] = ""
    notices: Annotated[bool, Meta(description="true: the server sends a `notice` where it has something to tell.")] = (
        False
    )
    batches: Annotated[
        bool, Meta(description="true: the server may send one `deltas` in the place of several `delta`s.")
    ] = False
    routes: Annotated[
        bool,
        Meta(
            description="true: the client is a frontend that routes requests of others to this server and others. Where"
            " it may, `welcome.features` has `routed`."
        ),
    ] = False


class Generate(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request. Exactly one of `text`, `messages`, `prompt_ids` and `prompt_u32` is given.

    Answered by `accepted`, `delta`s and one `done`; an `error` with its id may end it at any point.
    """

    id: Annotated[RequestId, Meta(description="Chosen by the client; no two open requests of a session share one.")]
    text: Annotated[str | None, Meta(description="The prompt as text.")] = None
    messages: Annotated[
        Annotated[list[ChatMessage], Meta(min_length=1, max_length=limits.MAX_MESSAGES)] | None,
        Meta(description="The prompt as a chat, rendered with the model's own template, ready for the model's turn."),
    ] = None
    prompt_ids: Annotated[
        Annotated[list[TokenId], Meta(min_length=1, max_length=limits.MAX_PROMPT_TOKENS)] | None,
        Meta(description="The prompt as token ids."),
    ] = None
    prompt_u32: Annotated[
        Annotated[bytes, Meta(min_length=4, max_length=4 * limits.MAX_PROMPT_TOKENS)] | None,
        Meta(description="The prompt as token ids, little-endian, 4 bytes each; cheaper than `prompt_ids`."),
    ] = None
    tools: Annotated[
        Annotated[list[Described], Meta(max_length=limits.MAX_TOOLS)] | None,
        Meta(description="With `messages`: functions that the model may call, for its template."),
    ] = None
    documents: Annotated[
        Annotated[list[Described], Meta(max_length=limits.MAX_TOOLS)] | None,
        Meta(description="With `messages`: what the model is to answer from, for its template."),
    ] = None
    chat_template_kwargs: Annotated[
        Annotated[dict[str, Switch], Meta(max_length=limits.MAX_SWITCHES)] | None,
        Meta(description="With `messages`: switches of the template; one that it does not know changes nothing."),
    ] = None
    sampling: Annotated[Sampling, Meta(description="Absent: all defaults.")] = Sampling()
    tenant: Annotated[
        Tenant,
        Meta(
            description="On whose behalf: who the request counts to. Only where `welcome.features` has `tenants`.",
        ),
    ] = ""
    log_id: Annotated[
        LogId, Meta(description="What logs of the server call the request: printable ASCII without spaces.")
    ] = ""
    stream: Annotated[
        bool, Meta(description="false: each sample comes in one `delta`, when all samples have ended.")
    ] = True
    echo_ids: Annotated[bool, Meta(description="true: `accepted` carries the prompt's token ids.")] = False
    echo_text: Annotated[
        bool, Meta(description="true: `accepted` carries the text of the prompt's tokens, special ones included.")
    ] = False
    special_tokens: Annotated[
        bool,
        Meta(description="With `text`; false: without the special tokens that the tokenizer puts around a prompt."),
    ] = True
    prompt_only: Annotated[
        bool,
        Meta(
            description="true: nothing is computed. The request ends after `accepted`, whatever its prompt's length,"
            " with an empty `done.finish`."
        ),
    ] = False
    marked_ids: Annotated[
        list[TokenId],
        Meta(
            max_length=limits.MAX_MARKED_IDS,
            description="Tokens whose places in the text the deltas say; for those who parse outputs.",
        ),
    ] = []
    tail_len: Annotated[
        int,
        Meta(
            ge=0,
            le=limits.MAX_TAIL_LEN,
            description="With `messages`: so many characters of the end of the rendered chat come back in `accepted`.",
        ),
    ] = 0
    routed: Annotated[
        Routed | None, Meta(description="Of another server's client. Only where `welcome.features` has `routed`.")
    ] = None


OF_CHATS = ("tools", "documents", "chat_template_kwargs")
"""Keys of a `generate` that belong to `messages`."""


class Cancel(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Ends a request before its next step. Answered by its `done`, with `aborted`; an unknown id by nothing."""

    id: RequestId
    session: Annotated[
        SessionKey, Meta(description="On the control socket: whose request. On the data socket it is not needed.")
    ] = ""


class StatsRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Asks for one `stats`."""

    metrics: Annotated[
        bool, Meta(description="true: with `stats.metrics`, where `welcome.features` has `statistics`.")
    ] = False
    live_after: Annotated[
        Count | None,
        Meta(
            description="With `stats.live`, and in it the steps after this one; 0: all that are kept. Where"
            " `welcome.features` has `statistics`."
        ),
    ] = None


class Report(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """From a gateway: what it answered since its last report. Only where `welcome.features` has `statistics`."""

    http_answers: Annotated[
        dict[Annotated[str, Meta(max_length=limits.MAX_ENDPOINT_LEN)], Count],
        Meta(max_length=limits.MAX_ENDPOINTS, description="How many, by path and status: `/v1/models 200`."),
    ]


class HealthRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Asks for one `health`. The server asks scheduler and worker before it answers."""


class Bye(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Ends the session; its open requests are cancelled and nothing more is sent."""


# --- both ways -------------------------------------------------------------------------------------------------


class Ping(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Asks for a `pong`. The server sends one every `heartbeat_ms` to each client that has open requests."""

    t: Annotated[Count, Meta(description="Any number; the `pong` repeats it.")] = 0
    instance: Annotated[str, Meta(description="From the server: its `welcome.instance`.")] = ""


class Pong(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Answers a `ping`."""

    t: Annotated[Count, Meta(description="Of the `ping`.")] = 0
    instance: Annotated[str, Meta(description="From the server: its `welcome.instance`.")] = ""


# --- server -> client ------------------------------------------------------------------------------------------


class ServerLimits(Struct, frozen=True, kw_only=True):
    """What a server allows: the value of `welcome.limits`."""

    frame_bytes: Annotated[Count, Meta(description="A larger frame closes the connection, without an error.")]
    prompt_tokens: Annotated[
        Count,
        Meta(
            description="The model's context: prompt and output of one sample together. The longest prompt is one less."
        ),
    ]
    text_bytes: Annotated[Count, Meta(description="UTF-8 bytes of `text`, or of all `messages` together.")]
    open_requests: Annotated[
        Count,
        Meta(description="Open requests of one client, times samples; all sessions with one key are one client."),
    ]
    open_prompt_tokens: Annotated[
        Count, Meta(description="Prompt tokens of the open requests of one client, times samples.")
    ]
    messages: Count = limits.MAX_MESSAGES
    samples: Count = limits.MAX_SAMPLES
    stop_strings: Count = limits.MAX_STOP_STRINGS
    stop_string_len: Annotated[Count, Meta(description="Characters.")] = limits.MAX_STOP_STRING_LEN
    stop_token_ids: Count = limits.MAX_STOP_TOKEN_IDS
    deadline_ms: Count = limits.MAX_DURATION_MS


class Welcome(Struct, frozen=True, kw_only=True):
    """Answers `hello`: the session is open."""

    version: Annotated[Count, Meta(description="The major version that both speak.")]
    session: Annotated[SessionKey, Meta(description="Secret name of the session, for the control socket.")]
    instance: Annotated[str, Meta(description="Name of this run of the frontend. Another one has lost the session.")]
    server: Annotated[str, Meta(description="Name and version of the server.")]
    model: Annotated[str, Meta(description="What is served.")]
    vocab_size: Annotated[Count, Meta(description="Token ids are below it.")]
    eos_token_ids: Annotated[
        list[TokenId],
        Meta(description="End-of-sequence tokens: those of the model, and its tokenizer's own where that is another."),
    ]
    features: Annotated[list[str], Meta(description="See Versions and features.")]
    limits: ServerLimits
    heartbeat_ms: Annotated[Count, Meta(description="Time between the server's pings to a client with open requests.")]
    slow_consumer_ms: Annotated[Count, Meta(description="A client that takes or says nothing for so long is cut off.")]
    control: Annotated[str, Meta(description="Address of the control socket, as it was bound.")]
    draining: Annotated[
        bool, Meta(description="true: the server is about to end and takes no requests; a `draining` follows.")
    ] = False
    sampling_defaults: Annotated[
        SamplingDefaults, Meta(description="What the model draws with by itself; see `sampling.model_defaults`.")
    ] = SamplingDefaults()
    frontends: Annotated[
        list[str],
        Meta(
            description="Addresses of the data sockets of all frontends of the server, this one among them, where there"
            " are several. Each has sessions of its own; any of them serves."
        ),
    ] = []
    capacity: Annotated[Capacity | None, Meta(description="Where `features` has `routed`.")] = None

    def __repr__(self) -> str:
        """Without the session's name: what is printed ends in logs, and who knows the name may cancel its requests."""
        return short_repr(self, leaves_out=("session",))


class Accepted(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The request was checked and waits for its turn. Precedes its first `delta`."""

    id: RequestId
    prompt_tokens: Annotated[Count, Meta(description="Length of the prompt.")]
    prompt_ids: Annotated[list[TokenId] | None, Meta(description="With `generate.echo_ids`: the prompt.")] = None
    prompt_text: Annotated[str | None, Meta(description="With `generate.echo_text`: the prompt.")] = None
    tail: Annotated[
        str, Meta(description="With `generate.tail_len`: the end of the rendered chat, where the output goes on.")
    ] = ""


class Mark(Struct, frozen=True, kw_only=True):
    """A place in the text of a sample: an item of `delta.marks`."""

    id: Annotated[TokenId, Meta(description="The token.")]
    start: Annotated[Count, Meta(description="In characters (Unicode code points) of the sample's text.")]
    end: Annotated[Count, Meta(description="Equal to `start` where the text leaves the token out.")]


class Logprobs(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Log-probabilities of consecutive tokens, before temperature, penalties and filters: the value of `delta.logprobs`
    and `delta.prompt_logprobs`."""

    top: Annotated[NumLikeliest, Meta(description="Likeliest tokens told of each token.")] = 0
    values: Annotated[
        bytes,
        Meta(
            description="Of each token 8 + 8 * `top` bytes, little-endian: its log-probability (float32), its rank"
            " (uint32, 1 for the likeliest), the ids of the likeliest tokens (uint32 each), and their log-probabilities"
            " (float32 each)."
        ),
    ] = b""
    tokens: Annotated[
        list[bytes],
        Meta(
            description="Of each token its bytes, then those of the likeliest tokens; part of a character's for some,"
            " and empty without a tokenizer."
        ),
    ] = []
    ids: Annotated[list[TokenId], Meta(description="Of a prompt: the tokens. Of an output they are the delta's.")] = []
    before: Annotated[bytes, Meta(description="Of a prompt: the bytes of its first token.")] = b""


class Delta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one sample. Joined in order, the texts are the text of the output and the ids its tokens."""

    id: RequestId
    seq: Annotated[Count, Meta(description="Tokens of the sample before `ids`: the sum of all earlier lengths.")] = 0
    sample: Annotated[Count, Meta(description="Which of the n samples.")] = 0
    ids: Annotated[list[TokenId], Meta(description="Token ids; may be empty in the last delta.")] = []
    text: Annotated[
        str, Meta(description="May be empty: half a character and a possible stop string are held back.")
    ] = ""
    finish: Annotated[
        str | None, Meta(description="In the sample's last delta: `stop`, `length`, `aborted` or `error`.")
    ] = None
    cached_tokens: Annotated[
        Count, Meta(description="In the sample's first delta: prompt tokens found in the prefix cache.")
    ] = 0
    marks: Annotated[
        list[Mark],
        Meta(
            description="Where the tokens of `generate.marked_ids` among `ids` are in the text. They may be ahead of"
            " the text, or behind its end when a stop string has cut it."
        ),
    ] = []
    logprobs: Annotated[Logprobs | None, Meta(description="With `sampling.logprobs`: those of `ids`.")] = None
    prompt_logprobs: Annotated[
        Logprobs | None, Meta(description="With `sampling.prompt_logprobs`, in the first delta of sample 0.")
    ] = None
    queued_ms: Annotated[
        Measured,
        Meta(description="With `generate.routed`, in the first delta: from arrival until its first chunk was planned."),
    ] = 0.0
    deaths: Annotated[
        Count,
        Meta(
            description="With `generate.routed`: so many engines and workers ended while they computed it, since its"
            " last token. The delta may have no token."
        ),
    ] = 0


class Deltas(Struct, frozen=True, kw_only=True):
    """What a step gave to several requests or samples. Sent to sessions whose `hello` asked for batches.

    A message for each token costs both ends most of the processor time that a token takes.
    """

    items: Annotated[list[Delta], Meta(description="Each as if it had come alone, in this order.")]


class Usage(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Token counts of a request: the value of `done.usage`."""

    prompt_tokens: Count
    output_tokens: Annotated[Count, Meta(description="Of all samples.")]
    cached_tokens: Annotated[
        Count, Meta(description="Prompt tokens found in the prefix cache; of the first sample.")
    ] = 0


class Timing(Struct, frozen=True, kw_only=True):
    """Milliseconds since the request reached the frontend: the value of `done.timing`."""

    queued_ms: Annotated[Measured, Meta(description="Until its first chunk was planned; 0 if none was.")]
    first_token_ms: Annotated[Measured, Meta(description="Until its first token; 0 if it has none.")]
    total_ms: Annotated[Measured, Meta(description="Until its last token.")]


class Done(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The request has ended; nothing with its id follows."""

    id: RequestId
    finish: Annotated[list[str], Meta(description="How each sample ended, in their order, as in `delta.finish`.")]
    usage: Usage
    timing: Timing


class Error(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What could not be done. With an `id` it ends that request."""

    code: Annotated[str, Meta(description="See Errors; treat an unknown one as `internal`.")]
    message: Annotated[str, Meta(description="For people: the value, the limit, the remedy.")]
    retryable: Annotated[bool, Meta(description="The same message may succeed later.")] = False
    retry_after_ms: Annotated[Count | None, Meta(description="When to try again, where the server can tell.")] = None
    id: Annotated[RequestId | None, Meta(description="The request that ended. Absent: no request ended.")] = None
    about: Annotated[str, Meta(description="Name of the kind that was answered, where known.")] = ""
    versions: Annotated[
        tuple[Count, Count] | None,
        Meta(description="With unsupported_version: lowest and highest that the server speaks."),
    ] = None


class Draining(Struct, frozen=True, kw_only=True):
    """The server is about to end: open requests go on for `grace_ms`, new ones are refused. Sent to every session."""

    grace_ms: Count


class Notice(Struct, frozen=True, kw_only=True):
    """What happens to the engine, for people. Sent to sessions whose `hello` asked for it; ends nothing.

    When the worker is lost and when another serves, when the engine ends and when it serves again.
    """

    text: Annotated[str, Meta(description="One line; its words may change.")]


class Stats(Struct, frozen=True, kw_only=True):
    """A snapshot. Step times are over the last 1000 steps; 0 before the first."""

    sessions: Annotated[Count, Meta(description="Of connections that have said `hello` and not ended.")]
    open_requests: Annotated[Count, Meta(description="Of all clients, in whatever state.")]
    held_requests: Annotated[Count, Meta(description="Of those, waiting in the frontend for their client's turn.")]
    running: Annotated[Count, Meta(description="Samples that hold a slot.")]
    waiting: Annotated[Count, Meta(description="Samples in the scheduler's queue.")]
    pages_free: Count
    pages_total: Count
    steps: Count
    finished: Count
    preemptions: Count
    step_ms_p50: Measured
    step_ms_p95: Measured
    step_ms_p99: Measured
    step_ms_max: Measured
    deltas_sent: Count
    deltas_merged: Annotated[Count, Meta(description="Outputs that joined an unsent delta: a reader was behind.")]
    messages_refused: Annotated[
        Count, Meta(description="Messages refused with an error; also requests refused after `accepted`.")
    ]
    frontend_cpu_s: Annotated[Measured, Meta(description="Processor time of the frontend process.")]
    frontend_rss_bytes: Count
    worker_restarts: Annotated[Count, Meta(description="Workers that took the place of one that died or hung.")] = 0
    worker_loss: Annotated[str, Meta(description="Why the last one was lost; empty: none was.")] = ""
    poisoned: Annotated[Count, Meta(description="Samples given up with `error` poisoned.")] = 0
    numerical_errors: Annotated[Count, Meta(description="Samples that ended with `error` numerical.")] = 0
    engines: Annotated[
        list[EngineCount], Meta(description="Each for itself, where there are several; the counts above are sums.")
    ] = []
    metrics: Annotated[Metrics | None, Meta(description="Where they were asked for.")] = None
    live: Annotated[Live | None, Meta(description="Where it was asked for.")] = None

    def __repr__(self) -> str:
        return short_repr(self)


class Health(Struct, frozen=True, kw_only=True):
    """Answers `health_request` after a round trip through scheduler and worker, or when that failed."""

    status: Annotated[str, Meta(description="`ok`; `draining`; `stalled`: the worker does not answer.")]
    ready: Annotated[bool, Meta(description="New requests are taken and the worker answers.")]
    worker_ms: Annotated[
        Measured, Meta(description="The round trip, behind the steps in flight; of a failed one the wait.")
    ]

    def __repr__(self) -> str:
        return short_repr(self)


CLIENT_KINDS: Mapping[bytes, type[Struct]] = {
    b"H": Hello,
    b"G": Generate,
    b"X": Cancel,
    b"S": StatsRequest,
    b"R": Report,
    b"L": HealthRequest,
    b"B": Bye,
    b"P": Ping,
    b"Q": Pong,
}
"""What a server receives."""

SERVER_KINDS: Mapping[bytes, type[Struct]] = {
    b"W": Welcome,
    b"A": Accepted,
    b"D": Delta,
    b"U": Deltas,
    b"F": Done,
    b"E": Error,
    b"N": Draining,
    b"I": Notice,
    b"O": Load,
    b"T": Stats,
    b"M": Health,
    b"P": Ping,
    b"Q": Pong,
}
"""What a client receives."""

NAMES: Mapping[type[Struct], str] = {
    Hello: "hello",
    Generate: "generate",
    Cancel: "cancel",
    StatsRequest: "stats_request",
    Report: "report",
    HealthRequest: "health_request",
    Bye: "bye",
    Ping: "ping",
    Pong: "pong",
    Welcome: "welcome",
    Accepted: "accepted",
    Delta: "delta",
    Deltas: "deltas",
    Done: "done",
    Error: "error",
    Draining: "draining",
    Notice: "notice",
    Load: "load",
    Stats: "stats",
    Health: "health",
}
"""The names of the kinds in the specification, and in `error.about`."""

ClientMessage = Hello | Generate | Cancel | StatsRequest | Report | HealthRequest | Bye | Ping | Pong
ServerMessage = (
    Welcome | Accepted | Delta | Deltas | Done | Error | Draining | Notice | Load | Stats | Health | Ping | Pong
)
