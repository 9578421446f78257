"""Reasoning between two markers at the beginning of an output: `<think>`, `[THINK]`."""

from graphgen.gateway.output_parsers.events import Reasoning
from graphgen.gateway.output_parsers.reading import Reader, Reading


def read_reasoning(reader: Reader, opening: str, closing: str, is_open: bool) -> Reading[None]:
    """Reads what the model thinks before it answers, if it does. is_open: the prompt has written the opening marker.

    A marker further on is text: a model that explains `<think>` would otherwise fall silent.
    """
    if not is_open:
        reader.record()
        yield from reader.read_space()
        if not (yield from reader.reads(opening)):
            reader.rewind()
            return
        reader.keep()
    yield from reader.copy_until(Reasoning, closing)
