"""Outputs of models that say themselves how they are to be read: `response_template` of tokenizer_config.json.

Owns what the regions of such a template become, and that a call which cannot be read costs no more than itself.
transformers executes the template, and is imported only for a model that has one; it can since 5.13.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from graphgen.gateway.output_parsers.events import Arguments, Call, Content, Event, Reasoning, joined
from graphgen.gateway.output_parsers.json_calls import Tools

_KINDS: dict[str, Callable[[str], Event]] = {
    "content": Content,
    "reasoning_content": Reasoning,
    "reasoning": Reasoning,
    "thinking": Reasoning,
}
_CALLS = "tool_calls"
Executor = Any
"""Of transformers, which publishes no types."""


class ResponseTemplate:
    """A model's template. Raises ValueError for what is none, ImportError where transformers is too old."""

    def __init__(self, template: Mapping[str, Any]) -> None:
        from transformers.utils.chat_parsing.response_parser import ResponseParser
        from transformers.utils.chat_parsing.response_templates import load_response_template

        fields = template.get("fields")
        if not isinstance(fields, Mapping):
            raise ValueError("it has no fields")
        optional = {name: {**one, "optional": True} for name, one in fields.items()}
        texts = {name: one for name, one in optional.items() if name != _CALLS}
        self._whole = load_response_template({**template, "fields": optional})
        self._without_calls = load_response_template({**template, "fields": texts})
        self._make = ResponseParser
        self.has_calls = _CALLS in fields

    def parser(self, tools: Tools | None, prompt_tail: str, texts: Mapping[int, str]) -> "TemplateParser":
        """As `ParserMaker.make`."""
        template = self._without_calls if tools is None else self._whole
        described = [{"function": {"name": name, "parameters": dict(one)}} for name, one in (tools or {}).items()]
        prefix = prompt_tail if template.start_anchor_re.search(prompt_tail) else ""
        return TemplateParser(lambda start: self._make(template, start, tools=described), prefix, texts)


class TemplateParser:
    """Reads one output; its interface is OutputParser's."""

    def __init__(self, make: Callable[[str], Executor], prefix: str, texts: Mapping[int, str]) -> None:
        """make: an executor behind a prefix. prefix: the end of the prompt, where the answer begins. texts: of the
        symbols, see Reader."""
        self._make = make
        self._texts = texts
        self._course = _Course(make, prefix)

    def feed(self, text: str) -> list[Event]:
        return self._feed(text.translate(self._texts))

    def finish(self) -> list[Event]:
        try:
            return self._course.finish()
        except Exception:  # of a template's own parsers: they raise what they like
            return [Content(self._course.raw)] if self._course.raw else []

    def _feed(self, text: str) -> list[Event]:
        """A region that cannot be read is content, and what follows it is read anew."""
        try:
            return self._course.feed(text)
        except Exception:  # as above
            # What the executor has said before that region went with the exception: it says it once more.
            failed, again = self._course, _Course(self._make, self._course.prefix)
            whole = failed.text + text
            end = next((number for number, one in enumerate(whole) if not again.takes(one)), len(whole))
            self._course = _Course(self._make, "")
            events = _rest(joined(again.said), joined(failed.said))
            return [*events, *([Content(again.raw)] if again.raw else []), *self._feed(whole[end + 1 :])]


class _Course:
    """What one executor was given and has said."""

    def __init__(self, make: Callable[[str], Executor], prefix: str) -> None:
        self.prefix = prefix
        self.text = ""
        self.said: list[Event] = []
        self.raw = ""
        """The text of the region that is open, if it is no text for a reader."""
        self._executor = make(prefix)

    def feed(self, text: str) -> list[Event]:
        """Raises what the template's parsers raise; it is over then."""
        events = self._events_of(self._executor.feed(text))
        self.text += text
        self.said += events
        return events

    def takes(self, character: str) -> bool:
        """Whether nothing is raised."""
        try:
            self.feed(character)
        except Exception:  # as above
            return False
        return True

    def finish(self) -> list[Event]:
        return self._events_of(self._executor.finalize()[1])

    def _events_of(self, said: list[dict[str, Any]]) -> list[Event]:
        events: list[Event] = []
        for one in said:
            kind = _KINDS.get(one["field"])
            match one["type"]:
                case "region_open":
                    self.raw = ""
                case "region_chunk" if kind is not None and not one["dirty"]:
                    events.append(kind(one["text"]))
                case "region_chunk":
                    self.raw += one["text"]
                case "region_close" if one["field"] == _CALLS:
                    events += _calls_of(one["value"]) or ([Content(self.raw)] if self.raw else [])
                    self.raw = ""
        return events


def _calls_of(value: object) -> list[Event]:
    """Of a region: one call or several. Empty: it is none."""
    events: list[Event] = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name:
            return []
        arguments = function.get("arguments") or {}
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        events += [Call(name), Arguments(text)]
    return events


def _rest(whole: list[Event], said: list[Event]) -> list[Event]:
    """What is new in the first of two lists, of which the second is the beginning."""
    if not said:
        return whole
    last, same = said[-1], whole[len(said) - 1]
    if isinstance(last, Call) or isinstance(same, Call):
        return whole[len(said) :]
    more = same.text[len(last.text) :]
    return [*([type(same)(more)] if more else []), *whole[len(said) :]]


def tokens_in(template: Mapping[str, Any], tokens: Mapping[str, int]) -> dict[str, int]:
    """Those of the tokens that a template names; its patterns write a backslash before each `|`."""
    text = json.dumps(template, ensure_ascii=False).replace("\\", "")
    return {token: token_id for token, token_id in tokens.items() if token in text}
