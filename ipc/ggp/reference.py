"""The generated parts of PROTOCOL.md: tables of kinds, fields, errors and limits, and worked examples in hex.

`python -m graphgen.ipc.ggp.reference PROTOCOL.md` writes them between their markers; a test fails when they are not
what the Structs say. Owns how a type is written down.
"""

import sys
from pathlib import Path
from typing import Any

import msgspec
from msgspec import NODEFAULT, UNSET, Struct, inspect

from graphgen.ipc.ggp import statistics
from graphgen.ipc.ggp.codes import CODES
from graphgen.ipc.ggp.framing import client_framing, server_framing
from graphgen.ipc.ggp.messages import (
    CLIENT_KINDS,
    NAMES,
    SERVER_KINDS,
    Accepted,
    Cancel,
    ChatMessage,
    Delta,
    Done,
    Error,
    Generate,
    Hello,
    Logprobs,
    Mark,
    Ping,
    Pong,
    Sampling,
    SamplingDefaults,
    ServerLimits,
    Structured,
    Timing,
    Usage,
)
from graphgen.ipc.ggp.routing import Capacity, Routed

_MAPS: dict[type[Struct], str] = {
    Sampling: "sampling",
    Structured: "structured",
    ChatMessage: "chat message",
    ServerLimits: "limits",
    Routed: "routed",
    Capacity: "capacity",
    SamplingDefaults: "sampling_defaults",
    Usage: "usage",
    Mark: "mark",
    Logprobs: "logprobs",
    Timing: "timing",
    statistics.Metrics: "metrics",
    statistics.Histogram: "histogram",
    statistics.BucketCount: "bucket",
    statistics.EngineCount: "engine",
    statistics.Live: "live",
    statistics.Steps: "steps",
    statistics.OpenRequest: "open request",
}
"""Maps that lie inside messages."""

_EXAMPLES: list[tuple[str, Struct]] = [
    ("a client says hello", Hello(client="example/1.0")),
    (
        "text, at most 16 tokens, greedy",
        Generate(id=7, text="ROMEO:", sampling=Sampling(max_tokens=16, temperature=0.0)),
    ),
    ("token ids as a list", Generate(id=8, prompt_ids=[1, 300, 70000])),
    ("the same token ids, packed", Generate(id=8, prompt_u32=bytes.fromhex("010000002c01000070110100"))),
    ("a chat", Generate(id=9, messages=[ChatMessage(role="user", content="Hi!")])),
    ("the request waits for its turn", Accepted(id=7, prompt_tokens=3)),
    ("its first two tokens", Delta(id=7, ids=[418, 11], text=" But,")),
    ("its last token", Delta(id=7, seq=2, ids=[2], finish="stop")),
    (
        "its end",
        Done(
            id=7,
            finish=["stop"],
            usage=Usage(prompt_tokens=3, output_tokens=3),
            timing=Timing(queued_ms=0.5, first_token_ms=12.0, total_ms=20.25),
        ),
    ),
    ("the client takes it back, on the control socket", Cancel(id=7, session="5f3a")),
    (
        "an error that ends request 8",
        Error(
            code="overloaded", message="the queue is full", retryable=True, retry_after_ms=1500, id=8, about="generate"
        ),
    ),
    ("the server asks whether the client lives", Ping(t=4, instance="a1")),
    ("the client does", Pong(t=4)),
]


def generated_sections() -> dict[str, str]:
    """Name of a marker -> the text between its begin and its end."""
    sections = {"kinds": _kinds_table(), "errors": _errors_table(), "examples": _examples()}
    for kind, name in [*NAMES.items(), *_MAPS.items()]:
        sections[name] = _fields_table(kind)
    return sections


def update(text: str) -> str:
    """The document with every generated section made anew. Raises ValueError when a marker is missing."""
    for name, section in generated_sections().items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"the document has no section {name!r}: add the lines {begin.strip()} and {end}")
        before, _, rest = text.partition(begin)
        text = before + begin + section + end + rest.partition(end)[2]
    return text


def _kinds_table() -> str:
    lines = ["| byte | kind | sent by | purpose |", "|---|---|---|---|"]
    for letters, sender in ((CLIENT_KINDS, "client"), (SERVER_KINDS, "server")):
        for letter, kind in letters.items():
            both = letter in CLIENT_KINDS and letter in SERVER_KINDS
            if both and sender == "server":
                continue
            purpose = (kind.__doc__ or "").partition("\n")[0].rstrip(".")
            lines.append(
                f"| `{letter[0]:#04x}` {letter.decode()} | {NAMES[kind]} | {'both' if both else sender} | {purpose} |"
            )
    return "\n".join(lines) + "\n"


