"""The formats that are known by name, which of them a model writes, and parsers of them.

Owns the names of `--tool-parser` and `--reasoning-parser`. Used by the supervisor, which chooses when a server starts,
and by the gateway, which makes a parser for each output.
"""

import logging
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

from msgspec import Struct

from graphgen.gateway.output_parsers import deepseek, harmony
from graphgen.gateway.output_parsers.events import Content, Event
from graphgen.gateway.output_parsers.json_calls import (
    Read,
    Tools,
    read_hermes,
    read_json_list,
    read_llama3,
    read_mistral,
)
from graphgen.gateway.output_parsers.reading import SPACE, Reader, Reading
from graphgen.gateway.output_parsers.response_template import ResponseTemplate, tokens_in
from graphgen.gateway.output_parsers.tagged_calls import GLM, MINIMAX, QWEN3_CODER, Tags, reader_of
from graphgen.gateway.output_parsers.think import read_reasoning

logger = logging.getLogger("graphgen.gateway")

ToolParser = Literal[
    "auto", "none", "hermes", "qwen3_coder", "glm", "minimax", "llama3_json", "mistral", "deepseek", "harmony"
]
ReasoningParser = Literal["auto", "none", "think", "mistral", "harmony"]
AUTO, NONE = "auto", "none"
_FIRST_SYMBOL = 0xD800
"""The symbols are lone surrogates, which no text of a tokenizer has."""


class _Calls(NamedTuple):
    read: Read
    markers: tuple[str, ...]
    signs: tuple[str, ...]
    """What a chat template has, or the tokenizer as a token, of a model that writes this format."""


def _tagged(tags: Tags) -> _Calls:
    return _Calls(reader_of(tags), (tags.opening, tags.closing), (tags.opening, tags.calls[0] or tags.keys[0]))


_CALLS = {
    "harmony": _Calls(harmony.read_harmony, harmony.MARKERS, (harmony.CHANNEL, harmony.MESSAGE)),
    "deepseek": _Calls(
        deepseek.read_deepseek,
        (deepseek.CALLS, deepseek.END_CALLS, deepseek.CALL, deepseek.END_CALL, deepseek.SEPARATOR),
        (deepseek.CALLS, deepseek.SEPARATOR),
    ),
    "mistral": _Calls(read_mistral, ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), ("[TOOL_CALLS]",)),
    "qwen3_coder": _tagged(QWEN3_CODER),
    "glm": _tagged(GLM),
    "minimax": _tagged(MINIMAX),
    "hermes": _Calls(read_hermes, ("<tool_call>", "</tool_call>"), ("<tool_call>", "arguments")),
    "llama3_json": _Calls(read_llama3, ("<|python_tag|>",), ("<|start_header_id|>", '"parameters"')),
}
"""In the order in which they are tried; the signs of one may be among those of a later one."""
_STRANGERS = ("<|tool_calls_section_begin|>", "<\uff5cDSML\uff5c")
"""Signs of formats that are like these and not among them."""
_REASONING = {
    "harmony": (harmony.CHANNEL, harmony.MESSAGE),
    "think": ("<think>", "</think>"),
    "mistral": ("[THINK]", "[/THINK]"),
}


class OutputFormat(Struct, frozen=True, kw_only=True):
    """What a model writes, as it was found out when its server started."""

    calls: str | None
    """As `--tool-parser`; None: its calls are of no known format."""
    reasoning: str | None
    """As `--reasoning-parser`; None: it thinks in no known format, or not at all."""
    token_ids: dict[str, int]
    """Tokens that are markers of these, by their text."""
    template: dict[str, Any] | None = None
    """The model's own response template, which goes before calls and reasoning where it can be executed."""


def choose_format(
    tool_parser: ToolParser,
    reasoning_parser: ReasoningParser,
    template: str,
    tokens: Mapping[str, int],
    response_template: Mapping[str, Any] | None = None,
) -> OutputFormat:
    """template: the model's chat template. tokens: the ids of the
    special and added tokens of its tokenizer, by their text. response_template: of its tokenizer."""
    calls: str = tool_parser
    reasoning: str = reasoning_parser
    if calls == AUTO:
        strange = any(sign in template for sign in _STRANGERS)
        found = (name for name, one in _CALLS.items() if all(sign in template for sign in one.signs))
        calls = NONE if strange else next(found, NONE)
    if reasoning == AUTO:
        known = (
            name for name, markers in _REASONING.items() if all(one in template or one in tokens for one in markers)
        )
        reasoning = next(known, NONE)
    markers = [*(_CALLS[calls].markers if calls in _CALLS else ()), *_REASONING.get(reasoning, ())]
    own = None if (tool_parser, reasoning_parser) != (AUTO, AUTO) or response_template is None else response_template
    return OutputFormat(
        calls=None if calls == NONE else calls,
        reasoning=None if reasoning == NONE else reasoning,
        token_ids={
            **{marker: tokens[marker] for marker in markers if marker in tokens},
            **({} if own is None else tokens_in(own, tokens)),
        },
        template=None if own is None else dict(own),
    )


