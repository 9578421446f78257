"""What a parser reads an output from, however its text was cut on the way.

A parser is a generator: it reads with the methods of Reader, and yields where it needs text that has not come. Each
method decides by the text alone and never by where a piece of it ended, so that any split gives the same events.

A special token that a parser looks for is one character of the text that no text can have, a lone surrogate: its
symbol. Text that spells such a token is only text. A marker that is no token of the model is looked for as text.
"""

import re
from collections.abc import Callable, Generator, Mapping
from typing import TypeVar

from graphgen.gateway.output_parsers.events import Arguments, Call, Event

Value = TypeVar("Value")
Reading = Generator[None, None, Value]
"""Yields where more text is needed; its value is what was read."""

SPACE = " \t\r\n"
_IN_STRING = re.compile(r'["\\]')
_NAME = re.compile(r"[^\s\"'\\<>{}\[\]()\ud800-\udfff]*")
_OUTSIDE = re.compile(r'["{}\[\]]')


class Reader:
    """The text that has come and was not read, and the events that were made of what was read."""

    def __init__(self, texts: Mapping[int, str]) -> None:
        """texts: what a symbol is in events, by its code point; it grows as special tokens come."""
        self._texts = texts
        self._unread = ""
        self._ended = False
        self._read: list[str] | None = None  # what was read since `record`
        self._events: list[Event] = []

    # --- for who feeds it

    def add(self, text: str) -> None:
        self._unread += text

    def end(self) -> None:
        self._ended = True

    def take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # --- for parsers

    def say(self, kind: Callable[[str], Event], text: str) -> None:
        """An event of this text, unless it is empty."""
        text = text.translate(self._texts)
        if text:
            self._events.append(kind(text))

    def begin_call(self, name: str) -> None:
        self._events.append(Call(name.translate(self._texts)))

    def record(self) -> None:
        """From here on what is read is kept, until `keep` or `rewind`."""
        self._read = []

    def keep(self) -> str:
        """Ends the record: what was read since stays read."""
        read, self._read = self._read, None
        return "".join(read or ())

    def rewind(self) -> None:
        """Ends the record: what was read since is unread again."""
        self._unread = self.keep() + self._unread

    def at_end(self) -> Reading[bool]:
        """Whether the output has ended and all of it is read."""
        while not self._unread and not self._ended:
            yield
        return not self._unread

    def copy_until(self, kind: Callable[[str], Event], *markers: str) -> Reading[str | None]:
        """Makes events of the text before the first of these markers, as it comes; reads the marker too.

        The marker, or None when the output ended before one.
        """
        while True:
            text, marker = self._split(markers)
            self.say(kind, self._take(len(text)))
            if marker is not None:
                self._take(len(marker))
            if marker is not None or (self._ended and not self._unread):
                return marker
            yield

    def read_until(self, *markers: str) -> Reading[tuple[str, str | None]]:
        """(the text before the first of these markers, the marker, which is read too); None: the output ended."""
        parts: list[str] = []
        while True:
            text, marker = self._split(markers)
            parts.append(self._take(len(text)))
            if marker is not None:
                self._take(len(marker))
            if marker is not None or (self._ended and not self._unread):
                return "".join(parts), marker
            yield

    def read_space(self) -> Reading[str]:
        """Spaces and ends of lines."""
        parts: list[str] = []
        while True:
            parts.append(self._take(len(self._unread) - len(self._unread.lstrip(SPACE))))
            if self._unread or self._ended:
                return "".join(parts)
            yield

    def reads(self, literal: str) -> Reading[bool]:
        """Whether this comes next; it is read then, and nothing otherwise."""
        while not self._ended and len(self._unread) < len(literal) and literal.startswith(self._unread):
            yield
        if not self._unread.startswith(literal):
            return False
        self._take(len(literal))
        return True

    def comes(self, *literals: str) -> Reading[bool]:
        """Whether one of these comes next. Nothing is read."""
        while not self._ended and any(
            len(self._unread) < len(literal) and literal.startswith(self._unread) for literal in literals
        ):
            if self._unread.startswith(literals):
                break
            yield
        return self._unread.startswith(literals)

    def read_name(self) -> Reading[str]:
        """The characters that names of functions have: no quotes, brackets, spaces or special tokens."""
        parts: list[str] = []
        while True:
            found = _NAME.match(self._unread)
            parts.append(self._take(found.end() if found else 0))
            if self._unread or self._ended:
                return "".join(parts)
            yield

    def copy_json(self, take: Callable[[str], None] | None = None) -> Reading[None]:
        """The object or list of JSON that comes next, up to the bracket that ends it: to `take`, or as Arguments."""
        depth, in_string = 0, False
        while True:
            end, depth, in_string = _scan(self._unread, depth, in_string, self._ended)
            (take or self._say_arguments)(self._take(end))
            if (end and depth == 0) or self._ended:
                return
            yield

    def _say_arguments(self, text: str) -> None:
        self.say(Arguments, text)

    def _take(self, num_characters: int) -> str:
        text, self._unread = self._unread[:num_characters], self._unread[num_characters:]
        if self._read is not None:
            self._read.append(text)
        return text

    def _split(self, markers: tuple[str, ...]) -> tuple[str, str | None]:
        """(text that is certainly before the first marker, the marker if all of it is there)."""
        unread = self._unread
        found = [(start, -len(marker), marker) for marker in markers if (start := unread.find(marker)) >= 0]
        first = min(found) if found else None
        if self._ended:
            return (unread, None) if first is None else (unread[: first[0]], first[2])
        begun = len(unread)
        for marker in markers:
            for start in range(max(0, len(unread) - len(marker) + 1), begun):
                if marker.startswith(unread[start:]):
                    begun = start
                    break
        if first is not None and first[0] <= begun:
            return unread[: first[0]], first[2]
        return unread[:begun], None


def _scan(text: str, depth: int, in_string: bool, ended: bool) -> tuple[int, int, bool]:
    """How far a value of JSON goes in this text, that goes on at this depth: (end, depth there, in a string there).

    A backslash at the end of the text is left, since what it escapes has not come.
    """
    at = 0
    while found := (_IN_STRING if in_string else _OUTSIDE).search(text, at):
        character, at = found[0], found.end()
        if character == "\\":
            if at == len(text):
                return (at if ended else at - 1), depth, in_string
            at += 1
        elif character == '"':
            in_string = not in_string
        else:
            depth += 1 if character in "{[" else -1
            if depth == 0:
                return at, 0, False
    return len(text), depth, in_string