def _errors_table() -> str:
    lines = ["| code | retryable | like HTTP | meaning |", "|---|---|---|---|"]
    for code, info in CODES.items():
        lines.append(f"| {code} | {'yes' if info.retryable else 'no'} | {info.http_status} | {info.meaning} |")
    return "\n".join(lines) + "\n"


def _fields_table(kind: type[Struct]) -> str:
    fields = msgspec.structs.fields(kind)
    purpose = " ".join((kind.__doc__ or "").split())
    if not fields:
        return f"{purpose} An empty map.\n"
    lines = [purpose, "", "| field | type | default | meaning |", "|---|---|---|---|"]
    for field in fields:
        described = inspect.type_info(field.type)
        lines.append(
            f"| {field.encode_name} | {_type_text(described)} | {_default_text(field)} | {_description(described)} |"
        )
    return "\n".join(lines) + "\n"


def _description(described: inspect.Type) -> str:
    while isinstance(described, inspect.Metadata):
        if described.extra_json_schema and "description" in described.extra_json_schema:
            return str(described.extra_json_schema["description"])
        described = described.type
    return ""


def _default_text(field: Any) -> str:  # msgspec.structs.FieldInfo publishes its default as Any
    if field.default is not NODEFAULT:
        default = field.default
    elif field.default_factory is not NODEFAULT:
        default = field.default_factory()
    else:
        return "required"
    if default is UNSET:
        default = getattr(SamplingDefaults(), field.name)
    if isinstance(default, Struct):
        return "all defaults"
    return "nil" if default is None else msgspec.json.encode(default).decode()


def _type_text(described: inspect.Type) -> str:
    """A type and its range, as a reader of another language knows it."""
    match described:
        case inspect.Metadata():
            return _type_text(described.type)
        case inspect.UnionType():
            return " or ".join(_type_text(one) for one in described.types)
        case inspect.IntType() | inspect.FloatType():
            name = "int" if isinstance(described, inspect.IntType) else "float"
            low = f"> {described.gt:g}" if described.gt is not None else _number(described.ge)
            high = _number(described.le)
            if low and high:
                return f"{name}, {low} to {high}" if described.gt is None else f"{name}, {low}, up to {high}"
            return name
        case inspect.StrType():
            return "str" + _length_text(described.min_length, described.max_length, "characters")
        case inspect.BytesType():
            return "bin" + _length_text(described.min_length, described.max_length, "bytes")
        case inspect.ListType():
            length = _length_text(described.min_length, described.max_length, "items")
            return f"array{length} of {_type_text(described.item_type)}"
        case inspect.TupleType():
            kinds = dict.fromkeys(_type_text(one) for one in described.item_types)
            return f"array, {len(described.item_types)} items of {' and '.join(kinds)}"
        case inspect.StructType():
            return f"map: {_MAPS.get(described.cls) or NAMES[described.cls]}"
        case inspect.DictType():
            length = _length_text(described.min_length, described.max_length, "keys")
            return f"map{length} of {_type_text(described.value_type)}"
        case inspect.AnyType():
            return "anything"
        case inspect.BoolType():
            return "bool"
        case inspect.NoneType():
            return "nil"
        case inspect.LiteralType():
            return "str"
        case _:
            raise TypeError(f"no way to write {described} down: add a case")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    for power in (63, 53, 31):
        if value == 2**power - 1:
            return f"2^{power}-1"
    return f"{value:g}" if abs(value) < 1e5 else f"{value:.0f}"


def _length_text(least: int | None, most: int | None, unit: str) -> str:
    if most is None and least is None:
        return ""
    return f", {least or 0} to {most} {unit}"


def _examples() -> str:
    client, server = client_framing(), server_framing()
    blocks = []
    for title, message in _EXAMPLES:
        sent_by_server = type(message) in SERVER_KINDS.values() and type(message) not in CLIENT_KINDS.values()
        sender = "server" if sent_by_server or title.startswith("the server") else "client"
        framing: Any = server if sender == "server" else client  # the examples are of both directions
        header, body = framing.encode(message)
        readable = msgspec.json.encode(msgspec.msgpack.decode(body) if not isinstance(message, Generate) else message)
        blocks.append(
            f"{sender}: {title}\n  {NAMES[type(message)]} {readable.decode()}\n  {header.hex(' ')}\n  {body.hex(' ')}"
        )
    return "```\n" + "\n".join(blocks) + "\n```\n"


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(update(document.read_text()))
