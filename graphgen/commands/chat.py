"""What `graphgen chat` and `graphgen generate` do: a conversation with a model, and the reply to one prompt.

Owns the history of a conversation and the commands of its user. Reads and writes by functions it is given; the engine
and the terminal are `commands.cli`'s.
"""

from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct

from graphgen.calls.calls import Calls
from graphgen.calls.prompts import Prompt
from graphgen.calls.sampling_params import SamplingParams
from graphgen.ipc.engine_messages import FinishReason
from graphgen.ipc.errors import EngineClosedError, EngineDeadError, GraphgenError, InvalidRequestError
from graphgen.requests.tokenizer import Tokenizer

HELP = "/clear begins anew, /system TEXT does so with a system message, /exit or Ctrl-D ends; Ctrl-C stops a reply"

Write = Callable[[str], None]
Serving = Calls[Any]
"""An engine, or a client: their cores differ, hence Any."""


class Reply(Struct, frozen=True):
    """What a model answered. `reason` is None when its reader stopped it."""

    text: str
    num_tokens: int
    reason: FinishReason | None


class Conversation:
    """The messages so far, of which the model sees all at every turn."""

    def __init__(self, engine: Serving, sampling: SamplingParams, system: str | None) -> None:
        self._engine = engine
        self._sampling = sampling
        self.messages: list[dict[str, str]] = []
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Forgets all but the system message, if there is one."""
        self._system = system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def clear(self) -> None:
        self.begin(self._system)

    def ask(self, text: str, write: Write) -> Reply:
        """Has the model answer, and `write` each piece. What fails leaves the conversation as it was.

        Ctrl-C ends the reply; the conversation goes on with what there is of it.
        """
        question = {"role": "user", "content": text}
        reply = write_reply(self._engine, [*self.messages, question], self._sampling, write)
        self.messages += [question, {"role": "assistant", "content": reply.text}]
        return reply


def write_reply(engine: Serving, prompt: Prompt, sampling: SamplingParams, write: Write) -> Reply:
    """Streams the output of one prompt to `write`. Ctrl-C ends it and gives what there is."""
    texts: list[str] = []
    num_tokens, reason = 0, None
    try:
        with engine.stream(prompt, sampling) as stream:
            for piece in stream:
                texts.append(piece.text)
                num_tokens += len(piece.token_ids)
                reason = piece.finish_reason
                write(piece.text)
    except KeyboardInterrupt:
        pass
    return Reply("".join(texts), num_tokens, reason)


def converse(conversation: Conversation, lines: Iterator[str], write: Write, tell: Write) -> None:
    """Answers each line until there are no more or one is /exit. `write` gets replies, `tell` all else."""
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        match command:
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/clear":
                conversation.clear()
            case "/system":
                conversation.begin(rest.strip() or None)
            case "/help":
                tell(HELP)
            case _ if command.startswith("/") and command[1:].isalpha() and not rest:
                tell(f"there is no {command}: {HELP}")
            case _:
                _answer(conversation, line, write, tell)


def _answer(conversation: Conversation, line: str, write: Write, tell: Write) -> None:
    """An error of one turn does not end the conversation, unless the engine has ended."""
    try:
        reply = conversation.ask(line, write)
    except (EngineDeadError, EngineClosedError):
        raise
    except GraphgenError as error:
        tell(f"{error}; /clear begins anew")
    else:
        write("\n")
        if reply.reason == "length":
            tell("(cut at the limit: raise --max-tokens, or /clear when the context is full)")


def chat_prompt(tokenizer: Tokenizer, text: str) -> Prompt:
    """The text as a user's message where the model has a chat template, else as it is."""
    return [{"role": "user", "content": text}] if tokenizer.has_chat else text


def check_chat(tokenizer: Tokenizer) -> None:
    """Raises InvalidRequestError for a model that cannot chat."""
    template = tokenizer.chat_template
    if template is None:
        raise InvalidRequestError(
            "the model has no chat template: name a chat model with --model (a first argument is what you say to it)"
            " or a template with --chat-template, or have it go on with a text by `graphgen generate`"
        )
    if template.fault:
        raise InvalidRequestError(template.fault)
