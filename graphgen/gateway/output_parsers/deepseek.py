"""The calls of DeepSeek V3, R1 and V3.1: special tokens around each name and its arguments."""

from graphgen.gateway.output_parsers.events import Content
from graphgen.gateway.output_parsers.json_calls import Markers, Tools
from graphgen.gateway.output_parsers.reading import Reader, Reading

_BAR = "\uff5c"
CALLS, END_CALLS = f"<{_BAR}tool▁calls▁begin{_BAR}>", f"<{_BAR}tool▁calls▁end{_BAR}>"
CALL, END_CALL = f"<{_BAR}tool▁call▁begin{_BAR}>", f"<{_BAR}tool▁call▁end{_BAR}>"
SEPARATOR = f"<{_BAR}tool▁sep{_BAR}>"


def read_deepseek(reader: Reader, markers: Markers, tools: Tools) -> Reading[None]:
    """V3.1 writes a name, the separator and JSON; V3 and R1 `function`, the separator, a name and a block of JSON."""
    calls, call, end = markers[CALLS], markers[CALL], markers[END_CALL]
    while (marker := (yield from reader.copy_until(Content, calls, call))) is not None:
        if marker == calls:
            yield from reader.read_space()
            if not (yield from reader.reads(call)):
                reader.say(Content, calls)
                continue
        while True:
            reader.record()
            name = yield from _read_head(reader, markers[SEPARATOR])
            if name:
                reader.keep()
                reader.begin_call(name)
                yield from reader.copy_json()
                yield from reader.read_until(end, markers[END_CALLS])
            else:
                reader.rewind()
                text, found = yield from reader.read_until(end, markers[END_CALLS])
                reader.say(Content, call + text + (found or ""))
            yield from reader.read_space()
            if not (yield from reader.reads(call)):
                break
        yield from reader.reads(markers[END_CALLS])


def _read_head(reader: Reader, separator: str) -> Reading[str]:
    """The name, read up to the arguments; empty: something else came."""
    yield from reader.read_space()
    name = yield from reader.read_name()
    yield from reader.read_space()
    if not (yield from reader.reads(separator)):
        return ""
    yield from reader.read_space()
    if not (yield from reader.comes("{")):
        name = yield from reader.read_name()
        yield from reader.read_space()
        yield from reader.reads("```json")
        yield from reader.read_space()
    return name if (yield from reader.comes("{")) else ""
