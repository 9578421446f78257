"""The format of gpt-oss: messages with a header that says whether they are reasoning, a call or an answer."""

from graphgen.gateway.output_parsers.events import Arguments, Content, Reasoning
from graphgen.gateway.output_parsers.json_calls import Markers, Tools
from graphgen.gateway.output_parsers.reading import Reader, Reading

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKERS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
_FUNCTIONS = "functions."


def read_harmony(reader: Reader, markers: Markers, tools: Tools | None) -> Reading[None]:
    """`<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`; the prompt has
    written the first `<|start|>assistant`. Without tools a call is text."""
    start, channel, message = markers[START], markers[CHANNEL], markers[MESSAGE]
    ends = (start, markers[END], markers[CALL], markers[RETURN])
    while not (yield from reader.at_end()):
        if not (yield from reader.comes(start, channel, message, "to=", " to=")):
            yield from reader.copy_until(Content, start)
        header, found = yield from reader.read_until(message)
        if found is None:
            reader.say(Content, header)
            return
        words = _plain(header, channel, markers[CONSTRAIN], start).split()
        recipient = next((word.removeprefix("to=") for word in words if word.startswith("to=")), "")
        if tools is not None and recipient.startswith(_FUNCTIONS) and recipient != _FUNCTIONS:
            reader.begin_call(recipient.removeprefix(_FUNCTIONS))
            yield from reader.copy_until(Arguments, *ends)
        else:
            yield from reader.copy_until(Reasoning if "analysis" in words else Content, *ends)


def _plain(header: str, *markers: str) -> str:
    for marker in markers:
        header = header.replace(marker, " ")
    return header
