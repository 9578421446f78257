"""Outputs for tests of parsers: tokens as a model draws them, cut as a test likes."""

from collections.abc import Mapping, Sequence
from typing import Any

from graphgen.calls.outputs import Mark
from graphgen.gateway.output_parsers.events import Event, joined
from graphgen.gateway.output_parsers.formats import ParserMaker, ReasoningParser, ToolParser, choose_format
from graphgen.gateway.output_parsers.json_calls import Tools
from graphgen.gateway.output_parsers.marks import MarkedText

TOOLS: Tools = {
    "get_weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "now": {},
}


class Model:
    """What a model writes, and which of its markers are tokens. The text leaves these out, unless they are shown."""

    def __init__(
        self,
        calls: ToolParser = "none",
        reasoning: ReasoningParser = "none",
        tokens: Sequence[str] = (),
        shown: bool = True,
        template: Mapping[str, Any] | None = None,
        chat_template: str = "",
    ) -> None:
        """template: its own response template."""
        self._ids = {text: 100 + number for number, text in enumerate(tokens)}
        self._shown = shown
        self.maker = ParserMaker(choose_format(calls, reasoning, chat_template, self._ids, template))

    def parse(
        self,
        output: str,
        cuts: Sequence[int] = (),
        tools: Tools | None = TOOLS,
        prompt_tail: str = "",
        is_spelled: bool = False,
        is_open: bool = False,
    ) -> list[Event]:
        """The events of an output, joined where they are of one kind.

        cuts: after which tokens a piece ends. is_spelled: it has no special tokens but texts that look like them.
        is_open: it has not ended.
        """
        marked = MarkedText(self.maker.symbols)
        parser = self.maker.make(tools, prompt_tail, marked.texts)
        events: list[Event] = []
        text, marks, place = "", [], 0
        for number, token in enumerate(output if is_spelled else self.tokens_of(output)):
            shown = token if token not in self._ids or self._shown else ""
            if self._ids.get(token) in self.maker.symbols:
                marks.append(Mark(self._ids[token], place, place + len(shown)))
            text += shown
            place += len(shown)
            if number in cuts:
                events += parser.feed(marked.push(text, marks))
                text, marks = "", []
        events += parser.feed(marked.push(text, marks))
        if is_open:
            return joined(events)
        events += parser.feed(marked.finish())
        return joined([*events, *parser.finish()])

    def tokens_of(self, output: str) -> list[str]:
        """Every character is one, but those of special tokens."""
        tokens = []
        while output:
            token = next((special for special in self._ids if output.startswith(special)), output[0])
            tokens.append(token)
            output = output[len(token) :]
        return tokens