PLAIN = OutputFormat(calls=None, reasoning=None, token_ids={})


class Parser(Protocol):
    """Reads one output. `feed` and `finish` give the events that have become certain."""

    def feed(self, text: str) -> list[Event]:
        """text: more of the output, with the symbols of its special tokens."""

    def finish(self) -> list[Event]:
        """The output has ended."""


class OutputParser:
    """Reads one output by a generator."""

    def __init__(self, reader: Reader, reading: Reading[None]) -> None:
        self._reader = reader
        self._reading = reading

    def feed(self, text: str) -> list[Event]:
        self._reader.add(text)
        next(self._reading, None)
        return self._reader.take_events()

    def finish(self) -> list[Event]:
        self._reader.end()
        next(self._reading, None)
        return self._reader.take_events()


class ParserMaker:
    """Makes the parsers of a request's outputs: which of the markers are tokens is the model's, not the request's."""

    def __init__(self, output_format: OutputFormat) -> None:
        self._format = output_format
        tokens = output_format.token_ids
        symbols = {text: chr(_FIRST_SYMBOL + number) for number, text in enumerate(sorted(tokens))}
        self.symbols = {token_id: symbols[text] for text, token_id in tokens.items()}
        """What a token is in the text that a parser is fed."""
        self._markers = _Markers(symbols)
        self._template = None if output_format.template is None else _executable(output_format.template)
        self._token_texts = {ord(symbol): text for text, symbol in symbols.items()}

    @property
    def has_calls(self) -> bool:
        return self._format.calls is not None if self._template is None else self._template.has_calls

    @property
    def is_plain(self) -> bool:
        """Whether outputs without calls are text as it is."""
        return self._template is None and self._format.reasoning is None and self._format.calls != "harmony"

    @property
    def thinks(self) -> bool:
        """Whether outputs may begin with reasoning between two markers."""
        return self._format.reasoning in _REASONING and self._format.reasoning != "harmony"

    @property
    def thoughts(self) -> tuple[str, str]:
        """The markers around the reasoning with which outputs may begin; empty where they do not."""
        return _REASONING[self._format.reasoning or ""] if self.thinks else ("", "")

    def closing_behind(self, prompt: str) -> str:
        """The marker that ends the reasoning that a prompt has begun; empty where it has not."""
        opening, closing = self.thoughts
        return closing if closing and prompt.rstrip(SPACE).endswith(opening) else ""

    def make(self, tools: Tools | None, prompt_tail: str, texts: Mapping[int, str], *, is_list: bool = False) -> Parser:
        """tools: None: calls are text. prompt_tail: the end of the prompt, which may have begun the output.
        texts: of the symbols, see Reader. is_list: a grammar makes the output a list of calls, whatever the model's own
        format, behind its reasoning."""
        reader = Reader(texts)
        if is_list:
            return OutputParser(reader, self._read_list(reader, prompt_tail))
        if self._template is not None:
            return self._template.parser(tools, prompt_tail, self._token_texts)
        return OutputParser(reader, self._read(reader, tools, prompt_tail))

    def _read_list(self, reader: Reader, prompt_tail: str) -> Reading[None]:
        if self.thinks:
            yield from self._read_thoughts(reader, prompt_tail)
        yield from read_json_list(reader)
        yield from reader.copy_until(Content)

    def _read_thoughts(self, reader: Reader, prompt_tail: str) -> Reading[None]:
        opening, closing = self.thoughts
        is_open = self.closing_behind(prompt_tail) != ""
        yield from read_reasoning(reader, self._markers[opening], self._markers[closing], is_open)

    def _read(self, reader: Reader, tools: Tools | None, prompt_tail: str) -> Reading[None]:
        calls, reasoning = self._format.calls, self._format.reasoning
        if "harmony" in (calls, reasoning):
            yield from harmony.read_harmony(reader, self._markers, tools)
            return
        if reasoning is not None:
            yield from self._read_thoughts(reader, prompt_tail)
        if tools is not None and calls is not None:
            yield from _CALLS[calls].read(reader, self._markers, tools)
        yield from reader.copy_until(Content)


def _executable(template: Mapping[str, Any]) -> ResponseTemplate | None:
    """None for one that transformers does not take: outputs are read as if there were none."""
    try:
        return ResponseTemplate(template)
    except Exception as error:  # of transformers, on what a file holds
        logger.warning("the response template of the model cannot be used: %s: %s", type(error).__name__, error)
        return None


class _Markers(dict[str, str]):
    """What is not a token is looked for as text."""

    def __missing__(self, marker: str) -> str:
        return marker
