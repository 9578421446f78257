"""One output of a chat while it comes: from the pieces of a stream to the deltas of OpenAI's API.

Owns what a parser's events become: the numbers and ids of calls, which spaces are left out, how the output is said to
have ended, and that there is one call at most where the client asked for that. Used by the endpoints.
"""

import secrets
import string
from collections.abc import Sequence

from msgspec import UNSET

from graphgen.calls.outputs import StreamPiece
from graphgen.gateway import schema
from graphgen.gateway.output_parsers.events import Arguments, Call, Content, Event, Reasoning
from graphgen.gateway.output_parsers.formats import Parser, ParserMaker
from graphgen.gateway.output_parsers.marks import MarkedText
from graphgen.gateway.output_parsers.reading import SPACE
from graphgen.gateway.tools import ToolUse

TAIL_LEN = 1024
"""Characters of the end of the prompt, which may have begun the output."""
_ID_CHARACTERS = string.ascii_letters + string.digits
_ID_LEN = 9
"""Mistral's templates take no other."""


def joined_text(pieces: Sequence[StreamPiece]) -> str:
    """Mostly that of one."""
    return pieces[0].text if len(pieces) == 1 else "".join([piece.text for piece in pieces])


class PlainOutput:
    """One output of which nothing is parsed. Its interface is ChatOutput's."""

    def take(self, pieces: Sequence[StreamPiece]) -> tuple[list[schema.ChatDelta], str | None]:
        text = joined_text(pieces)
        return [schema.ChatDelta(content=text)] if text else [], pieces[-1].finish_reason


class ChatOutput:
    """One output. `take` gives what a client is sent of its next pieces."""

    def __init__(self, maker: ParserMaker, tools: ToolUse) -> None:
        self._maker = maker
        self._tools = tools
        self._marked = MarkedText(maker.symbols)
        self._parser: Parser | None = None  # made with the first piece, which knows the prompt
        self._spaces = _Spaces()
        self._num_calls = 0

    def take(self, pieces: Sequence[StreamPiece]) -> tuple[list[schema.ChatDelta], str | None]:
        """(what is new, in its order; how the output ended, if it has)."""
        if self._parser is None:
            is_forced = self._tools.forced is not None
            self._parser = self._maker.make(
                self._tools.schemas, pieces[0].prompt_tail, self._marked.texts, is_list=is_forced
            )
        marks = [mark for piece in pieces for mark in piece.marks]
        events = self._parser.feed(self._marked.push(joined_text(pieces), marks))
        finish = pieces[-1].finish_reason
        if finish is None:
            return self._deltas(self._spaces.take(events)), None
        events += self._parser.feed(self._marked.finish())
        events += self._parser.finish()
        deltas = self._deltas([*self._spaces.take(events), *self._spaces.finish()])
        is_news = self._num_calls > 0 and not self._tools.is_named
        return deltas, "tool_calls" if is_news and finish == "stop" else finish

    def _deltas(self, events: Sequence[Event]) -> list[schema.ChatDelta]:
        deltas: list[schema.ChatDelta] = []
        for event in events:
            if isinstance(event, Call):
                self._num_calls += 1
            if self._tools.one_call and self._num_calls > 1:
                continue
            deltas.append(self._delta(event))
        return deltas

    def _delta(self, event: Event) -> schema.ChatDelta:
        match event:
            case Content():
                return schema.ChatDelta(content=event.text)
            case Reasoning():
                return schema.ChatDelta(reasoning_content=event.text, reasoning=event.text)
            case Call():
                function = schema.FunctionDelta(name=event.name, arguments="")
                call_id = "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LEN))
                call = schema.CallDelta(self._num_calls - 1, call_id, "function", function)
                return schema.ChatDelta(tool_calls=[call])
            case Arguments():
                call = schema.CallDelta(self._num_calls - 1, function=schema.FunctionDelta(arguments=event.text))
                return schema.ChatDelta(tool_calls=[call])


class _Spaces:
    """Leaves out the spaces between the parts of an output: around reasoning, before, between and behind calls."""

    def __init__(self) -> None:
        self._held = ""  # spaces at the end of the newest text
        self._kind: type[Content] | type[Reasoning] = Content
        self._is_inner = False  # the newest text is not empty, so that its spaces are part of it
        self._is_plain = True  # the output has been content alone

    def take(self, events: Sequence[Event]) -> list[Event]:
        found: list[Event] = []
        for event in events:
            if not isinstance(event, (Content, Reasoning)):
                self._held, self._is_inner, self._is_plain = "", False, False
                found.append(event)
                continue
            if type(event) is not self._kind:
                self._held, self._is_inner, self._is_plain = "", False, False
                self._kind = type(event)
            text = event.text if self._is_inner or self._is_plain else event.text.lstrip(SPACE)
            text = self._held + text
            body = text.rstrip(SPACE)
            self._held = text[len(body) :]
            if body:
                self._is_inner = True
                found.append(self._kind(body))
        return found

    def finish(self) -> list[Event]:
        """Content that nothing followed keeps its spaces."""
        held, self._held = self._held, ""
        return [Content(held)] if held and self._kind is Content and (self._is_inner or self._is_plain) else []


def join_deltas(deltas: Sequence[schema.ChatDelta]) -> schema.ChatMessage:
    """The message of an output that has ended."""
    content = "".join(delta.content for delta in deltas if delta.content is not UNSET)
    reasoning = "".join(delta.reasoning for delta in deltas if delta.reasoning is not UNSET)
    calls: list[tuple[str, str, list[str]]] = []
    for delta in deltas:
        for call in () if delta.tool_calls is UNSET else delta.tool_calls:
            if call.id is not UNSET and call.function.name is not UNSET:
                calls.append((call.id, call.function.name, []))
            calls[-1][2].append(call.function.arguments)
    return schema.ChatMessage(
        content=content if content or not calls else None,
        reasoning_content=reasoning or UNSET,
        reasoning=reasoning or UNSET,
        tool_calls=[schema.ToolCall(call_id, schema.Function(name, "".join(parts))) for call_id, name, parts in calls]
        or UNSET,
    )
