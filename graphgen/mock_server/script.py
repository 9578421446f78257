"""What the mock server answers: for each prompt the steps of its answer, read from JSON or built in.

Owns the types and the built-in script. Knows nothing of sockets. Read by the command line, played by playing.py.
"""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from graphgen.ipc.errors import ConfigError
from graphgen.ipc.ggp import limits
from graphgen.ipc.ggp.codes import CODES

Delay = Annotated[float, Meta(ge=0, le=3_600_000)]
"""Milliseconds."""


class Say(Struct, tag_field="do", tag="say", frozen=True, forbid_unknown_fields=True):
    """Each piece is one delta; a token is a byte of its UTF-8."""

    pieces: tuple[str, ...]
    every_ms: Delay = 5


class Echo(Struct, tag_field="do", tag="echo", frozen=True, forbid_unknown_fields=True):
    """Says the prompt (of a chat, its last message), one word after another."""

    every_ms: Delay = 5


class Wait(Struct, tag_field="do", tag="wait", frozen=True, forbid_unknown_fields=True):
    """This request stalls. The server lives: its pings go on."""

    ms: Delay


class Silence(Struct, tag_field="do", tag="silence", frozen=True, forbid_unknown_fields=True):
    """The whole server stands still: it reads nothing, sends nothing, answers no ping."""

    ms: Delay


class Hang(Struct, tag_field="do", tag="hang", frozen=True, forbid_unknown_fields=True):
    """The request goes on for ever, until it is cancelled."""


class Finish(Struct, tag_field="do", tag="finish", frozen=True, forbid_unknown_fields=True):
    """Ends the request. Steps that end without it finish with `stop`."""

    reason: str = "stop"


class Fail(Struct, tag_field="do", tag="error", frozen=True, forbid_unknown_fields=True):
    """Ends the request with an error; as the first step before it was accepted."""

    code: str
    message: str = "the script says so"
    retry_after_ms: int | None = None


class Gap(Struct, tag_field="do", tag="gap", frozen=True, forbid_unknown_fields=True):
    """A fault: so many tokens are counted and not sent. A client notices by `seq`."""

    tokens: Annotated[int, Meta(ge=1)] = 1


class Raw(Struct, tag_field="do", tag="raw", frozen=True, forbid_unknown_fields=True):
    """A fault, or a message of the future: these frames, in hex."""

    frames: tuple[str, ...]


class Restart(Struct, tag_field="do", tag="restart", frozen=True, forbid_unknown_fields=True):
    """Every connection is dropped and every session forgotten, as when a server is killed and started again."""


class Drain(Struct, tag_field="do", tag="drain", frozen=True, forbid_unknown_fields=True):
    """Says `draining` to every session and refuses new requests from then on."""

    grace_ms: Annotated[int, Meta(ge=0)] = 10_000


Step = Say | Echo | Wait | Silence | Hang | Finish | Fail | Gap | Raw | Restart | Drain


class Reply(Struct, frozen=True, forbid_unknown_fields=True):
    """The answer to one prompt."""

    prompt: str
    """The whole text, or the content of a chat's last message."""
    steps: tuple[Step, ...]


class Script(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything the server does not decide by itself."""

    replies: tuple[Reply, ...] = ()
    otherwise: tuple[Step, ...] = (Echo(),)
    """The answer to every other prompt."""
    model: str = "mock"
    features: tuple[str, ...] = (
        "text",
        "chat",
        "samples",
        "classes",
        "mean_gaps",
        "prefix_cache",
        "model_defaults",
        "template_arguments",
    )
    heartbeat_ms: Annotated[int, Meta(ge=1)] = 1000
    frame_bytes: Annotated[int, Meta(ge=256, le=limits.MAX_FRAME_BYTES)] = limits.MAX_FRAME_BYTES
    prompt_tokens: Annotated[int, Meta(ge=2)] = 8192
    text_bytes: Annotated[int, Meta(ge=1)] = 1 << 20
    open_requests: Annotated[int, Meta(ge=1)] = 256

    def steps_for(self, prompt: str) -> tuple[Step, ...]:
        return next((reply.steps for reply in self.replies if reply.prompt == prompt), self.otherwise)


def built_in_script() -> Script:
    """Every fault under a prompt of its own, and an echo for every other prompt."""
    say = Say(("one ", "two ", "three "))
    replies: dict[str, tuple[Step, ...]] = {
        "stall": (say, Wait(5000), Say(("four",))),
        "hang": (
            say,
            Hang(),
        ),
        "silence": (say, Silence(12_000), Say(("four",))),
        "restart": (
            say,
            Restart(),
        ),
        "drain": (say, Drain(), Wait(500), Say(("four",))),
        "unicode": (Say(("aé", "€", "😀", "\0", "e\u0301")),),
        "burst": (Say(tuple(f"{number} " for number in range(1000)), every_ms=0),),
        "slow": (Say(tuple(f"{number} " for number in range(1000)), every_ms=100),),
        "gap": (say, Gap(), Say(("four",))),
        "garbage": (
            say,
            Raw(("47470144", "c1")),
        ),
        "future": (say, Raw(("4747017a", "81a17801")), Say(("four",))),
        "late error": (
            say,
            Fail("engine_lost"),
        ),
        "overloaded": (Fail("overloaded", "the queue is full", retry_after_ms=1500),),
        "new error": (Fail("quota_exceeded", "a code that no client knows yet"),),
    }
    for code, info in CODES.items():
        replies[f"error {code}"] = (Fail(code, info.meaning),)
    return Script(replies=tuple(Reply(prompt, steps) for prompt, steps in replies.items()))


def read_script(path: Path) -> Script:
    """Raises ConfigError for a file that is missing or no script."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Script)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the script {path}: {error}; print one with --print-script") from error
